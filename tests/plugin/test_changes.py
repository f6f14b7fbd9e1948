"""A model that changes while it is trained: the buffer starts anew, says so once, and training never hears of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, SearchConfig, load_merged
from lightning_ckmerge.core import merge_plan
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.distributed.comm import Alone
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import SnapshotError
from tests.support.trainers import make_merge, make_trainer, manifests
from tests.support.warnings import only_expected

NUM_STEPS = 12
CHANGED_AT = 5  # in the middle of a segment


class Net(pl.LightningModule):
    """Layers to be replaced, tied ones, and a parameter that no step needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied_too = nn.Linear(6, 6, bias=False)
        self.tied_too.weight = self.tied.weight
        self.spare = nn.Parameter(torch.ones(3))

    def loss(self, x: Tensor, noise: float | Tensor = 0.0) -> Tensor:
        z = self.body(x).tanh()
        z = z + self.tied_too(self.tied(z.to(self.tied.weight.dtype))).to(z.dtype)
        y: Tensor = self.head(z.to(next(self.head.parameters()).dtype))
        return (y.float() - x[:, :2] - noise).square().mean()

    def training_step(self, x: Tensor) -> Tensor:
        return self.loss(x, 2 * torch.randn(2))  # training wanders, so that merges are better than the latest weights

    def validation_step(self, x: Tensor) -> None:
        self.log("val_loss", self.loss(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Change(pl.Callback):
    """Does something to the module once."""

    def __init__(self, change: Callable[[Any], object], step: int = CHANGED_AT) -> None:
        self.change, self.step = change, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.change(pl_module)
            trainer.optimizers = [pl_module.configure_optimizers()]


def loader(size: int, seed: int) -> DataLoader[Any]:
    return DataLoader(torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)), batch_size=8)


def train(
    root: Path, *callbacks: pl.Callback, module: pl.LightningModule | None = None, **options: Any
) -> tuple[pl.Trainer, list[str]]:
    """Return the Trainer, and the warnings about the buffer."""
    pl.seed_everything(1, verbose=False)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(root, *callbacks, **{"max_steps": NUM_STEPS, **options})
    with only_expected("buffer|merge|snapshot") as texts:
        trainer.fit(module or Net(), loader(8 * NUM_STEPS, 0), loader(32, 1), ckpt_path=ckpt_path, weights_only=False)
    return trainer, [t for t in texts if "buffer" in t or "merge" in t or "snapshot" in t]


def merge(root: Path, **options: Any) -> Any:
    buffer = options.pop("buffer", BufferConfig(every_n_train_steps=2, update_every_n_steps=1))
    search = SearchConfig(n_trials=1, anchors=["uniform"], max_fraction_of_training=None)
    # Of weights that improve, the older ones have the higher loss: merges win, and are published.
    defaults = {"dirpath": root / "merges", "every_n_train_steps": 4, "buffer": buffer, "search": search}
    defaults |= {"mode": "max", "check_mode": False}
    return make_merge(**{**defaults, **options})


def steps(root: Path) -> list[int]:
    return [m["step"] for m in manifests(root / "merges")]


def replace_head(module: Any) -> None:
    module.head = nn.Linear(6, 2)


def delete(module: Any) -> None:
    del module.spare


def unset(module: Any) -> None:
    module.spare = None


def resize(module: Any) -> None:
    module.spare.data = torch.ones(7)


def resize_smaller(module: Any) -> None:
    module.spare = nn.Parameter(torch.ones(2))


def broadcastable(module: Any) -> None:
    module.spare.data = torch.ones(1)


def halve(module: Any) -> None:
    module.head.bfloat16()


def untie(module: Any) -> None:
    module.tied_too.weight = nn.Parameter(module.tied.weight.detach().clone())


def tie(module: Any) -> None:
    module.head.weight = nn.Parameter(torch.zeros(2, 6))
    module.extra_head = nn.Linear(6, 2)
    module.extra_head.weight = module.head.weight


def add(module: Any) -> None:
    module.adapter = nn.Linear(2, 2)


def add_buffer(module: Any) -> None:
    module.register_buffer("average", torch.zeros(2))


def make_sparse(module: Any) -> None:
    module.register_buffer("spread", torch.eye(3).to_sparse())


CHANGES: dict[str, Callable[[Any], object]] = {
    "head replaced": replace_head,
    "deleted": delete,
    "set to None": unset,
    "resized": resize,
    "another of another shape": resize_smaller,
    "broadcastable": broadcastable,
    "another precision": halve,
    "untied": untie,
    "tied": tie,
    "added": add,
    "buffer added": add_buffer,
    "pruned": lambda module: prune.l1_unstructured(module.body, "weight", 0.5),
    "weight norm": lambda module: parametrizations.weight_norm(module.body),
    "old spectral norm": lambda module: torch.nn.utils.spectral_norm(module.body),
    "spectral norm": lambda module: parametrizations.spectral_norm(module.body),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_found(name: str) -> None:
    """Those of a tensor in its place cheaply, too: so nothing of another shape is read."""
    module = Net()
    ownership = Ownership(module, Alone())
    assert ownership.changes(everywhere=True) == []
    CHANGES[name](module)
    assert ownership.changes(everywhere=True)
    with contextlib.suppress(SnapshotError):
        layout = TensorLayout(Ownership(Net(), Alone()).owned())
        assert [t.shape for t in layout.order(ownership.owned())] == [s.shape for s in layout.slots]


@pytest.mark.parametrize("name", ["head replaced", "resized", "another precision", "untied", "pruned"])
def test_a_change_starts_the_buffer_anew(tmp_path: Path, name: str) -> None:
    """Training goes as without the callback, one warning tells, and merges of the model as it is now are published."""
    change = CHANGES[name]
    plain, _ = train(tmp_path / "plain", Change(change))
    trainer, said = train(tmp_path, merge(tmp_path, every_n_train_steps=6), Change(change))
    before, after = plain.lightning_module.state_dict(), trainer.lightning_module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert len([t for t in said if "starts again" in t]) == 1, said
    assert steps(tmp_path) == [12]  # at step 6 there is nothing but the new model yet
    last = manifests(tmp_path / "merges")[-1]
    assert all(s["first_step"] > CHANGED_AT for s in last["snapshots"])
    assert len(last["snapshots"]) > 2
    fresh = Net()
    change(fresh)
    load_merged(tmp_path / "merges" / "step=000000012", fresh)


def test_what_never_changes_is_never_said_to(tmp_path: Path) -> None:
    """New objects in the same places are no change: hooks put them there at every step."""

    class Swaps(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.spare.data = pl_module.spare.data.clone()
            pl_module.spare.requires_grad_(trainer.global_step % 2 == 0)

    _, said = train(tmp_path, merge(tmp_path), Swaps())
    assert not [t for t in said if "anew" in t]
    assert manifests(tmp_path / "merges")[-1]["snapshots"][0]["first_step"] == 1


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_only_the_files_of_the_model_as_it_is_stay(tmp_path: Path, storage: Any) -> None:
    buffer = BufferConfig(every_n_train_steps=2, update_every_n_steps=1, storage=storage)
    train(tmp_path, merge(tmp_path, buffer=buffer), Change(replace_head))
    first_steps = [int(p.name.split("-")[1]) for p in (tmp_path / "merges").glob("buffer/*.safetensors")]
    assert all(step > CHANGED_AT for step in first_steps)
    assert bool(first_steps) == (storage == "disk")


def test_lightnings_own_pruning_can_be_run(tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)
    trainer, said = train(tmp_path, merge(tmp_path), pruning, max_steps=-1, max_epochs=2)
    assert trainer.global_step == 2 * NUM_STEPS
    assert len([t for t in said if "starts again" in t]) == 1
    assert steps(tmp_path)[-1] == 2 * NUM_STEPS


class Save(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in (4, 8):
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


def test_runs_resume_from_before_and_after_a_change(tmp_path: Path) -> None:
    train(tmp_path, merge(tmp_path), Change(replace_head), Save())
    before = manifests(tmp_path / "merges")[-1]["snapshots"]
    train(tmp_path, merge(tmp_path), Save(), ckpt_path=tmp_path / "8.ckpt")
    after = manifests(tmp_path / "merges")[-1]["snapshots"]
    assert [(s["first_step"], s["last_step"]) for s in after] == [(s["first_step"], s["last_step"]) for s in before]
    assert after[0] == before[0]  # of step 7, from the disk
    train(tmp_path, merge(tmp_path), Change(replace_head), Save(), ckpt_path=tmp_path / "4.ckpt")
    assert manifests(tmp_path / "merges")[-1]["snapshots"][0]["first_step"] > CHANGED_AT


def test_a_checkpoint_of_another_model_is_resumed_with_an_empty_buffer(tmp_path: Path) -> None:
    train(tmp_path, merge(tmp_path), Save())
    module = Net()
    add_buffer(module)
    module.strict_loading = False
    _, said = train(tmp_path, merge(tmp_path), module=module, ckpt_path=tmp_path / "4.ckpt")
    assert len([t for t in said if "starts again" in t]) == 1, said


class Odd(Net):
    """Entries that cannot be averaged, and a layer whose weights get their shape from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.register_buffer("rows", torch.eye(4).to_sparse_csr())
        self.register_buffer("edges", torch.arange(4))
        self.register_buffer("packed", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
        self.lazy = nn.LazyLinear(4)

    def loss(self, x: Tensor, noise: float | Tensor = 0.0) -> Tensor:
        return super().loss(self.lazy(torch.sparse.mm(self.adjacency, x.T).T) + x, noise)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.05)


def test_what_cannot_be_averaged_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(tmp_path, merge(tmp_path), module=Odd(), num_sanity_val_steps=0)
    (line,) = [t for t in caplog.text.splitlines() if "not averaged" in t]
    assert all(name in line for name in ("adjacency", "rows", "edges", "packed", "lazy.weight"))
    assert steps(tmp_path)[-1] == NUM_STEPS
    fresh = Odd()
    fresh.lazy(torch.zeros(1, 4))
    load_merged(tmp_path / "merges" / f"step={NUM_STEPS:09d}", fresh)


class Unreadable(Tensor):
    """Looks like any other."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "foreach" in function.__name__:
            raise OSError("no way to read this")
        return super().__torch_function__(function, types, args, kwargs or {})


class Broken(Net):
    """From a step on, the buffer cannot read it."""

    def fail(self) -> None:
        self._buffers["average"] = torch.zeros(2).as_subclass(Unreadable)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(2))


def test_a_fault_of_the_buffer_ends_it_and_not_training(tmp_path: Path) -> None:
    trainer, said = train(tmp_path, merge(tmp_path, on_error="warn"), Change(Broken.fail), Save(), module=Broken())
    assert trainer.global_step == NUM_STEPS
    assert len([t for t in said if "no way to read this" in t]) == 1, said
    assert steps(tmp_path) == [4]
    _, said = train(tmp_path, merge(tmp_path), module=Broken(), ckpt_path=tmp_path / "8.ckpt")
    assert steps(tmp_path) == [4, 12]
    with pytest.raises(OSError, match="no way to read this"):
        train(tmp_path / "raise", merge(tmp_path / "raise"), Change(Broken.fail), module=Broken())


@pytest.mark.parametrize("saves", [False, True])
def test_a_fault_of_the_buffer_leaves_what_a_checkpoint_needs(tmp_path: Path, saves: bool) -> None:
    """Goes red if files that nothing refers to stay for ever, or if those that a checkpoint names are gone."""
    train(tmp_path, merge(tmp_path, on_error="warn"), Change(Broken.fail), *[Save()] * saves, module=Broken())
    found = {p.name for p in (tmp_path / "merges").glob("buffer/*.safetensors")}
    named: set[str] = set()
    if saves:
        state = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
        named = set(re.findall(r"[0-9a-f]{8}-\d{9}-\d{9}-\w+\.safetensors", str(state)))
        assert named
    assert found == named


class Moving(Net):
    """Gives its weights new memory in validation hooks, as EMA by pointers and some quantisers do."""

    def on_validation_start(self) -> None:
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()

    def on_validation_epoch_end(self) -> None:
        for path, module in self.named_modules():
            if path == "head":
                module.weight = nn.Parameter(module.weight.detach().clone())


def test_candidates_are_merged_into_the_memory_that_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and published weights are those of a model that keeps its memory."""
    monkeypatch.setattr(merge_plan, "MIN_FUSED_NUMEL", 1)

    def published(module: Any, root: Path) -> Any:
        callback = merge(root)
        train(root, callback, module=module, max_steps=4, num_sanity_val_steps=0)
        manifest = manifests(root / "merges")[0]
        fresh = Net()
        load_merged(root / "merges" / "step=000000004", fresh)
        return [t["search"] for t in [*manifest["anchors"], *manifest["trials"]]], fresh.state_dict()

    values, weights = published(Net(), tmp_path / "still")
    moved_values, moved_weights = published(Moving(), tmp_path / "moving")
    assert moved_values == values
    assert all(torch.equal(moved_weights[name], weights[name]) for name in weights)


class Scripts(Net):
    """Has submodules of TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Linear(4, 4))
        self.traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.zeros(2, 4))

    def loss(self, x: Tensor, noise: float | Tensor = 0.0) -> Tensor:
        return super().loss(self.traced(self.scripted(x)), noise)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_of_torchscript_are_merged(tmp_path: Path) -> None:
    """Goes red if a module of TorchScript is asked for what only a module's own dicts have."""
    trainer, said = train(tmp_path, merge(tmp_path), module=Scripts(), max_steps=4)
    assert (trainer.global_step, said) == (4, [])
    assert steps(tmp_path) == [4]
    load_merged(tmp_path / "merges" / "step=000000004", Scripts())


class Nameless(nn.Module):
    """Cannot even be looked at."""

    @property
    def _non_persistent_buffers_set(self) -> Any:
        raise OSError("no names here")

    @_non_persistent_buffers_set.setter
    def _non_persistent_buffers_set(self, value: Any) -> None:
        pass


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_run_that_cannot_be_set_up_is_trained_all_the_same(tmp_path: Path, on_error: Any) -> None:
    """Goes red if a fault before the first step ends `fit`, or if it is told twice, or never."""
    module = Net()
    module.odd = Nameless()
    raised = pytest.raises(OSError, match="no names") if on_error == "raise" else contextlib.nullcontext()
    with raised:
        trainer, said = train(tmp_path, merge(tmp_path, on_error=on_error), module=module, max_steps=4)
        assert trainer.global_step == 4
        assert len(said) == 1
        assert "setting it up failed. OSError: no names here. Training continues." in said[0]
        assert steps(tmp_path) == []


class Bank(Net):
    """Remembers all that it has seen, in a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 4))

    def training_step(self, x: Tensor) -> Tensor:
        self.bank = torch.cat([self.bank, x])
        return super().training_step(x)


def test_a_buffer_that_goes_on_growing_is_left_out(tmp_path: Path) -> None:
    """Goes red if each of its changes starts the buffer again, so that no search ever finds a snapshot."""
    _, said = train(tmp_path, merge(tmp_path), module=Bank())
    assert len(said) <= 2
    assert len([t for t in said if "'bank' changed again. From now on merges leave them out, as" in t]) == 1
    assert steps(tmp_path)[-1] == NUM_STEPS
