"""The buffer of a run that goes on with other ranks, or other shards: built anew from the files of the old ranks.

Every file names its parts by their place in the whole tensor (``core/boxes.py``). Each new rank reads the boxes that it
needs. What does not cover a tensor element for element, or comes from a damaged file, is left out, never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_ckmerge.buffer.archive import lost
from lightning_ckmerge.buffer.snapshot_file import check_digest
from lightning_ckmerge.buffer.state import BufferState
from lightning_ckmerge.buffer.storage import DiskStorage, Stored
from lightning_ckmerge.core.boxes import Box, split_name, whole
from lightning_ckmerge.core.layout import DTYPE_NAMES, Slot, TensorLayout
from lightning_ckmerge.errors import SnapshotError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class NewRank:
    """Who needs the snapshots.

    Args:
        rank: Its number now.
        world_size: Number of ranks now.
        storage: Where its files go; may be where an old rank's are.
        stored: The layout of its snapshots.
        accumulator: The layout of its segment in progress.
        shapes: Every tensor of the model, by name, with its whole shape.
    """

    rank: int
    world_size: int
    storage: DiskStorage
    stored: TensorLayout
    accumulator: TensorLayout
    shapes: Shapes


def reshard(states: Sequence[BufferState], dirpaths: Sequence[Path], new: NewRank) -> tuple[BufferState, list[str]]:
    """Return a state from which the new rank's buffer goes on, its files written, and what was lost.

    Args:
        states: Of all old ranks, by rank; durable ones.
        dirpaths: Where their files are.
        new: The new rank.
    """
    first, warnings = states[0], list[str]()
    # The same after a second attempt, and no old file's name.
    run_id = hashlib.sha256(f"{first.run_id} on {new.world_size}".encode()).hexdigest()[:8]
    entries = []
    for entry in first.entries:
        olds = [next((e.stored for e in s.entries if e.segment == entry.segment), None) for s in states]
        name = entry.stored.name.replace(first.run_id, run_id)
        try:
            entries.append(replace(entry, stored=_build(name, new.stored, olds, dirpaths, new)))
        except (SnapshotError, OSError) as error:
            warnings.append(f"{error} A buffer for other ranks cannot be made of that: {lost(entry.segment)}.")
    file = None
    if first.file is not None:
        try:
            name = first.file.name.replace(first.run_id, run_id)
            file = _build(name, new.accumulator, [s.file for s in states], dirpaths, new)
        except (SnapshotError, OSError) as error:
            warnings.append(str(error))
    return replace(first, run_id=run_id, entries=tuple(entries), file=file, saved=file is not None), warnings


@dataclass(frozen=True)
class _Part:
    """A tensor in an old rank's file."""

    rank: int
    key: str
    box: Box


class _OldFiles:
    """One snapshot, spread over the old ranks' files. A file's SHA-256 is checked before anything of it is used."""

    def __init__(self, olds: Sequence[Stored], dirpaths: Sequence[Path], new: NewRank) -> None:
        self._paths = [DiskStorage(d).path(s.name) for d, s in zip(dirpaths, olds, strict=True)]
        self._stored = olds
        self._shapes = new.shapes
        self._checked: set[int] = set()
        self._files: list[Any] = [_open(path) for path in self._paths]
        self._parts: dict[str, list[_Part]] = {}
        # Ranks need not agree on buffers outside shards: each goes on with its own, a new one with rank 0's.
        for rank in sorted(range(len(olds)), key=lambda r: (r != new.rank, r)):
            for key in self._files[rank].keys():  # noqa: SIM118 - not a mapping
                name, box = split_name(key, self._files[rank].get_slice(key).get_shape())
                self._parts.setdefault(name, []).append(_Part(rank, key, box))

    def check_model(self) -> None:
        """Raise ``SnapshotError`` unless the files hold the model's tensors, of its shapes."""
        if wrong := self._parts.keys() ^ self._shapes.keys():
            raise SnapshotError(f"a snapshot must hold the model's tensors, got a difference in {min(wrong)!r}.")
        for name, parts in self._parts.items():
            shape = self._shapes[name]
            for part in parts:
                # A part of what FSDP1 has flattened has one dimension.
                bounds = shape if len(part.box.ranges_D) == len(shape) else (whole(shape).numel,)
                ends = [tuple(stop for _, stop in p.box.ranges_D) for p in parts]
                ends = [e for e in ends if len(e) == len(bounds)]
                if tuple(map(max, zip(*ends, strict=True))) != bounds:
                    raise SnapshotError(f"a snapshot must have the model's shapes, got another one for {name!r}.")

    def assemble(self, slot: Slot) -> Tensor:
        """Return one tensor of the new rank, flat."""
        name, box = split_name(slot.name, slot.shape)
        result = torch.empty(slot.shape, dtype=slot.dtype)
        missing = torch.ones(slot.shape, dtype=torch.bool)
        for part in self._parts[name]:
            if not missing.any():
                break
            self._copy(part, slot, box, result, missing)
        if missing.any():
            raise SnapshotError(f"the old ranks' files must hold all of a tensor, got a part of {slot.name!r}.")
        return result.view(-1)

    def _copy(self, part: _Part, slot: Slot, box: Box, result: Tensor, missing: Tensor) -> None:
        source: Box | None = part.box
        target: Box | None = box
        flatten = len(part.box.ranges_D) != len(box.ranges_D)
        if flatten:
            # One of both is a range of a flattened tensor; the other can be compared with it if it is whole.
            shape = self._shapes[split_name(slot.name, slot.shape)[0]]
            source, target = _flat(part.box, shape), _flat(box, shape)
            result, missing = result.view(-1), missing.view(-1)
        common = target.intersection(source) if source is not None and target is not None else None
        if common is not None and source is not None and target is not None:
            result[common.within(target)] = self._read(part, slot.dtype, flatten)[common.within(source)]
            missing[common.within(target)] = False

    def _read(self, part: _Part, dtype: torch.dtype, flatten: bool) -> Tensor:
        if part.rank not in self._checked:
            stored = self._stored[part.rank]
            check_digest(self._paths[part.rank], stored.sha256 or "")
            self._checked.add(part.rank)
        file = self._files[part.rank]
        found = file.get_slice(part.key).get_dtype()
        if found != DTYPE_NAMES[dtype]:
            raise SnapshotError(f"a snapshot must be of the buffer's precision, got {found} for {part.key!r}.")
        tensor: Tensor = file.get_tensor(part.key)
        return tensor.reshape(-1) if flatten else tensor


def _build(
    name: str, layout: TensorLayout, olds: Sequence[Stored | None], dirpaths: Sequence[Path], new: NewRank
) -> Stored:
    known = [s for s in olds if s is not None]
    if len(known) < len(olds):
        raise SnapshotError(f"a snapshot must be held by all old ranks, got one that {len(olds) - len(known)} lack.")
    files = _OldFiles(known, dirpaths, new)
    files.check_model()

    def blocks() -> Iterator[Tensor]:
        for slot in layout.slots:
            yield files.assemble(slot)

    return new.storage.write(name, layout, blocks())


def _flat(box: Box, shape: Sequence[int]) -> Box | None:
    """Return a range of the flattened tensor; ``None`` if the box is not one."""
    if len(box.ranges_D) == 1:
        return box
    return whole((whole(shape).numel,)) if box == whole(shape) else None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"a snapshot's file must be readable, got {error} for {path}.") from error
