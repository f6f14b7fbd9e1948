"""What validation changes, and a search must undo: a small model is trained with and without the callback."""

from __future__ import annotations

import itertools
import warnings
from array import array
from collections import ChainMap, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ckmerge.errors import TraceError
from tests.support.bitwise import digest
from tests.support.trainers import make_merge, make_trainer, manifests, merge_callbacks


class Weighted(Dataset[tuple[Tensor, Tensor]]):
    """Points with weights of their own, more bytes than a search copied once, and a level of difficulty."""

    def __init__(self, size: int = 1000) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(24, 4, generator=generator)
        self.weights = np.ones(size)
        self.level = 1.0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] * self.level, torch.tensor(self.weights[i], dtype=torch.float32)


class Small(pl.LightningModule):
    """Validation changes nothing; each case below changes something that training depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.factor = nn.Parameter(torch.ones(()))
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, weight = batch
        return ((self.net(x).squeeze(1) * self.factor - x.sum(1)).square() * weight).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        vars(self)["losses"].append(float(loss))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Manual(Small):
    """Steps its scheduler in validation, and sets a rate there."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        scheduler: Any = self.lr_schedulers()
        scheduler.step(1.0)
        self.trainer.optimizers[0].param_groups[0]["betas"] = (0.5, scheduler.num_bad_epochs / 10)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Forgets(Small):
    """Changes the optimizer's memory in place, and marks its tensors."""

    def on_validation_epoch_end(self) -> None:
        for state in self.trainer.optimizers[0].state.values():
            state["exp_avg"].mul_(0.5)
            state["exp_avg_sq"].seen = getattr(state["exp_avg_sq"], "seen", 0) + 1
            state["exp_avg_sq"].mul_(state["exp_avg_sq"].seen)


class Settings(Small):
    """Changes the Trainer's own settings."""

    def on_validation_epoch_end(self) -> None:
        self.trainer.accumulate_grad_batches += 1
        self.trainer.gradient_clip_val = (self.trainer.gradient_clip_val or 1.0) / 2
        self.trainer.callbacks.append(pl.Callback())
        self.trainer.fit_loop.epoch_loop.max_steps -= 1


class Curriculum(Small):
    """Makes the training data harder, and weighs them anew."""

    def on_validation_epoch_end(self) -> None:
        data = self.trainer.train_dataloader.dataset
        data.level *= 1.1
        data.weights *= 0.9


class Averaging(torch.optim.SGD):
    """As Schedule-Free: gradients are taken at one place, and weights are good at another."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05)
        self.param_groups[0]["train_mode"] = True
        self.means = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def _swap(self, train: bool) -> None:
        if self.param_groups[0]["train_mode"] != train:
            for mean, parameter in zip(self.means, self.param_groups[0]["params"], strict=True):
                parameter.lerp_(mean, 0.5 if not train else -1.0)
            self.param_groups[0]["train_mode"] = train

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["train_mode"], "Optimizer was not in train mode"
        return super().step(closure)


class ScheduleFree(Small):
    """Leaves the optimizer in evaluation mode until the next epoch."""

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].train()

    def on_validation_epoch_start(self) -> None:
        self.trainer.optimizers[0].eval()

    def configure_optimizers(self) -> Any:
        return Averaging(list(self.parameters()))


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


class Grows(Small):
    """Adds submodules, parameters, hooks of modules and of tensors, and a parametrization, once or every time."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = torchmetrics.MetricTracker(torchmetrics.MeanMetric(), maximize=False)
        self.scales = nn.ParameterList()

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + 0.1 * len(self.tracker) + 0.1 * len(self.scales))

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()
        self.scales.append(nn.Parameter(torch.zeros(1), requires_grad=False))
        if len(self.scales) == 2:
            self.net[0].register_forward_hook(lambda *a: a[-1] * 1.1)
            self.net[0].register_full_backward_hook(lambda *a: tuple(g if g is None else 0.9 * g for g in a[1]))
            self.net[2].weight.register_hook(lambda g: g * 0.5)
            self.factor.register_post_accumulate_grad_hook(halve)
            nn.utils.parametrizations.orthogonal(self.net[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.tracker.update(1.0)


class Pointers(Small):
    """Gives parameters other memory for validation, and their own back afterwards."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.averages = [p.detach().clone() for p in self.parameters()]
        self.num_validations = 0

    def on_train_batch_end(self, *_: Any) -> None:
        for average, parameter in zip(self.averages, self.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.5)

    def on_validation_epoch_start(self) -> None:
        self.originals = [p.data for p in self.parameters()]
        for average, parameter in zip(self.averages, self.parameters(), strict=True):
            parameter.data = average

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.num_validations += 1
        if self.fails and batch_idx == 1 and any(c._run._is_searching for c in merge_callbacks(self.trainer)):
            raise RuntimeError("validation has failed")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for original, parameter in zip(self.originals, self.parameters(), strict=True):
            parameter.data = original


class FailingPointers(Pointers):
    """Fails in a search while parameters have other memory."""

    fails = True


class Containers(Small):
    """Counts in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.numbers = bytearray(2), array("d", [0.0])
        self.wrapped, self.listed = UserDict(n=0), UserList([0])
        self.chain = ChainMap({"n": 0}, {})
        self.counts = np.zeros(2000)

    def loss(self, batch: Any) -> Tensor:
        total = self.raw[0] + self.numbers[0] + self.wrapped["n"] + self.listed[0] + self.chain["n"]
        return super().loss(batch) * (1 + 0.01 * total + 0.01 * float(self.counts.sum()))

    def on_validation_epoch_end(self) -> None:
        self.raw[0] += 1
        self.numbers[0] += 1
        self.wrapped["n"] += 1
        self.listed[0] += 1
        self.chain["n"] += 1
        self.counts += 1
        self.counts.resize(len(self.counts) + 1, refcheck=False)


class Draws(Small):
    """Numbers batches, and goes over its own data, by iterators that validation moves as well."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.scales = itertools.count(), itertools.cycle([0.9, 1.0, 1.1])
        self.index: dict[int, int] = defaultdict(itertools.count().__next__)

    def loss(self, batch: Any) -> Tensor:
        number = next(self.numbers)
        return super().loss(batch) * next(self.scales) * (1 + self.index[number // 5] / 100)


class Backward(Small):
    """Takes gradients in validation while those of training are being accumulated."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        with torch.enable_grad():
            self.loss(batch).backward()


class Switches(Small):
    """Sets torch's own switches."""

    def on_validation_epoch_end(self) -> None:
        torch.set_float32_matmul_precision("medium")

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append({"highest": 1.0, "high": 2.0, "medium": 3.0}[torch.get_float32_matmul_precision()])


class Tally(pl.Callback):
    """Keeps state of all kinds, in objects of its own as well."""

    def __init__(self) -> None:
        self.count, self.best, self.since = 0, None, datetime(2000, 1, 1)
        self.history, self.table = [0], {"n": deque([0])}
        self.total, self.sums = torch.zeros(2), np.zeros(2)
        self.mean, self.inner = torchmetrics.SumMetric(), SimpleNamespace(n=0, callback=Searching(None))

    def grow(self) -> None:
        self.count += 1
        self.best = float(self.count)
        self.since += timedelta(days=1)
        self.history.append(self.count)
        self.table["n"].append(self.count)
        self.total.add_(1)
        self.sums += 1
        self.mean.update(1.0)
        self.inner.n += 1
        self.inner.callback.merge = self.count

    def value(self) -> float:
        parts = [self.count, self.best, self.since.toordinal() - 730120, len(self.history), len(self.table["n"])]
        parts += [self.total.sum(), self.sums.sum(), self.mean.compute(), self.inner.n, self.inner.callback.merge]
        return sum(float(part or 0) for part in parts)


class Tallies(Small):
    """Writes to other callbacks, among them one that averages weights."""

    def configure_callbacks(self) -> Any:
        return [Tally(), EMAWeightAveraging(decay=0.9)]

    def callback(self, cls: type) -> Any:
        return next(c for c in self.trainer.callbacks if type(c) is cls)

    def loss(self, batch: Any) -> Tensor:
        mean = self.callback(EMAWeightAveraging)._average_model.module.factor.detach()
        return super().loss(batch) * (1 + 0.01 * self.callback(Tally).value() + mean)

    def on_validation_epoch_end(self) -> None:
        self.callback(Tally).grow()
        with torch.no_grad():
            self.callback(EMAWeightAveraging)._average_model.module.factor.mul_(0.9)


class Searching(pl.Callback):
    """Searches in the middle of an epoch, before the run's own validation."""

    def __init__(self, merge: Any) -> None:
        self.merge = merge

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if args[-1] == 4:
            self.merge.search_now()


def train(make: Callable[[], Small], root: Path, merge: Any = None, size: int = 1000, **options: Any) -> Small:
    """Train for two epochs, with a search in the middle of each."""
    pl.seed_everything(1, verbose=False)
    module, before = make(), torch.get_float32_matmul_precision()
    callbacks = [merge, Searching(merge)] if merge is not None else []
    trainer = make_trainer(root, *callbacks, **{"num_sanity_val_steps": 0, "max_epochs": 2, **options})
    loaders = DataLoader(Weighted(size), 4), DataLoader(Weighted(size), 4)
    try:
        trainer.fit(module, *loaders)
    finally:
        torch.set_float32_matmul_precision(before)
    return module


def same_run(make: Callable[[], Small], root: Path, merge: Any, size: int = 1000, **options: Any) -> None:
    """Goes red if training differs by a single bit."""
    plain, merged = train(make, root, size=size, **options), train(make, root, merge, size, **options)
    assert merged.losses == plain.losses
    expected, actual = plain.state_dict(), merged.state_dict()
    assert [*actual] == [*expected]
    assert [n for n in expected if digest(expected[n]) != digest(actual[n])] == []
    assert digest(getattr(merged, "averages", None)) == digest(getattr(plain, "averages", None))


CASES: dict[str, tuple[type[Small], dict[str, Any]]] = {
    "scheduler and rates by hand": (Manual, {}),
    "optimizer's state": (Forgets, {}),
    "the Trainer's settings": (Settings, {"max_steps": 12}),
    "the training data": (Curriculum, {}),
    "schedule-free": (ScheduleFree, {}),
    "submodules, parameters, hooks": (Grows, {}),
    "averages by pointers": (Pointers, {}),
    "averages by pointers, failing": (FailingPointers, {}),
    "containers and arrays": (Containers, {}),
    "iterators": (Draws, {}),
    "gradients": (Backward, {"accumulate_grad_batches": 4}),
    "switches": (Switches, {}),
    "other callbacks": (Tallies, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_search_undoes_what_validation_does(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    # Where a hook moves weights, a search may be refused: training goes on all the same.
    merge = make_merge(dirpath=tmp_path / "merges", every_n_train_steps=100, on_error="warn")
    same_run(make, tmp_path, merge, **options)
    assert merge._last_state["schedule"]["searched_step"] > 0


class Reweighs(Small):
    """Changes more data than a search copies, and counts evaluations by a file, which nobody puts back."""

    def on_validation_epoch_end(self) -> None:
        self.trainer.train_dataloader.dataset.weights *= 0.9
        with Path(self.trainer.default_root_dir, "validations").open("a") as file:
            file.write("x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_trace_ends_searching_after_one_evaluation(on_error: Any, tmp_path: Path) -> None:
    """Goes red if what cannot be put back is not noticed, or noticed late, or told more than once."""
    merge = make_merge(dirpath=tmp_path / "merges", every_n_train_steps=100, on_error=on_error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_error == "raise":
            with pytest.raises(TraceError, match="weights"):
                train(Reweighs, tmp_path, merge, size=700_000)
        else:
            train(Reweighs, tmp_path, merge, size=700_000)
    told = [str(w.message) for w in caught if "merge at step" in str(w.message) or "a search must" in str(w.message)]
    own_validations = 2 if on_error == "warn" else 0
    assert len((tmp_path / "validations").read_text()) == own_validations + 1
    assert len(told) == (on_error == "warn")
    assert all("train_dataloader.dataset.weights" in text and "has ended" in text for text in told)
    assert manifests(tmp_path / "merges") == []
