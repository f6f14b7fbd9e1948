"""What training pays while an artifact is uploaded behind it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.speed.rounds import NUM_ROUNDS, Row, at_most
from benchmarks.speed.training import gpt_17m
from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
from lightning_ckmerge.artifact.upload import Uploader

NUM_BYTES = 1 << 30
MIN_STEPS = 20


def step_times(step: Callable[[], object], goes_on: Callable[[int], bool]) -> list[float]:
    """Return the seconds of each step, as long as ``goes_on`` of their number says so."""
    times: list[float] = []
    while goes_on(len(times)):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def measure() -> Iterator[Row]:
    """Yield the rows of ``upload``."""
    torch.set_num_threads(1)
    model = gpt_17m()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (2, 129))

    def step() -> None:
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    means, longest, longest_alone, seconds = [], [], [], []
    for _ in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as root:
            artifact = Path(root, "merges", "step=000000001")
            artifact.mkdir(parents=True)
            (artifact / "model.safetensors").write_bytes(bytes(NUM_BYTES))
            (artifact / MANIFEST_NAME).write_text("{}")
            alone = step_times(step, lambda num: num < MIN_STEPS)
            uploader = Uploader(artifact.parent, f"file://{root}/remote", print)
            uploader.sync()
            start, sent = time.perf_counter(), Path(root, "remote", artifact.name, MANIFEST_NAME)
            beside = step_times(step, lambda _, sent=sent: not sent.exists())  # type: ignore[misc]
            seconds.append(time.perf_counter() - start)
            uploader.close()
        median = statistics.median(alone)
        means.append(statistics.mean(beside) / median)
        longest.append(max(beside) / median)
        longest_alone.append(max(alone) / median)
    detail = f" ({statistics.median(longest_alone):.2f} without an upload; 1 GiB in {statistics.median(seconds):.1f} s)"
    what = "step beside an upload of 1 GiB to `file://`"
    yield at_most(f"{what}, mean, of the median step", statistics.median(means), 1.1)
    yield at_most(f"{what}, longest, of the median step", statistics.median(longest), 1.1, detail)
