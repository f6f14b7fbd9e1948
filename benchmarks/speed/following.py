"""Training beside a follower against training without the callback, and the follower's time against a search inside."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from gpt import GPT
from pretraining import GPTModule, StdlibData

from benchmarks.speed.rounds import Row, at_most
from benchmarks.speed.training import StepTimes
from lightning_ckmerge import Artifact, BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.artifact.due import list_due, read_results

NUM_ROUNDS = 3
NUM_STEPS = 48
DUE = (30,)
BATCH = 4
EXAMPLES = Path(GPTModule.__init__.__code__.co_filename).parent


class StepSeconds(StepTimes):
    """Notes the processor's time of each step as well, in the training thread: other processes do not count in it."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = [time.thread_time()]

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.processor.append(time.thread_time())

    @property
    def processor_s(self) -> list[float]:
        """Processor seconds of each step but the first ones, which warm up."""
        return [b - a for a, b in zip(self.processor[5:], self.processor[6:], strict=False)]


class Noted(pl.Callback):
    """Notes when a due search was whole on the disk, and how long a search inside took."""

    def __init__(self, merge: CheckpointMergeCallback, *, inside: bool) -> None:
        self.merge = merge
        self.inside = inside
        self.started: dict[int, float] = {}
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in DUE:
            self.started[trainer.global_step] = time.time()
            start = time.perf_counter()
            artifact = self.merge.search_now()
            assert (artifact is not None) == self.inside
            self.seconds.append(time.perf_counter() - start)


def measure() -> Iterator[Row]:
    """Yield the rows of ``follower``."""
    torch.set_num_threads(1)
    steps: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    searches: dict[str, list[float]] = {}
    for _ in range(NUM_ROUNDS):
        for name in ("none", "means", "follower", "inside"):
            with tempfile.TemporaryDirectory() as root:
                times, waits, hooks_s = _fit(name, Path(root))
            steps.setdefault(name, []).append(statistics.mean(times.steps_s))
            processor.setdefault(name, []).append(statistics.mean(times.processor_s))
            searches.setdefault(name, []).extend(waits)
            searches.setdefault(f"{name}, hook", []).extend(hooks_s)
    step = {name: statistics.median(values) for name, values in steps.items()}
    worked = {name: statistics.median(values) for name, values in processor.items()}
    found = {name: statistics.median(values) for name, values in searches.items() if values}
    load = f"load {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    detail = f" (steps of {step['means'] * 1e3:.0f} ms; {load})"
    what = f"step beside a follower, a due search in {NUM_STEPS} steps, of a step with means alone"
    yield at_most(what, step["follower"] / step["means"], 1.01, detail)
    detail = f" ({worked['means'] * 1e3:.0f} ms)"
    yield at_most(f"{what}, processor time of the thread", worked["follower"] / worked["means"], 1.01, detail)
    measured = f"{step['follower'] / step['none']:.3g} (means alone {step['means'] / step['none']:.3g})"
    yield Row(what="step beside a follower, of a step without the callback", target="", measured=measured, met=None)
    detail = f" ({found['follower']:.1f} s and {found['inside']:.1f} s)"
    what = "from a due search to a follower's artifact, time, of a search inside"
    yield at_most(what, found["follower"] / found["inside"], 1.1, detail)
    measured = f"{found['follower, hook'] * 1e3:.1f} ms"
    yield Row(what="leaving a due search of 1.1 M parameters, in the hook", target="", measured=measured, met=None)


def _fit(name: str, root: Path) -> tuple[StepSeconds, list[float], list[float]]:
    """Train, and return the times of steps, the seconds of searches from due to done, and those in their hook."""
    where: Any = "follower" if name == "follower" else "training"
    search = SearchConfig(max_fraction_of_training=None, at_low_lr="search", where=where)  # the rate is rising still
    merge = CheckpointMergeCallback(
        dirpath=root / "merges",
        every_n_train_steps=10 * NUM_STEPS,
        search_on_train_end=False,
        buffer=BufferConfig(every_n_train_steps=5),
        search=search,
        on_error="raise",
    )
    noted, times = Noted(merge, inside=name == "inside"), StepSeconds()
    callbacks: list[pl.Callback] = [] if name == "none" else [merge]
    callbacks += [noted] if name in ("follower", "inside") else []
    follower = _follow(root) if name == "follower" else None
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, times],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0 if name in ("none", "means") else 1.0,
        num_sanity_val_steps=0,
        val_check_interval=NUM_STEPS,
        check_val_every_n_epoch=None,
        default_root_dir=root,
    )
    trainer.fit(GPTModule(GPT()), datamodule=StdlibData(BATCH))
    if follower is None:
        return times, noted.seconds, noted.seconds
    if follower.wait():
        raise RuntimeError("the follower has failed")
    published = [r for r in read_results(root / "merges").values() if r.artifact is not None]
    waits = [
        (root / "merges" / str(r.artifact) / "manifest.json").stat().st_mtime - noted.started[r.step] for r in published
    ]
    assert waits
    assert not list_due(root / "merges")
    assert all(Artifact.open(root / "merges" / str(r.artifact)).manifest["due"] == r.due for r in published)
    return times, waits, noted.seconds


def _follow(root: Path) -> subprocess.Popen[bytes]:
    """Start a follower, and return it once it is waiting for the run."""
    init_args = {
        "dirpath": str(root / "merges"),
        "buffer": {"every_n_train_steps": 5},
        "search": {"max_fraction_of_training": None, "at_low_lr": "search", "where": "follower"},
    }
    merge = {"class_path": "lightning_ckmerge.CheckpointMergeCallback", "init_args": init_args}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": NUM_STEPS, "callbacks": [merge]},
        "model": {"class_path": "pretraining.GPTModule", "init_args": {"gpt": {"class_path": "gpt.GPT"}}},
        "data": {"class_path": "pretraining.StdlibData", "init_args": {"batch_size": BATCH}},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    program = "from lightning_ckmerge.cli.main import app; app()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(EXAMPLES)])}
    command = [sys.executable, "-c", program, "follow", str(root / "merges"), "--config", str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    while (line := process.stdout.readline()) and not line.startswith(b"following"):
        pass
    # What it says from now on must not fill the pipe.
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process
