"""Training with the callback equals training without it, bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ckmerge import ArtifactConfig, BufferConfig, EvaluationConfig, SearchConfig
from lightning_ckmerge.config import AdapterMerge
from tests.support.bitwise import Case, assert_same_run
from tests.support.language import Adapted, MergesToValidate
from tests.support.models import (
    Classifier,
    Points,
    TinyGPT,
    TwoOptimizers,
    points_loader,
    tokens_loader,
)
from tests.support.trainers import NUM_TRIALS, SearchNow, manifests, merge_callbacks

train_tokens, val_tokens = partial(tokens_loader, train=True), partial(tokens_loader, train=False)
MODELS = {
    "mlp": Case(),
    "gpt": Case(model=TinyGPT, train=train_tokens, val=val_tokens),
}


def search_late() -> list[pl.Callback]:
    """Search at the ends of validations after the first segment's end."""
    return [SearchNow(min_step=3)]


NEVER = {"every_n_epochs": 100}
ONCE = {"every_n_train_steps": 8}
MOMENTS: dict[str, dict[str, Any]] = {
    "batch end": {"merge": {"every_n_train_steps": 5}},
    "epoch end": {"merge": {"every_n_epochs": 1}},
    "validation end": {"merge": NEVER, "searching": search_late},
    "train end": {"merge": {"every_n_epochs": 100, "search_on_train_end": True}},
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("model", MODELS)
def test_searches_at_any_moment_leave_no_trace(model: str, moment: str, tmp_path: Path) -> None:
    case = Case(**{**vars(MODELS[model]), **MOMENTS[moment]})
    run = assert_same_run(case, tmp_path, min_searches=1 if moment == "train end" else 2)
    if model == "gpt":
        assert run.module.model.lm_head.weight is run.module.model.transformer.wte.weight


def val(**options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: points_loader(train=False, **options)


def train(**options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: points_loader(train=True, **options)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


class Pairs(Classifier):
    """Validates on one batch of each of two loaders at a time."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step([torch.cat(part) for part in zip(batch["a"], batch["b"], strict=True)], batch_idx)


class Jitter:
    """A collate function with random numbers of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.1 * self.rng.random(), y


def jittering_closure() -> Callable[[list[Any]], Any]:
    rng = random.Random(7)

    def collate(samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x + 0.1 * rng.random(), y

    return collate


LOADERS: dict[str, dict[str, Any]] = {
    "workers, random": {"val": val(num_workers=2, noise="global"), "merge": ONCE},
    "persistent workers, random": {
        "val": val(num_workers=2, noise="global", persistent_workers=True),
        "merge": ONCE,
    },
    "persistent workers, own random": {
        "val": val(num_workers=1, noise="own", persistent_workers=True),
        "merge": ONCE,
    },
    "random": {"val": val(noise="global"), "train": train(noise="global")},
    "own random": {"val": val(noise="own"), "train": train(noise="own")},
    "shuffled, own generator": {"val": lambda: points_loader(train=False, shuffle=True, generator=own_generator())},
    "shuffled, global generator": {"val": val(shuffle=True, noise="global")},
    "random collate object": {"val": lambda: points_loader(train=False, collate_fn=Jitter())},
    "random collate closure": {"val": lambda: points_loader(train=False, collate_fn=jittering_closure())},
    "random collate partial": {
        "val": lambda: points_loader(train=False, collate_fn=partial(Jitter.__call__, Jitter()))
    },
    "iterable": {"val": val(iterable=True, noise="own")},
    "iterable, limited": {"val": val(iterable=True), "trainer": {"limit_val_batches": 8}},
    "iterable, workers": {"val": val(iterable=True, num_workers=1), "merge": ONCE},
    "several in one batch": {
        "model": Pairs,
        "val": lambda: CombinedLoader(
            {"a": points_loader(train=False, noise="own"), "b": points_loader(train=False, shuffle=True)}, "min_size"
        ),
    },
    "several": {
        "val": lambda: [points_loader(train=False), points_loader(train=False, noise="own", shuffle=True)],
        "merge": {"monitor": "val_loss/dataloader_idx_1"},
    },
    "without batches of indices": {"val": lambda: DataLoader(Points(30, 2), batch_size=None, collate_fn=lone_sample)},
}


def lone_sample(sample: Any) -> Any:
    x, y = sample
    return x[None], y[None]


@pytest.mark.parametrize("name", LOADERS)
def test_validation_data_stay_in_step(name: str, tmp_path: Path) -> None:
    """Goes red if a search takes random numbers from a generator, a dataset or a worker that the run goes on using."""
    once = LOADERS[name].get("merge") is ONCE
    assert_same_run(Case(**LOADERS[name]), tmp_path, min_searches=1 if once else 2)


class Loaders(pl.LightningDataModule):
    """A datamodule with state of its own, which changes whenever a batch passes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_batches = 0
        self.shift = torch.zeros(())

    def train_dataloader(self) -> Any:
        return points_loader(train=True)

    def val_dataloader(self) -> Any:
        return points_loader(train=False)

    def more_data(self) -> Any:
        return points_loader(train=False, noise="own", shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_batches += 1
        self.shift += 0.001
        x, y = batch
        return x + self.shift + 0.001 * self.num_batches, y


class Averaged(EMAWeightAveraging):
    """Averages from the first step on."""

    def __init__(self) -> None:
        super().__init__(decay=0.5)


def averaged() -> list[pl.Callback]:
    return [Averaged()]


class Compiled(Classifier):
    """One block is compiled; dynamo guards on modes and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(torch.compile(self.net[0], backend="eager"), *self.net[1:])


def spectral(*shape: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(*shape))


def weight_norm(*shape: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(*shape))


def hooked_weight_norm(*shape: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old one is what the case is about
        return nn.utils.weight_norm(nn.Linear(*shape))


class Careless(Classifier):
    """Counts on gradients being off in validation: what it moves there depends on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.moved)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.moved += loss
        self.scale *= 1 + 0.01 * loss
        return loss


class OnPlateau(Classifier):
    """A monitor that the scheduler and the stopping follow."""

    def __init__(self) -> None:
        super().__init__(scheduler="plateau")


def checkpoints_by_score() -> ModelCheckpoint:
    return ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True, filename="{step}-{val_loss:.6f}")


TRAINERS: dict[str, dict[str, Any]] = {
    "accumulation": {"trainer": {"accumulate_grad_batches": 3, "max_epochs": 4}, "merge": {"every_n_train_steps": 3}},
    "search while gradients accumulate": {
        "trainer": {"accumulate_grad_batches": 4, "max_epochs": 4, "val_check_interval": 3},
        "merge": NEVER,
        "searching": search_late,
    },
    "clipping": {"trainer": {"gradient_clip_val": 0.1}},
    "plateau": {"model": OnPlateau},
    "early stopping": {
        "model": OnPlateau,
        "trainer": {"max_epochs": 6},
        "callbacks": lambda: [EarlyStopping("val_loss", patience=1, min_delta=0.01)],
    },
    "checkpoints by score": {"callbacks": lambda: [checkpoints_by_score()]},
    "ema": {"callbacks": averaged},
    "ema, at validation end": {"callbacks": averaged, "searching": search_late, "merge": NEVER},
    "swa": {
        "callbacks": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)],
        "model": partial(Classifier, scheduler=None),
        "trainer": {"max_epochs": 4},
    },
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "bf16-true": {
        "trainer": {"precision": "bf16-true"},
        "model": TinyGPT,
        "train": train_tokens,
        "val": val_tokens,
    },
    "two optimizers by hand": {"model": TwoOptimizers, "merge": {"every_n_train_steps": 9}},
    "compiled block": {"model": Compiled},
    "val_check_interval": {"trainer": {"val_check_interval": 0.5}},
    "check_val_every_n_epoch": {"trainer": {"check_val_every_n_epoch": 2}},
    "validation by batches": {"trainer": {"check_val_every_n_epoch": None, "val_check_interval": 7}},
    "reloaded": {"trainer": {"reload_dataloaders_every_n_epochs": 1}, "datamodule": Loaders},
    "no validation before": {"trainer": {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}},
    "own data only": {
        "trainer": {"limit_val_batches": 0},
        "datamodule": Loaders,
        "merge": {"evaluation": EvaluationConfig(dataloader="more_data")},
    },
    "own data beside": {"datamodule": Loaders, "merge": {"evaluation": EvaluationConfig(dataloader="more_data")}},
    "overfit": {"trainer": {"overfit_batches": 2, "max_epochs": 6}},
    "datamodule": {"datamodule": Loaders},
    "spectral norm": {"model": partial(Classifier, block=spectral)},
    "weight norm": {"model": partial(Classifier, block=weight_norm)},
    "hooked weight norm": {"model": partial(Classifier, block=hooked_weight_norm)},
    "recalibration": {
        "train": train(noise="own"),
        "merge": {"evaluation": EvaluationConfig(recalibrate_batches=3)},
    },
    "points in memory": {"merge": {"buffer": BufferConfig(every_n_train_steps=2, snapshot="point", storage="cpu")}},
    "every format": {"merge": {"artifact": ArtifactConfig(formats=("safetensors", "ckpt"))}},
    "tqdm": {"trainer": {"enable_progress_bar": True}, "callbacks": lambda: [pl.callbacks.TQDMProgressBar()]},
    "rich": {"trainer": {"enable_progress_bar": True}, "callbacks": lambda: [pl.callbacks.RichProgressBar()]},
    **{
        f"{name} {kind}": {
            "model": model,
            "train": train_tokens,
            "val": val_tokens,
            "merge": {"artifact": ArtifactConfig(formats=("safetensors", "hf"), adapters=kind)},
        }
        for kind in get_args(AdapterMerge)
        for name, model in {"lora": Adapted, "lora, merged to validate,": MergesToValidate}.items()
    },
    "fit's own interval": {"merge": {"every_n_train_steps": None}},
}


REFINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt": vars(MODELS["gpt"]),
    "careless": {"model": Careless},
    "several loaders": LOADERS["several"],
    **{
        name: TRAINERS[name]
        for name in (
            "search while gradients accumulate",
            "bf16-mixed",
            "bf16-true",
            "two optimizers by hand",
            "compiled block",
            "spectral norm",
            "hooked weight norm",
            "recalibration",
            "lora factors",
        )
    },
}


@pytest.mark.parametrize("name", REFINED)
def test_gradients_of_a_search_leave_no_trace(name: str, tmp_path: Path) -> None:
    """Goes red if a search puts anything into ``.grad``, or leaves a graph in what validation steps write."""
    case = REFINED[name]
    search = SearchConfig(n_trials=NUM_TRIALS, refine="gradient", max_fraction_of_training=None)
    run = assert_same_run(
        Case(**{**case, "merge": {**case.get("merge", {}), "search": search}}), tmp_path, min_searches=1
    )
    (callback,) = merge_callbacks(run.trainer)
    names = [t["name"] for m in manifests(callback._resolved_dirpath) for t in m["trials"]]
    assert "refined-0" in names


@pytest.mark.parametrize("name", TRAINERS)
def test_features_of_the_trainer_work_as_before(name: str, tmp_path: Path) -> None:
    assert_same_run(Case(**TRAINERS[name]), tmp_path, min_searches=2)
