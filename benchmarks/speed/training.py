"""What a run pays for its buffer: means against Lightning's own averaging, writing behind training, bytes on disk."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gpt import GPT
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.profilers import SimpleProfiler
from pretraining import GPTModule, StdlibData
from torch.utils.data import DataLoader

from benchmarks.speed.rounds import NUM_ROUNDS, Row, at_most
from lightning_ckmerge import BufferConfig, CheckpointMergeCallback

NUM_STEPS = 40
CAPACITY = 4
HOOK = "on_train_batch_end"


class SmallBatches(StdlibData):
    """Two windows a batch: averaging weighs most where steps are short."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(self.train, 2, shuffle=True, drop_last=True)


class StepTimes(pl.Callback):
    """Notes how long each step took, other callbacks included."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def steps_s(self) -> list[float]:
        """Seconds of each step but the first ones, which warm up."""
        return [b - a for a, b in zip(self.times[5:], self.times[6:], strict=False)]


def gpt_17m() -> GPT:
    """Return a GPT of 17 M parameters."""
    return GPT(num_layers=5, num_heads=4, width=528)


def merge_callback(root: str, steps: int, updates: int, storage: str = "disk") -> CheckpointMergeCallback:
    """Return a callback that keeps its buffer and never searches."""
    return CheckpointMergeCallback(
        dirpath=root,
        every_n_train_steps=1_000_000,
        search_on_train_end=False,
        buffer=BufferConfig(
            every_n_train_steps=steps,
            update_every_n_steps=updates,
            capacity=CAPACITY,
            storage=storage,  # type: ignore[arg-type]
        ),
    )


def fit(root: str, callbacks: list[pl.Callback]) -> tuple[list[float], dict[str, list[float]]]:
    """Train, and return the seconds of each step and those of each profiled action."""
    pl.seed_everything(1, verbose=False)
    times, profiler = StepTimes(), SimpleProfiler()
    trainer = pl.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, times],
        profiler=profiler,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=root,
    )
    trainer.fit(GPTModule(gpt_17m()), datamodule=SmallBatches())
    return times.steps_s, profiler.recorded_durations


def measure_means() -> Iterator[Row]:
    """Yield the rows of ``means``."""
    torch.set_num_threads(1)
    default = BufferConfig().update_every_n_steps
    steps: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as root:
            callbacks: dict[str, list[pl.Callback]] = {
                "none": [],
                "ours": [merge_callback(root, 10 * NUM_STEPS, 1)],
                "default": [merge_callback(root, 10 * NUM_STEPS, default)],
                "lightning": [EMAWeightAveraging()],
            }
            for name, given in callbacks.items():
                steps_s, actions = fit(root, given)
                steps.setdefault(name, []).append(statistics.mean(steps_s))
                hooks = [
                    a for a in actions if HOOK in a and ("CheckpointMergeCallback" in a or "EMAWeightAveraging" in a)
                ]
                hook_s = sum(sum(actions[a]) for a in hooks)
                shares.setdefault(name, []).append(hook_s / NUM_STEPS / statistics.mean(steps_s))
    step = {name: statistics.median(values) for name, values in steps.items()}
    share = {name: statistics.median(values) for name, values in shares.items()}
    ratio = share["ours"] / share["lightning"]
    detail = f" ({share['ours']:.1%} and {share['lightning']:.1%} of a step of {step['none'] * 1e3:.0f} ms)"
    yield at_most("mean of every step, time in the hook, of `EMAWeightAveraging`'s", ratio, 0.2, detail)
    what = f"mean of every {default} steps, the default, time in the hook, of training"
    yield at_most(what, share["default"], 0.01)
    for name, title in (("default", "the default"), ("ours", "every step"), ("lightning", "`EMAWeightAveraging`")):
        measured = f"{step[name] / step['none'] - 1:+.1%}"
        yield Row(what=f"whole run, {title}, beyond no callback", target="", measured=measured, met=None)


def measure_writing() -> Iterator[Row]:
    """Yield the rows of ``writing``."""
    torch.set_num_threads(1)
    ratios, longest, share = [], [], 0.0
    for _ in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as root:
            # One segment of ten steps is written while the next one trains.
            steps_s, _ = fit(root, [merge_callback(root, 10, 1)])
            median = statistics.median(steps_s)
            # Steps are counted from the sixth; a segment ends with every tenth.
            closing = [steps_s[i] for s in range(9, NUM_STEPS, 10) for i in (s - 5, s - 4) if i < len(steps_s)]
            ratios.append(statistics.mean(closing) / median)
            longest.append(max(closing) / median)
            model_bytes = 4 * sum(p.numel() for p in gpt_17m().parameters())
            share = sum(f.stat().st_size for f in Path(root).rglob("*.safetensors")) / (CAPACITY * model_bytes)
    what = "step that closes a segment and step beside the writing"
    yield at_most(f"{what}, mean, of the median step", statistics.median(ratios), 1.1)
    measured = f"{statistics.median(longest):.2f}"
    yield Row(what=f"{what}, longest of a run, of the median step", target="", measured=measured, met=None)
    yield at_most("bytes on disk after a run, of `capacity` snapshots", share, 1.01)
