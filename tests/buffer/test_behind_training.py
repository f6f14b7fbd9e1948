"""What is written behind training, whose weights move meanwhile; also on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Stored
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import BLOCK_NUMEL
from tests.support.rolling import Run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["disk", "cpu", "device"])
@pytest.mark.parametrize("snapshot", ["mean", "point"])
def test_a_buffer_on_a_gpu_holds_what_one_on_the_cpu_holds(tmp_path: Path, storage: str, snapshot: str) -> None:
    """Goes red if the writer reads a running mean before the GPU has finished it."""
    run = Run()
    device = torch.device("cuda", torch.cuda.current_device())
    places = {"disk": DiskStorage(tmp_path), "cpu": MemoryStorage("cpu"), "device": MemoryStorage(device)}
    on_cpu = run.buffer(MemoryStorage(), snapshot=snapshot)
    on_gpu = RollingBuffer(
        BufferConfig(snapshot=snapshot, update_every_n_steps=1),
        run.layout,
        places[storage],
        device=device,
        run_id="0" * 8,
        segment_steps=5,
        double_segments=False,
    )
    for step in range(1, 100):
        weights = run.at(step)
        on_cpu.update(weights, step)
        on_gpu.update([w.to(device) for w in weights], step)
    for a, b in zip(on_gpu.snapshots(), on_cpu.snapshots(), strict=True):
        assert a.segment == b.segment
        torch.testing.assert_close([t.cpu() for t in a.tensors], b.tensors, rtol=1e-6, atol=1e-6, equal_nan=True)
    on_cpu.close(), on_gpu.close()


class SlowStorage(MemoryStorage):
    """Waits after each block until training has gone on."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.steps = threading.Semaphore(0)

    def write(self, name: str, layout: TensorLayout, blocks: Iterable[Tensor]) -> Stored:
        def slowly() -> Iterable[Tensor]:
            for block in blocks:
                assert self.steps.acquire(timeout=600)
                yield block

        return super().write(name, layout, slowly())


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ],
)
@pytest.mark.parametrize("snapshot", ["mean", "point"])
def test_a_snapshot_is_never_torn_by_the_optimizer(device: str, snapshot: str) -> None:
    """Goes red if the writer reads the weights, or a mean that still moves, while steps are taken."""
    weight = torch.nn.Parameter(torch.zeros(4 * BLOCK_NUMEL, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    storage = SlowStorage()
    buffer = RollingBuffer(
        BufferConfig(capacity=2, snapshot=snapshot, update_every_n_steps=1),
        TensorLayout([OwnedTensor(name="w", role="parameter", tensor=weight)]),
        storage,
        device=weight.device,
        run_id="0" * 8,
        segment_steps=5,
        double_segments=False,
    )
    for step in range(1, 11):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
        buffer.update([weight], step)
        if step > 5:  # one of the first segment's blocks is copied after each step of the second one
            storage.steps.release()
    storage.steps.release(4)
    first, second = buffer.snapshots()
    buffer.close()
    expected = {"mean": (3.0, 8.0), "point": (5.0, 10.0)}[snapshot]
    for taken, value in zip((first, second), expected, strict=True):
        torch.testing.assert_close(taken.tensors[0], torch.full((4 * BLOCK_NUMEL,), value), rtol=0, atol=1e-6)
