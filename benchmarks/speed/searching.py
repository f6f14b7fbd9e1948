"""A search of 16 trials on the example, beside its own forward passes."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from gpt import GPT
from pretraining import GPTModule, StdlibData
from torch import Tensor

from benchmarks.speed.rounds import Row, at_most
from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig

NUM_STEPS = 60
NUM_SEARCHES = 3


class Clock:
    """Adds up seconds in class attributes, which the guard around a search does not put back."""

    forward_s = 0.0


class TimedModule(GPTModule):
    """The example's module, whose forward passes are timed."""

    def loss(self, windows_BT: Tensor) -> Tensor:
        start = time.perf_counter()
        loss = super().loss(windows_BT)
        Clock.forward_s += time.perf_counter() - start
        return loss


class SearchOnce(pl.Callback):
    """Searches after the last step, as the callback itself would, with the clock running."""

    def __init__(self, merge: CheckpointMergeCallback) -> None:
        self.merge = merge
        self.overhead = math.nan

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        Clock.forward_s = 0.0
        start = time.perf_counter()
        artifact = self.merge.search_now()
        seconds = time.perf_counter() - start
        assert artifact is not None
        self.overhead = seconds / Clock.forward_s - 1


def measure() -> Iterator[Row]:
    """Yield the rows of ``search``."""
    torch.set_num_threads(1)
    for staged, which in ((False, "all batches for each"), (True, "losers dropped early, the default")):
        overheads = [_overhead(staged) for _ in range(NUM_SEARCHES)]
        what = f"search of 16 trials on the example, {which}: time beyond its forward passes, of these"
        yield at_most(what, statistics.median(overheads), 0.05)


def _overhead(staged: bool) -> float:
    pl.seed_everything(1, verbose=False)
    module = TimedModule(GPT())
    with tempfile.TemporaryDirectory() as root:
        merge = CheckpointMergeCallback(
            dirpath=root,
            every_n_train_steps=10 * NUM_STEPS,
            search_on_train_end=False,
            buffer=BufferConfig(every_n_train_steps=5),
            search=SearchConfig(max_fraction_of_training=None),
            evaluation=EvaluationConfig(staged=staged),
            on_error="raise",
        )
        once = SearchOnce(merge)
        trainer = pl.Trainer(
            max_steps=NUM_STEPS,
            accelerator="cpu",
            logger=False,
            callbacks=[merge, once],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1.0,
            num_sanity_val_steps=0,
            default_root_dir=root,
        )
        trainer.fit(module, datamodule=StdlibData())
    return once.overhead
