"""The mean of a long segment is the mean of its updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ckmerge.buffer import segment_mean
from lightning_ckmerge.buffer.segment_mean import MAX_UPDATES, SegmentMean
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage
from lightning_ckmerge.core.layout import Flats
from tests.support.rolling import Run

SPREAD = 1e-3


def make_mean(numel: int = 64) -> SegmentMean:
    def acquire() -> Flats:
        return {torch.float32: torch.empty(numel)}

    return SegmentMean(acquire, lambda flats: list(flats.values()))


def weights(numel: int) -> Tensor:
    return 1 + torch.rand(numel, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_updates", "max_differences"), [(20_000, 1 << 16), (3000, 1000)])
def test_many_updates_lose_little(num_updates: int, max_differences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if one running mean takes them all: percents of the spread are lost here, 42 % after five times more."""
    monkeypatch.setattr(segment_mean, "MAX_DIFFERENCES", max_differences)
    mean, base = make_mean(), weights(64)
    shares = torch.linspace(0, 1, num_updates)
    # A third of the weights rises, a third jumps in the middle, a third goes to and fro.
    ramp_step_noise = torch.stack([shares, (shares > 0.5).float(), (shares * 7919) % 1], 1)
    thirds = torch.arange(64) % 3
    now, spread = base.clone(), SPREAD * base
    for at in ramp_step_noise.unbind():
        torch.addcmul(base, spread, at[thirds], out=now)
        mean.take([now])
    found = (mean.read()[torch.float32].double() / base.double() - 1) / SPREAD
    torch.testing.assert_close(found, ramp_step_noise.double().mean(0)[thirds], rtol=0, atol=1e-3)


def test_the_millionth_update_counts() -> None:
    """Goes red if updates stall late: each of the last thousand moves the mean by a tenth of its last bit."""
    num_before, num_updates, mean, base = 999_000, 1000, make_mean(), weights(64)
    first = base * (1 + SPREAD / 2)
    mean.resume({torch.float32: first}, num_before)
    total = first.double() * num_before
    for i in range(num_updates):
        now = base * (1 + SPREAD * (1 + i / num_updates))
        total += now.double()
        mean.take([now])
    expected = total / (num_before + num_updates)
    moved = (expected - first.double()).mean()
    found = (mean.read()[torch.float32].double() - first.double()).mean()
    assert moved > 0
    torch.testing.assert_close(found, moved, rtol=0.03, atol=0)  # 64 roundings to a last bit
    assert mean._num_updates == num_before + num_updates


def test_a_short_segment_takes_one_accumulator() -> None:
    mean = make_mean()
    for _ in range(MAX_UPDATES):
        mean.take([weights(64)])
    assert len(mean.memory()) == 1
    mean.take([weights(64)])
    assert len(mean.memory()) == 2
    assert torch.equal(mean.read()[torch.float32], weights(64))


def test_a_long_segment_is_written_and_resumed_in_the_memory_of_the_plan() -> None:
    """Two accumulators are enough, one of which the writer has at times; searches and checkpoints pool in between."""
    run = Run()
    buffer = run.buffer(MemoryStorage(), capacity=3, segment_steps=2 * MAX_UPDATES + 7)
    live = run.at(1)
    for step in range(1, 5 * MAX_UPDATES):
        buffer.update(live, step)
        if step % 97 == 0:
            buffer.snapshots()
    snapshots = buffer.snapshots()
    assert [s.segment.num_updates for s in snapshots] == [2 * MAX_UPDATES + 7, 2 * MAX_UPDATES + 7, MAX_UPDATES - 15]
    for snapshot in snapshots[:-1]:
        torch.testing.assert_close(snapshot.tensors, live, rtol=0, atol=0, check_dtype=False, equal_nan=True)
    assert buffer._num_accumulators == 2
    buffer.close()


def test_a_long_segment_goes_on_after_a_restart_bit_for_bit(tmp_path: Path) -> None:
    """As if there had been none after the checkpoint, which pools what was averaged before."""
    run, segment_steps = Run(), 2 * MAX_UPDATES
    before = run.buffer(DiskStorage(tmp_path), capacity=3, segment_steps=segment_steps)
    run.train(before, range(1, MAX_UPDATES + 50))
    state = before.state_dict()
    after = run.buffer(DiskStorage(tmp_path), capacity=3, segment_steps=segment_steps)
    after.load_state_dict(state)
    for buffer in (before, after):
        run.train(buffer, range(MAX_UPDATES + 50, segment_steps))
    (whole,), (resumed,) = before.snapshots(), after.snapshots()
    assert resumed.segment == whole.segment
    assert whole.segment.num_updates == segment_steps - 1
    torch.testing.assert_close(resumed.tensors, whole.tensors, rtol=0, atol=0, equal_nan=True)
    assert not after.take_warnings()
    before.close()
    after.close()
