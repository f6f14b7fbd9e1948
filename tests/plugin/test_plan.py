"""The plan that ``fit`` prints, the one that ``ckmerge plan`` prints, and the run itself agree."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.plugin.plan import Plan, forecast, render_plan
from tests.support.models import points_loader
from tests.support.trainers import make_trainer
from tests.support.warnings import only_expected

# An epoch of the training loader.
BATCHES = 10


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0][:, :4]), batch[1] % 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Tiny):
    """Two optimizers, each of which Lightning counts."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.training:
            first, second = self.optimizers()  # type: ignore[misc]
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]


class PointsData(pl.LightningDataModule):
    def __init__(self, unsized: str = "") -> None:
        super().__init__()
        self._unsized = unsized

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def _loader(self, stage: str) -> DataLoader[Any]:
        return points_loader(train=stage == "train", iterable=self._unsized == stage)


class PlanReader(pl.Callback):
    """Keeps the plan that ``fit`` printed."""

    plan: Plan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback: Any = next(c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback))  # type: ignore[attr-defined]
        self.plan = callback._run.plan


TRAINERS: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 12, "limit_train_batches": BATCHES},
    "epochs": {"max_epochs": 3, "limit_train_batches": BATCHES},
    "both": {"max_epochs": 3, "max_steps": 14, "limit_train_batches": 6},
    "accumulated": {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_train_batches": BATCHES},
    "accumulation by epoch": {"max_epochs": 3, "limit_train_batches": BATCHES, "scheduling": {1: 2, 2: 4}},
    "accumulation by epoch and steps": {"max_steps": 16, "limit_train_batches": BATCHES, "scheduling": {1: 2}},
    "a share of the batches": {"max_epochs": 2, "limit_train_batches": 0.4, "limit_val_batches": 0.5},
}
TRIGGERS: dict[str, dict[str, Any]] = {
    "default": {},
    "steps": {"every_n_train_steps": 8},
    "steps that end with the run": {"every_n_train_steps": 6},
    "epochs": {"every_n_epochs": 2},
    "not at the end": {"every_n_train_steps": 5, "search_on_train_end": False},
    "quarters but the last": {"search_on_train_end": False},
    "time": {"train_time_interval": timedelta(hours=1)},
}
CASES = [
    *((length, "default") for length in TRAINERS),
    *(("steps", trigger) for trigger in TRIGGERS if trigger != "default"),
    ("both", "epochs"),
    ("accumulation by epoch", "epochs"),
    ("accumulation by epoch", "steps"),
]


def make(root: Path, trainer: dict[str, Any], merge: dict[str, Any]) -> tuple[pl.Trainer, CheckpointMergeCallback]:
    callback = CheckpointMergeCallback(
        dirpath=root,
        buffer=BufferConfig(every_n_train_steps=1),
        search=SearchConfig(n_trials=1, anchors=[], space="decay", max_fraction_of_training=None),
        evaluation=EvaluationConfig(limit_batches=2),
        save_top_k=0,
        **merge,
    )
    options = dict(trainer)
    scheduling = options.pop("scheduling", None)
    callbacks = [callback, PlanReader(), *([GradientAccumulationScheduler(dict(scheduling))] if scheduling else [])]
    return make_trainer(None, *callbacks, num_sanity_val_steps=0, **options), callback


def both_plans(root: Path, trainer: dict[str, Any], merge: dict[str, Any], module: Any, unsized: str = "") -> Plan:
    """Train, and return the plan, which must have been the same without a run."""
    made, callback = make(root, trainer, merge)
    before = forecast(callback.settings, made, module(), PointsData(unsized))
    made, _ = make(root, trainer, merge)
    with only_expected():
        made.fit(module(), datamodule=PointsData(unsized))
    reader = next(c for c in made.callbacks if isinstance(c, PlanReader))  # type: ignore[attr-defined]
    told, planned = asdict(reader.plan), asdict(before)
    assert {**planned, "free_disk": None} == {**told, "free_disk": None}
    if before.total_steps is not None:
        assert made.global_step == before.total_steps
    return before


@pytest.mark.parametrize(("length", "trigger"), CASES)
def test_both_plans_and_the_run_agree(tmp_path: Path, length: str, trigger: str) -> None:
    merge = TRIGGERS[trigger]
    plan = both_plans(tmp_path, TRAINERS[length], merge, Tiny)
    searches = len(read_timeline(tmp_path))
    assert plan.num_searches == (None if trigger == "time" else searches)
    assert searches >= 1
    assert (plan.share is None) is (trigger == "time")


def test_optimizers_stepped_by_hand_are_counted(tmp_path: Path) -> None:
    plan = both_plans(tmp_path, {"max_epochs": 2, "limit_train_batches": 5}, {"every_n_train_steps": 8}, ByHand)
    assert plan.total_steps == 20
    assert plan.num_searches == len(read_timeline(tmp_path)) == 3


@pytest.mark.parametrize("unsized", ["train", "val"])
def test_a_loader_without_a_length_is_planned_as_such(tmp_path: Path, unsized: str) -> None:
    trainer = {"max_epochs": 1} if unsized == "train" else {"max_steps": 6}
    plan = both_plans(tmp_path, trainer, {}, Tiny, unsized)
    assert (plan.total_steps is None) is (unsized == "train")
    assert plan.num_searches == len(read_timeline(tmp_path))
    assert ("at the end only" in plan.when) is (unsized == "train")


def test_the_text_tells_of_the_last_search(tmp_path: Path) -> None:
    """600 steps with a search every 400 are two searches, the second at the end."""
    trainer, callback = make(tmp_path, {"max_steps": 600}, {"every_n_train_steps": 400})
    plan = forecast(callback.settings, trainer, Tiny(), PointsData())
    assert "searches                    2: every 400 steps and at the end" in render_plan(plan)
    assert plan.interval == 400


def test_the_text_tells_of_names_that_set_no_groups_apart(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, {"max_steps": 600}, {})
    plans = {
        space: forecast(
            CheckpointMergeCallback(search=SearchConfig(space=space)).settings, trainer, Tiny(), PointsData()
        )
        for space in ("grouped", "decay")
    }
    assert plans["grouped"].groups is not None
    assert plans["grouped"].groups.startswith("none found")
    assert plans["decay"].groups is None
