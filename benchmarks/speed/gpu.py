"""Merges into a GPU's memory, from snapshots in it, in pinned host memory and on the disk; means in host memory."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.merging import gpt2
from benchmarks.speed.rounds import Row, at_least, at_most, medians
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge_plan import MergePlan

NUM_STEPS = 30
# A step of a fifth of a second on a GPU of 500 TFLOP/s.
WIDTH, NUM_PRODUCTS = 8192, 100
KS = (2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16)
# Of the bandwidth of a copy within the device, and of one from pinned memory to it.
MEANS_TIME = "step with means in host memory, every 3rd step, of 124 M, beyond the step without: share"
MEANS_MEMORY = "memory on the device of means in host memory, of `buffer.bucket_size`"
TARGETS = {"device": 0.8, "pinned": 0.9, "disk": None}


def measure() -> Iterator[Row]:
    """Yield the rows of ``gpu``; without one, they say so."""
    if torch.cuda.is_available():
        yield Row(what="device", target="", measured=torch.cuda.get_device_name(), met=None)
        device = torch.device("cuda", torch.cuda.current_device())
        yield from measure_on(device)
        yield from measure_means(device)
        return
    for place, target in TARGETS.items():
        wanted = f">= {target:g}" if target else ""
        yield Row(what=f"merge on a GPU, snapshots: {place}", target=wanted, measured="not measured", met=None)
    for what, wanted in ((MEANS_TIME, "<= 0.01"), (MEANS_MEMORY, "<= 1")):
        yield Row(what=what, target=wanted, measured="not measured", met=None)


def measure_on(device: torch.device) -> Iterator[Row]:
    """Yield a row for each precision, number of snapshots and place where they lie."""
    for dtype in DTYPES:
        model = [OwnedTensor(name=f"{n:05}", role="parameter", tensor=torch.zeros(s)) for n, s in enumerate(gpt2())]
        layout = TensorLayout(model, dtype)
        target, pinned = layout.allocate(device), layout.allocate(pinned=device.type == "cuda")
        copies = {"device": layout.allocate(device)[dtype].normal_(), "pinned": pinned[dtype].normal_()}
        for place, wanted in TARGETS.items():
            with tempfile.TemporaryDirectory() as dirpath:
                storage = _storage(place, device, dirpath)
                source = copies["device" if place == "device" else "pinned"]
                for num in KS:
                    sources_KN = [_stored(storage, layout, k) for k in range(num)]
                    plan = MergePlan(layout.views(target), sources_KN, ["parameter"] * len(model))
                    copy = partial(target[dtype].copy_, source)
                    merge = partial(plan.merge, [1 / num] * num)
                    found = medians({"copy": _finished(copy, device), "merge": _finished(merge, device)})
                    # Within the device a copy reads and writes; over the link it is the reading that takes time.
                    moved = (num + 1) / 2 if place == "device" else num
                    speed = moved * found["copy"] / found["merge"]
                    what = f"merge {num} x 124 M, {str(dtype).removeprefix('torch.')}, snapshots: {place}; of a copy"
                    detail = f" ({moved * layout.num_bytes / found['merge'] / 1e9:.0f} GB/s)"
                    if wanted:
                        yield at_least(what, speed, wanted, detail)
                    else:
                        yield Row(what=what, target="", measured=f"{speed:.2f}{detail}", met=None)
                    del plan, sources_KN, merge
                    gc.collect()


def measure_means(device: torch.device) -> Iterator[Row]:
    """Yield rows of steps without means, with means beside the weights, and with means in host memory."""
    seconds, memory = {}, {}
    for name in ("none", "device", "host"):
        gc.collect()
        model = [torch.randn(shape, device=device) for shape in gpt2()]
        weights = [OwnedTensor(name=f"{n:05}", role="parameter", tensor=w) for n, w in enumerate(model)]
        layout = TensorLayout(weights)
        config = BufferConfig(accumulate_on="device" if name == "none" else name)  # type: ignore[arg-type]
        options = {"run_id": "0" * 8, "segment_steps": 1_000_000, "double_segments": False}
        buffer = RollingBuffer(config, layout, MemoryStorage(), device=device, **options)  # type: ignore[arg-type]
        live = layout.order(weights)
        before = torch.cuda.memory_allocated(device)

        train = partial(_train, live, None if name == "none" else buffer, count(1))
        seconds[name] = medians({name: _finished(train, device)})[name] / NUM_STEPS
        memory[name] = torch.cuda.memory_allocated(device) - before
        buffer.abandon()
        buffer.close()
    detail = (
        f" (steps of {seconds['none'] * 1e3:.0f} ms; beside the weights {seconds['device'] / seconds['none'] - 1:.3g})"
    )
    yield at_most(MEANS_TIME, seconds["host"] / seconds["none"] - 1, 0.01, detail)
    share = memory["host"] / parse_size(BufferConfig().bucket_size)
    yield at_most(
        MEANS_MEMORY, share, 1, f" ({memory['host'] / 1e6:.0f} MB; beside the weights {memory['device'] / 1e6:.0f})"
    )


def _train(live: list[Tensor], buffer: RollingBuffer | None, steps: Iterator[int]) -> None:
    for step in islice(steps, NUM_STEPS):
        work = torch.randn(WIDTH, WIDTH, device=live[0].device)
        for _ in range(NUM_PRODUCTS):  # the forward and backward pass
            work = torch.nn.functional.normalize(work @ work)
        torch._foreach_mul_(live, 0.999)  # the optimizer
        if buffer is not None:
            buffer.update(live, step)


def _storage(place: str, device: torch.device, dirpath: str) -> Storage:
    if place == "disk":
        return DiskStorage(Path(dirpath))
    return MemoryStorage(device if place == "device" else "cpu")


def _stored(storage: Storage, layout: TensorLayout, k: int) -> list[Tensor]:
    """Keep a snapshot as the buffer does, and return it as a search reads it."""
    name = f"00000000-{k:09}-{k:09}-mean.safetensors"
    values = torch.linspace(-1, 1 + k, layout.num_bytes // next(iter(layout.sizes)).itemsize)
    stored = storage.write(name, layout, [values.to(dtype) for dtype in layout.sizes])
    return layout.views(storage.read(stored, layout))


def _finished(method: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        method()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
