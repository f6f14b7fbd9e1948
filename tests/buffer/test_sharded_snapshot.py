"""A buffer goes on with other ranks and other shards, bit for bit, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.sharded_snapshot import NewRank, reshard
from lightning_ckmerge.buffer.state import BufferState
from lightning_ckmerge.buffer.storage import DiskStorage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout, as_real
from lightning_ckmerge.core.specs import Box, part_name
from lightning_ckmerge.distributed.ownership import deal_out

Kind = Literal["replicated", "rows", "columns", "flat"]
SEGMENT_STEPS = 2
NUM_STEPS = 7


def split(kind: Kind, name: str, tensor: Tensor, rank: int, world_size: int) -> list[OwnedTensor]:
    """The rank's part of one parameter, as FSDP2 (`rows`), tensor parallelism or FSDP1 (`flat`) cut it."""
    if kind == "flat":
        size = -(-tensor.numel() // world_size)
        start, stop = min(rank * size, tensor.numel()), min((rank + 1) * size, tensor.numel())
        part = part_name(name, Box(((start, stop),)), (tensor.numel(),))
        piece = tensor if (start, stop) == (0, tensor.numel()) else tensor.reshape(-1)[start:stop]
    else:
        dim = 1 if kind == "columns" and tensor.dim() > 1 else 0
        size = -(-tensor.shape[dim] // world_size)
        start, stop = min(rank * size, tensor.shape[dim]), min((rank + 1) * size, tensor.shape[dim])
        ranges = [(start, stop) if d == dim else (0, n) for d, n in enumerate(tensor.shape)]
        part, piece = part_name(name, Box(tuple(ranges)), tensor.shape), tensor.narrow(dim, start, stop - start)
    return [OwnedTensor(name=part, role="parameter", tensor=piece)] if piece.numel() else []


class Model:
    """Parameters that are split, and a buffer of each rank's own."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {f"p{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}

    def step(self) -> None:
        for i, tensor in enumerate(self.parameters.values()):
            tensor.add_(0.1 * (i + 1) * tensor.cos())

    def owned(self, kind: Kind, rank: int, world_size: int) -> list[OwnedTensor]:
        if kind == "replicated":
            pieces = deal_out(list(self.parameters.items()), world_size)[rank]
            owned = [OwnedTensor(name=p.part, role=p.role, tensor=p.of(self.parameters[p.name])) for p in pieces]
        else:
            owned = [o for n, t in self.parameters.items() for o in split(kind, n, t, rank, world_size)]
        return [*owned, OwnedTensor(name="own", role="buffer", tensor=torch.full((3,), float(rank)))]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"own": (3,), **{n: tuple(as_real(t).shape) for n, t in self.parameters.items()}}


def make_buffer(owned: list[OwnedTensor], dirpath: Path) -> RollingBuffer:
    config = BufferConfig(every_n_train_steps=SEGMENT_STEPS, update_every_n_steps=1, capacity=2)
    return RollingBuffer(
        config,
        TensorLayout(owned),
        DiskStorage(dirpath),
        device="cpu",
        run_id="0123abcd",
        segment_steps=SEGMENT_STEPS,
        double_segments=False,
    )


def train(model: Model, kind: Kind, world_size: int, root: Path) -> tuple[list[BufferState], list[Path]]:
    """Train, with a buffer a rank, and return what a checkpoint would hold."""
    dirpaths = [root / f"{world_size}-{rank}" for rank in range(world_size)]
    buffers = [make_buffer(model.owned(kind, rank, world_size), dirpaths[rank]) for rank in range(world_size)]
    for step in range(1, NUM_STEPS + 1):
        model.step()
        for rank, buffer in enumerate(buffers):
            owned = model.owned(kind, rank, world_size)
            buffer.update(TensorLayout(owned).order(owned), step)
    states = [BufferState.from_dict(b.state_dict()) for b in buffers]
    for buffer in buffers:
        buffer.close()
    return states, dirpaths


def resume(
    states: Sequence[BufferState],
    dirpaths: Sequence[Path],
    model: Model,
    kind: Kind,
    world_size: int,
    root: Path,
) -> list[tuple[RollingBuffer, TensorLayout, list[str]]]:
    resumed = []
    for rank in range(world_size):
        owned = model.owned(kind, rank, world_size)
        dirpath = root / f"{world_size}-{rank}"
        buffer = make_buffer(owned, dirpath)
        new = NewRank(
            rank=rank,
            world_size=world_size,
            storage=DiskStorage(dirpath),
            stored=buffer.stored_layout,
            accumulator=buffer.accumulator_layout,
            shapes=model.shapes,
        )
        state, warnings = reshard(states, dirpaths, new)
        buffer.load_state_dict(state.to_dict())
        resumed.append((buffer, TensorLayout(owned), warnings + buffer.take_warnings()))
    return resumed


def snapshots(buffer: RollingBuffer, layout: TensorLayout) -> list[dict[str, Tensor]]:
    return [dict(zip([s.name for s in layout.slots], s.tensors, strict=True)) for s in buffer.snapshots()]


def reference(model: Model, kind: Kind, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """What a rank would hold, had the run had these ranks from the start."""
    with tempfile.TemporaryDirectory() as root:
        states, dirpaths = train(model, kind, world_size, Path(root))
        buffer = make_buffer(model.owned(kind, rank, world_size), dirpaths[rank])
        buffer.load_state_dict(states[rank].to_dict())
        found = snapshots(buffer, TensorLayout(model.owned(kind, rank, world_size)))
        return [{n: t.clone() for n, t in snapshot.items()} for snapshot in found]


shapes = st.lists(
    st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 5))), min_size=1, max_size=4
)
kinds = st.sampled_from(["replicated", "rows", "columns"])


@settings(max_examples=40, deadline=None)
@given(shapes, kinds, st.integers(1, 4), kinds, st.integers(1, 4))
def test_other_ranks_and_shards_hold_the_same_bits(
    shapes: list[tuple[int, ...]], old_kind: Kind, old_size: int, new_kind: Kind, new_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = Model(shapes)
        states, dirpaths = train(model, old_kind, old_size, root)
        for rank, (buffer, layout, lost) in enumerate(resume(states, dirpaths, model, new_kind, new_size, root)):
            expected = reference(Model(shapes), new_kind, rank, new_size)
            found = snapshots(buffer, layout)
            assert lost == []
            assert len(found) == len(expected) == 3  # two in the ring, and the mean in progress
            for snapshot, other in zip(found, expected, strict=True):
                own = snapshot.pop("own")
                other.pop("own")
                assert own.tolist() == [float(rank if rank < old_size else 0)] * 3
                assert snapshot.keys() == other.keys()
                assert all(torch.equal(snapshot[n], other[n]) for n in snapshot)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 4), st.sampled_from(["rows", "flat"]), st.integers(1, 4))
def test_flattened_shards_are_equal_or_left_out(
    shapes: list[tuple[int, ...]], old_size: int, new_kind: Kind, new_size: int
) -> None:
    """FSDP1's ranges of a flattened matrix cannot be compared with parts of a matrix that is not whole."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = Model(shapes)
        states, dirpaths = train(model, "flat", old_size, root)
        for rank, (buffer, layout, lost) in enumerate(resume(states, dirpaths, model, new_kind, new_size, root)):
            found = snapshots(buffer, layout)
            assert found or lost
            assert new_kind == "rows" or not lost
            for snapshot, other in zip(
                found, reference(Model(shapes), new_kind, rank, new_size), strict=bool(not lost)
            ):
                assert all(torch.equal(snapshot[n], other[n]) for n in snapshot if n != "own")


def test_complex_tensors_keep_both_parts(tmp_path: Path) -> None:
    model = Model([(6, 2)], torch.complex64)
    states, dirpaths = train(model, "replicated", 2, tmp_path)
    [(buffer, layout, lost)] = resume(states, dirpaths, model, "replicated", 1, tmp_path)
    [*_, newest] = reference(Model([(6, 2)], torch.complex64), "replicated", 0, 1)
    assert lost == []
    assert torch.equal(snapshots(buffer, layout)[-1]["p0"], newest["p0"])


@pytest.mark.parametrize("fault", ["gone", "bit", "unnamed"])
def test_what_a_rank_has_lost_is_left_out(tmp_path: Path, fault: str) -> None:
    model = Model([(8, 3)])
    states, dirpaths = train(model, "rows", 2, tmp_path)
    victim = dirpaths[1] / states[1].entries[0].stored.name
    if fault == "gone":
        victim.unlink()
    elif fault == "bit":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(bytes(content))
    else:
        states[1] = BufferState.from_dict({**states[1].to_dict(), "entries": states[1].to_dict()["entries"][1:]})
    [(buffer, _, lost)] = resume(states, dirpaths, model, "rows", 1, tmp_path)
    assert next(s.segment for s in buffer.snapshots()) == states[0].entries[1].segment
    assert len(lost) == 1
    first, last = states[0].entries[0].segment.first_step, states[0].entries[0].segment.last_step
    assert f"steps {first} to {last}" in lost[0]


@pytest.mark.parametrize("now", [[(5, 3)], [(8, 2)], [(8, 3), (2,)]])
def test_another_model_gets_nothing(tmp_path: Path, now: list[tuple[int, ...]]) -> None:
    """A smaller matrix would be covered by a part of the old one."""
    states, dirpaths = train(Model([(8, 3)]), "rows", 2, tmp_path)
    [(buffer, _, lost)] = resume(states, dirpaths, Model(now), "rows", 1, tmp_path)
    assert buffer.snapshots() == []
    (text,) = lost
    assert "The model has changed since the checkpoint, so the buffer starts again" in text


def test_old_files_are_left_for_another_attempt(tmp_path: Path) -> None:
    """Two ranks again, but other shards: files of both lie in one directory."""
    model = Model([(8, 3)])
    states, dirpaths = train(model, "rows", 2, tmp_path)
    before = {p: p.read_bytes() for d in dirpaths for p in d.iterdir()}
    first = [b.snapshots() for b, *_ in resume(states, dirpaths, model, "columns", 2, tmp_path)]
    again = [b.snapshots() for b, *_ in resume(states, dirpaths, model, "columns", 2, tmp_path)]
    assert {p: p.read_bytes() for p in before} == before
    assert [[s.sha256 for s in rank] for rank in first] == [[s.sha256 for s in rank] for rank in again]
