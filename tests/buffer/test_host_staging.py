"""Means in host memory: the same bits as beside the weights, through little memory, and never torn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.buffer import segment_mean
from lightning_ckmerge.buffer.host_staging import HostStaging, cut_layout, num_staged_bytes
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.segment_mean import SegmentMean
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import BLOCK_NUMEL
from tests.support.rolling import Run, assert_same

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@settings(max_examples=20)
@given(
    num_updates=st.integers(1, 12),
    update_every_n_steps=st.integers(1, 4),
    bucket_bytes=st.integers(60, 2000),
    snapshot=st.sampled_from(["mean", "point"]),
)
def test_they_have_the_bits_of_means_beside_the_weights(
    num_updates: int, update_every_n_steps: int, bucket_bytes: int, snapshot: str
) -> None:
    run, found = Run(), []
    options = {"capacity": 3, "snapshot": snapshot, "update_every_n_steps": update_every_n_steps}
    for place in ("device", "host"):
        buffer = run.buffer(MemoryStorage(), accumulate_on=place, bucket_size=f"{bucket_bytes}B", **options)
        run.train(buffer, range(1, num_updates + 1))
        found.append(buffer.snapshots())
        buffer.close()
    assert_same(*found)


def test_a_long_segment_in_host_memory_goes_on_after_a_restart_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the second accumulator, and through a checkpoint of the segment in progress."""
    monkeypatch.setattr(segment_mean, "MAX_UPDATES", 20)
    run, end = Run(), 50
    whole = run.buffer(DiskStorage(tmp_path / "whole"), segment_steps=end)
    parts = run.buffer(DiskStorage(tmp_path / "parts"), segment_steps=end, accumulate_on="host", bucket_size="64B")
    after = run.buffer(DiskStorage(tmp_path / "parts"), segment_steps=end, accumulate_on="host", run_id="ffffffff")
    for buffer in (whole, parts):
        run.train(buffer, range(1, 35))
    whole.state_dict()  # which pools, too
    after.load_state_dict(parts.state_dict())
    parts.close()
    for buffer in (whole, after):
        run.train(buffer, range(35, end))
    assert_same(after.snapshots(), whole.snapshots())
    assert not after.take_warnings()
    whole.close(), after.close()


@given(num_bytes=st.integers(1, 400).map(lambda n: 16 * n))
def test_buckets_hold_every_element_once_and_no_more_than_a_slot(num_bytes: int) -> None:
    layout = Run().layout
    seen = [torch.zeros(slot.numel, dtype=torch.long) for slot in layout.slots]
    for bucket in cut_layout(layout, num_bytes):
        assert 0 < sum(bucket.numels) * bucket.dtype.itemsize <= num_bytes
        for n, start, stop in bucket.parts:
            assert layout.slots[n].dtype == bucket.dtype
            seen[n][start:stop] += 1
    assert all(bool((times == 1).all()) for times in seen)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mean_is_never_torn_by_a_step_during_the_copy(device: str) -> None:
    """Goes red if the thread reads the live weights, or a state that the next one overwrites."""
    weight = torch.zeros(4 * BLOCK_NUMEL, device=device)
    layout = TensorLayout([OwnedTensor(name="w", role="parameter", tensor=weight)])
    staging = HostStaging(layout, weight.device, BLOCK_NUMEL)  # eight slots' worth
    mean, changed = SegmentMean(layout.allocate, layout.views), threading.Semaphore(0)

    def take_late(weights: Sequence[Tensor]) -> None:
        assert changed.acquire(timeout=600)
        mean.take(weights)

    for step in range(1, 6):
        weight.fill_(step)
        staging.send([weight], take_late)
        weight.fill_(-1000.0)  # the optimizer's next step, before anything was averaged
        changed.release()
    staging.wait()
    staging.close()
    torch.testing.assert_close(mean.read()[torch.float32], torch.full((4 * BLOCK_NUMEL,), 3.0), rtol=0, atol=0)


def test_a_mean_that_could_not_be_updated_is_an_error_of_the_next_update() -> None:
    """Goes red if an update is lost in silence: ranks would go on with other means."""
    run = Run()
    buffer = run.buffer(MemoryStorage(), accumulate_on="host")

    def fail(_: Sequence[Tensor]) -> None:
        raise MemoryError("no host memory")

    run.train(buffer, range(1, 2))
    buffer.flush()
    buffer._mean.take = fail  # type: ignore[method-assign]
    run.train(buffer, range(2, 3))
    for _ in range(2):  # whoever hears it first
        with pytest.raises(MemoryError, match="no host memory"):
            buffer.snapshots()
    with pytest.raises(MemoryError, match="no host memory"):
        run.train(buffer, range(3, 4))
    buffer.abandon()  # and is over with the segment
    run.train(buffer, range(4, 6))
    (snapshot,) = buffer.snapshots()
    assert snapshot.segment.num_updates == 2
    buffer.close()


@pytest.mark.parametrize("max_bytes", [1, 1000, 1 << 20])
def test_the_device_holds_the_staging_alone(max_bytes: int) -> None:
    run = Run()
    staging = HostStaging(run.layout, torch.device("cpu"), max_bytes)
    staging.send(run.at(1), lambda _: None)
    staging.wait()
    found = sum(slot.nbytes for slot in staging._slots)
    assert found == num_staged_bytes(run.layout.num_bytes, max_bytes)
    assert found <= max(32, min(max_bytes, run.layout.num_bytes + 32))
    staging.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_stays_but_the_staging() -> None:
    """And means equal those that the CPU takes of the same weights, bit for bit: the same arithmetic, on the host."""
    run, device = Run(), torch.device("cuda", torch.cuda.current_device())
    options: dict[str, Any] = {"run_id": "0" * 8, "segment_steps": 50, "double_segments": False}
    config = BufferConfig(update_every_n_steps=1, accumulate_on="host", bucket_size="1KB")
    on_gpu = RollingBuffer(config, run.layout, MemoryStorage(), device=device, **options)
    on_cpu = run.buffer(MemoryStorage(), segment_steps=50)
    live = [w.to(device) for w in run.at(1)]
    before = torch.cuda.memory_allocated(device)
    for step in range(1, 40):
        for own, new in zip(live, run.at(step), strict=True):
            own.detach().copy_(new)
        on_gpu.update(live, step)
        on_cpu.update(run.live, step)
    (found,), (expected,) = on_gpu.snapshots(), on_cpu.snapshots()
    assert torch.cuda.memory_allocated(device) - before <= 2048
    assert all(t.is_pinned() for t in found.tensors if t.numel())
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0, equal_nan=True)
    on_gpu.close(), on_cpu.close()


def test_no_step_waits_for_a_segments_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if training's thread closes a segment: nothing is averaged here before ``update`` has returned."""
    may_go, take = threading.Semaphore(0), SegmentMean.take

    def take_late(self: SegmentMean, weights: Sequence[Tensor]) -> None:
        assert may_go.acquire(timeout=600)
        take(self, weights)

    monkeypatch.setattr(SegmentMean, "take", take_late)
    run = Run()
    buffer = run.buffer(MemoryStorage(), accumulate_on="host")
    for step in range(1, 11):
        run.train(buffer, [step])
        run.at(99)  # the next step, before anything was averaged
        may_go.release()
    found = buffer.snapshots()
    buffer.close()
    for snapshot, steps in zip(found, (range(1, 6), range(6, 11)), strict=True):
        torch.testing.assert_close(snapshot.tensors, run.mean(steps), rtol=1e-5, atol=1e-6, check_dtype=False)
