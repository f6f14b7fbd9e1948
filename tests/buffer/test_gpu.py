"""The same buffer with weights on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_ckmerge.buffer import DiskStorage, MemoryStorage, RollingBuffer
from lightning_ckmerge.config import BufferConfig
from tests.buffer.runs import Run


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
