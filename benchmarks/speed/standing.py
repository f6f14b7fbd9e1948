"""What it takes to keep a run, to put it back, and to prove that, beside one validation of the example."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from gpt import GPT
from pretraining import GPTModule, StdlibData

from benchmarks.speed.rounds import Row, at_most, medians
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.distributed.comm import connect
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.plugin.restore.paused_run import PausedRun


class StandStill(pl.Callback):
    """Takes its times after the last step, when the optimizer's state is there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        ownership = Ownership(pl_module, connect())
        layout = TensorLayout(ownership.local())
        paused = PausedRun(trainer, ownership, layout)
        batches = list(getattr(trainer, "datamodule").val_dataloader())  # noqa: B009 - set where mypy cannot see it

        @torch.no_grad()
        def validate() -> None:
            for batch in batches:
                pl_module.loss(batch)

        def stand_still() -> None:
            with paused:
                pass

        with paused:  # which puts this callback back, too
            seconds = medians({"validate": validate, "begin": paused.begin, "prove": paused.prove})
        self.seconds = seconds | medians({"all": stand_still})
        assert paused.traces == []


def measure() -> Iterator[Row]:
    """Yield the rows of ``standstill``."""
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    callback = StandStill()
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            max_steps=4,
            accelerator="cpu",
            logger=False,
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1.0,
            num_sanity_val_steps=0,
            default_root_dir=root,
        )
        trainer.fit(GPTModule(GPT()), datamodule=StdlibData())
    seconds = callback.seconds
    of = "of one validation's forward passes"
    yield at_most(
        f"keep the example's run, put it back and prove it, once a search: time, {of}", _share(seconds, "all"), 1
    )
    yield at_most(f"put it back before an evaluation: time, {of}", _share(seconds, "begin"), 0.05)
    yield at_most(f"prove it once more, after a run's first evaluation: time, {of}", _share(seconds, "prove"), 0.5)


def _share(seconds: dict[str, float], name: str) -> float:
    return seconds[name] / seconds["validate"]
