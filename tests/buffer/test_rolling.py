"""What the buffer holds after a run: means, points, masks, precisions, rhythm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lightning_ckmerge.buffer.retention import Pool, decide, pooled
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage, Stored
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.segments import Segment
from tests.support.rolling import Run, assert_same, spans


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return DiskStorage(tmp_path / "buffer") if request.param == "disk" else MemoryStorage("cpu")


@pytest.mark.parametrize("capacity", [2, 4])
@pytest.mark.parametrize("layout", ["uniform", "geometric"])
def test_snapshots_are_the_means_of_the_steps_that_they_name(storage: Storage, layout: str, capacity: int) -> None:
    """Two snapshots pool segments of different lengths, four pool equal ones."""
    run = Run()
    buffer = run.buffer(storage, capacity=capacity, layout=layout)
    run.train(buffer, range(1, 63))
    snapshots = buffer.snapshots()
    assert [s.segment.num_updates for s in snapshots] == [s.segment.num_steps for s in snapshots]
    assert spans(snapshots)[-1] == (61, 62)
    assert any(s.segment.num_steps > 5 for s in snapshots) == (layout == "geometric")
    expected = [run.mean(range(first, last + 1)) for first, last in spans(snapshots)]
    for snapshot, mean in zip(snapshots[:-1], expected, strict=False):
        assert {t.dtype for t in snapshot.tensors} == {torch.float32, torch.float64}
        torch.testing.assert_close(snapshot.tensors, mean, rtol=1e-5, atol=1e-6, check_dtype=False)
    buffer.close()


@pytest.mark.parametrize("layout", ["uniform", "geometric"])
def test_points_are_the_weights_at_the_ends(storage: Storage, layout: str) -> None:
    """Also goes red if a snapshot aliases the live weights, which the next step overwrites."""
    run = Run()
    buffer = run.buffer(storage, capacity=4, layout=layout, snapshot="point")
    run.train(buffer, range(1, 63))
    snapshots = buffer.snapshots()
    assert len(snapshots) == 4
    assert spans(snapshots)[-1][1] == 60
    for snapshot in snapshots:
        assert snapshot.segment.num_updates == 1
        torch.testing.assert_close(snapshot.tensors, run.at(snapshot.segment.last_step), rtol=0, atol=0)
    buffer.close()


def test_memory_and_disk_hold_the_same(tmp_path: Path) -> None:
    run = Run()
    on_disk, in_memory = run.buffer(DiskStorage(tmp_path)), run.buffer(MemoryStorage())
    for step in range(1, 100):
        on_disk.update(run.at(step), step)
        in_memory.update(run.at(step), step)
    pairs = zip(on_disk.snapshots(), in_memory.snapshots(), strict=True)
    for a, b in pairs:
        assert a.segment == b.segment
        torch.testing.assert_close(a.tensors, b.tensors, rtol=0, atol=0, equal_nan=True)


def test_the_mean_of_bfloat16_weights_is_as_good_as_float32(storage: Storage) -> None:
    """Goes red if the mean is kept in bfloat16: 1 + 1/256 is not representable, and 200 updates drift by 1e-2."""
    weights = torch.ones(1000, dtype=torch.bfloat16)
    layout = TensorLayout([OwnedTensor(name="w", role="parameter", tensor=weights)])
    buffer = RollingBuffer(
        BufferConfig(capacity=2, update_every_n_steps=1),
        layout,
        storage,
        device="cpu",
        run_id="0" * 8,
        segment_steps=200,
        double_segments=False,
    )
    for step in range(1, 201):
        buffer.update([weights.fill_(1 + (step % 2) / 128)], step)
    (snapshot,) = buffer.snapshots()
    torch.testing.assert_close(snapshot.tensors[0], torch.full((1000,), 1 + 1 / 256), rtol=1e-6, atol=0)
    buffer.close()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_that_never_change_come_out_to_the_bit(storage: Storage, dtype: str | None) -> None:
    run = Run()
    buffer = run.buffer(storage, capacity=3, dtype=dtype)
    weights = run.at(7)
    for step in range(1, 48):
        buffer.update(weights, step)
    for snapshot in buffer.snapshots()[:-1]:
        for tensor, w in zip(snapshot.tensors, weights, strict=True):
            assert torch.equal(tensor, w.to(tensor.dtype))
    buffer.close()


def test_masks_of_minus_infinity_survive_means_and_pools(storage: Storage) -> None:
    run = Run()
    buffer = run.buffer(storage, capacity=3)
    run.train(buffer, range(1, 61))
    index = [slot.name for slot in run.layout.slots].index("mask")
    for snapshot in buffer.snapshots():
        assert torch.equal(snapshot.tensors[index], run.live[index])
    buffer.close()


def test_a_diverged_parameter_stays_visible(storage: Storage) -> None:
    """Goes red if parameters are treated as masks are: the mean would hide that the run has failed."""
    run = Run()
    buffer = run.buffer(storage)
    run.train(buffer, range(1, 3))
    names = [slot.name for slot in run.layout.slots]
    run.at(3)[names.index("scale")].fill_(torch.nan)
    buffer.update(run.live, 3)
    run.train(buffer, range(4, 6))
    (snapshot,) = buffer.snapshots()
    assert [name for name, t in zip(names, snapshot.tensors, strict=True) if t.isnan().any()] == ["scale"]
    buffer.close()


@pytest.mark.parametrize(
    ("overrides", "dtypes"),
    [
        ({}, {"F64", "F32"}),
        ({"dtype": "bfloat16"}, {"F64", "BF16"}),
        ({"snapshot": "point"}, {"F64", "F32", "BF16"}),
        ({"snapshot": "point", "dtype": "float16"}, {"F64", "F16"}),
    ],
)
def test_files_hold_the_precision_asked_for(tmp_path: Path, overrides: dict[str, Any], dtypes: set[str]) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), **overrides)
    run.train(buffer, range(1, 6))
    buffer.close()
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == dtypes  # noqa: SIM118 - no mapping


def test_updates_may_be_sparse_but_a_segment_ends_with_one(storage: Storage) -> None:
    run = Run()
    buffer = run.buffer(storage, update_every_n_steps=3)
    run.train(buffer, range(1, 11))
    first, second = buffer.snapshots()
    assert (first.segment.num_updates, second.segment.num_updates) == (2, 2)
    torch.testing.assert_close(first.tensors, run.mean([3, 5]), rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(second.tensors, run.mean([8, 10]), rtol=1e-5, atol=1e-6, check_dtype=False)
    buffer.close()


def test_a_counter_that_jumps_leaves_no_gap(storage: Storage) -> None:
    """Two optimizers count two steps a batch."""
    run = Run()
    buffer = run.buffer(storage)
    run.train(buffer, range(2, 24, 2))
    assert spans(buffer.snapshots()) == [(2, 6), (7, 12), (13, 18), (19, 22)]
    buffer.close()


def test_a_run_of_unknown_length_gets_longer_segments(storage: Storage) -> None:
    run = Run()
    buffer = run.buffer(storage, capacity=3, layout="uniform", snapshot="point", segment_steps=2, double_segments=True)
    lengths = {}
    for step in range(1, 901):
        buffer.update(run.live, step)
        lengths[step] = buffer.segment_steps
    assert [step for step in range(2, 901) if lengths[step] != lengths[step - 1]] == [200, 400, 800]
    assert spans(buffer.snapshots()) == [(849, 864), (865, 880), (881, 896)]
    buffer.close()


def test_the_plan_is_what_a_run_takes(tmp_path: Path) -> None:
    """The most that ever lies on the disk stays below the plan, and the plan is no wild guess."""
    sizes = []

    class Measured(DiskStorage):
        def write(self, *args: Any) -> Stored:
            stored = super().write(*args)
            sizes.append(sum(path.stat().st_size - header_length(path) for path in tmp_path.iterdir()))
            return stored

    def header_length(path: Path) -> int:
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")

    run = Run()
    buffer = run.buffer(Measured(tmp_path), capacity=4)
    for step in range(1, 201):
        buffer.update(run.at(step), step)
        if step % 41 == 0:
            buffer.state_dict()
    buffer.close()
    assert 0.8 * buffer.num_bytes_on_disk <= max(sizes) <= buffer.num_bytes_on_disk
    one_mean = sum(w.numel() * max(w.element_size(), 4) for w in run.live)
    assert (buffer.num_bytes_in_memory, buffer.num_bytes_on_disk) == (2 * one_mean, 12 * one_mean)
    assert run.buffer(MemoryStorage(), capacity=4).num_bytes_in_memory == 8 * one_mean


def test_a_model_of_which_a_rank_owns_nothing_is_served(tmp_path: Path) -> None:
    buffer = RollingBuffer(
        BufferConfig(update_every_n_steps=1),
        TensorLayout([]),
        DiskStorage(tmp_path),
        device="cpu",
        run_id="0" * 8,
        segment_steps=2,
        double_segments=False,
    )
    for step in range(1, 60):
        buffer.update([], step)
    assert spans(buffer.snapshots())[-1] == (59, 59)
    assert not buffer.take_warnings()
    buffer.close()


@pytest.mark.parametrize("snapshot", ["mean", "point"])
def test_the_buffer_does_what_the_ring_decides(snapshot: str) -> None:
    run = Run()
    buffer = run.buffer(MemoryStorage(), capacity=5, snapshot=snapshot)
    ring: list[Segment] = []
    for last_step in range(5, 305, 5):
        run.train(buffer, range(last_step - 4, last_step + 1))
        num_updates = 5 if snapshot == "mean" else 1
        ring.append(Segment(kind=snapshot, first_step=last_step - 4, last_step=last_step, num_updates=num_updates))
        while action := decide(ring, capacity=5, layout="geometric", finest=5):
            new = [pooled(*ring[action.index : action.index + 2])] if isinstance(action, Pool) else []
            ring[action.index : action.index + 1 + len(new)] = new
        assert [s.segment for s in buffer.snapshots()] == ring
    buffer.close()


def test_snapshots_can_be_taken_twice(storage: Storage) -> None:
    run = Run()
    buffer = run.buffer(storage)
    run.train(buffer, range(1, 18))
    assert_same(buffer.snapshots(), buffer.snapshots())
    buffer.close()
