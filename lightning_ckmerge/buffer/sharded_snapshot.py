"""Snapshots that are spread over the files of several ranks: put together again, and dealt out to other ranks.

Every file names its parts by their place in the whole tensor (``core/specs.py``). A tensor that the parts do not cover
element for element, or that comes from a damaged file, is an error or left out, never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_ckmerge.buffer.archive import lost
from lightning_ckmerge.buffer.state import BufferState, Progress
from lightning_ckmerge.buffer.storage import DiskStorage, Stored, check_digest
from lightning_ckmerge.core.layout import DTYPE_NAMES, DTYPES, TensorLayout
from lightning_ckmerge.core.specs import Box, split_name, whole
from lightning_ckmerge.errors import SnapshotError

Shapes = Mapping[str, tuple[int, ...]]


class OtherModelError(SnapshotError):
    """Snapshots are of a model with other tensors."""


@dataclass(frozen=True)
class _Part:
    """A tensor in a rank's file."""

    rank: int
    key: str
    box: Box


class SnapshotParts:
    """The files of one snapshot, a rank each. A file's SHA-256 is checked before anything of it is used.

    Args:
        paths: The files, by rank.
        sha256s: Of each; ``None``: they have been compared.
        shapes: Every tensor of the model, by name, with its whole shape as it is stored.
        first: The rank whose parts come first. Ranks need not agree on buffers outside shards.

    Raises:
        SnapshotError: A file cannot be read, or names a part that is none.
    """

    def __init__(self, paths: Sequence[Path], sha256s: Sequence[str] | None, shapes: Shapes, first: int = 0) -> None:
        self._paths = paths
        self._unchecked = dict(enumerate(sha256s or ()))
        self._shapes = shapes
        self._files: list[Any] = [_open(path) for path in paths]
        self._parts: dict[str, list[_Part]] = {}
        for rank in sorted(range(len(paths)), key=lambda r: (r != first, r)):
            for key in self._files[rank].keys():  # noqa: SIM118 - not a mapping
                name, box = split_name(key, self._files[rank].get_slice(key).get_shape())
                self._parts.setdefault(name, []).append(_Part(rank, key, box))

    @property
    def names(self) -> KeysView[str]:
        """The tensors of which there is a part."""
        return self._parts.keys()

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision in which a tensor is stored."""
        part = self._parts[name][0]
        found = self._files[part.rank].get_slice(part.key).get_dtype()
        if found not in DTYPES:
            raise SnapshotError(
                f"a snapshot's tensors must be of a dtype that is written here, got {found} for {name!r}."
            )
        return DTYPES[found]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the least shape that holds all of a tensor's parts.

        Raises:
            SnapshotError: They cannot be parts of one tensor.
        """
        known = self._shapes.get(name, ())
        bounds = [tuple(stop for _, stop in part.box.ranges_D) for part in self._parts[name]]
        # A part of a tensor that FSDP1 has flattened has one dimension.
        shaped = [b for b in bounds if len(b) == len(known)] or bounds
        if len({len(b) for b in shaped}) > 1:
            raise SnapshotError(
                f"the parts of a tensor must agree on its dimensions, got a difference for {name!r}. The file is "
                "damaged: remove it."
            )
        found = tuple(map(max, zip(*shaped, strict=True)))
        return tuple(known) if found == (whole(known).numel,) else found

    def check_model(self) -> None:
        """Raise ``OtherModelError`` unless the files hold the model's tensors, of its shapes."""
        if wrong := self._parts.keys() ^ self._shapes.keys():
            raise OtherModelError(f"a snapshot must hold the model's tensors, got a difference in {min(wrong)!r}.")
        if wrong := {name for name, shape in self._shapes.items() if self.shape(name) != shape}:
            raise OtherModelError(f"a snapshot must have the model's shapes, got another one for {min(wrong)!r}.")

    def assemble(self, name: str, box: Box, dtype: torch.dtype) -> Tensor:
        """Return a part of one tensor, put together from the files' parts.

        Raises:
            SnapshotError: They do not cover it, are of another precision, or a file is damaged.
        """
        if sum(part.box.numel for part in self._parts[name]) < box.numel:  # a name may claim any place
            raise SnapshotError(f"a snapshot's files must hold all of a tensor, got a part of {name!r}.")
        result = torch.empty(box.shape, dtype=dtype)
        missing = torch.ones(box.shape, dtype=torch.bool)
        for part in self._parts[name]:
            if not missing.any():
                break
            self._copy(part, name, box, result, missing)
        if missing.any():
            raise SnapshotError(f"a snapshot's files must hold all of a tensor, got a part of {name!r}.")
        return result

    def _copy(self, part: _Part, name: str, box: Box, result: Tensor, missing: Tensor) -> None:
        source: Box | None = part.box
        target: Box | None = box
        flatten = len(part.box.ranges_D) != len(box.ranges_D)
        if flatten:
            # One of both is a range of a flattened tensor; the other can be compared with it if it is whole.
            shape = self._shapes[name]
            source, target = _flat(part.box, shape), _flat(box, shape)
            result, missing = result.view(-1), missing.view(-1)
        common = target.intersection(source) if source is not None and target is not None else None
        if common is not None and source is not None and target is not None:
            result[common.within(target)] = self._read(part, result.dtype, flatten)[common.within(source)]
            missing[common.within(target)] = False

    def _read(self, part: _Part, dtype: torch.dtype, flatten: bool) -> Tensor:
        if part.rank in self._unchecked:
            check_digest(self._paths[part.rank], self._unchecked[part.rank])
            del self._unchecked[part.rank]
        file = self._files[part.rank]
        found = file.get_slice(part.key).get_dtype()
        if found != DTYPE_NAMES[dtype]:
            raise SnapshotError(f"a snapshot must be of the buffer's precision, got {found} for {part.key!r}.")
        tensor: Tensor = file.get_tensor(part.key)
        return tensor.reshape(-1) if flatten else tensor


def _flat(box: Box, shape: Sequence[int]) -> Box | None:
    """Return a range of the flattened tensor; ``None`` if the box is not one."""
    if len(box.ranges_D) == 1:
        return box
    return whole((whole(shape).numel,)) if box == whole(shape) else None


def _open(path: Path) -> Any:
    try:
        if not path.is_file():
            raise OSError("no such file")  # a pipe's end may never come
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"a snapshot's file must be readable, got {error} for {path}.") from error


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
        file_id: Starts the names of its files; ``None``: the old ones are nobody else's, and lead to it.
    """

    rank: int
    world_size: int
    storage: DiskStorage
    stored: TensorLayout
    accumulator: TensorLayout
    shapes: Shapes
    file_id: str | None = None


def reshard(states: Sequence[BufferState], dirpaths: Sequence[Path], new: NewRank) -> tuple[BufferState, list[str]]:
    """Return a state for the new rank's buffer, its files written, and warnings of the losses.

    Args:
        states: Of all old ranks, by rank; durable ones.
        dirpaths: Where their files are.
        new: The new rank.
    """
    first, warnings = states[0], list[str]()
    # The same after a second attempt, and no old file's name.
    run_id = new.file_id or hashlib.sha256(f"{first.run_id} on {new.world_size}".encode()).hexdigest()[:8]
    entries = []
    for entry in first.entries:
        olds = [next((e.stored for e in s.entries if e.segment == entry.segment), None) for s in states]
        name = entry.stored.name.replace(first.run_id, run_id)
        try:
            entries.append(replace(entry, stored=build(name, new.stored, olds, dirpaths, new)))
        except OtherModelError as error:  # and so are all others
            step = first.progress.last_step
            anew = Progress.after(step)
            warnings = [
                f"{error} The model has changed since the checkpoint, so the buffer starts again at step {step}."
            ]
            return replace(first, run_id=run_id, entries=(), file=None, saved=True, progress=anew), warnings
        except (SnapshotError, OSError) as error:
            warnings.append(f"{error} This snapshot cannot be resharded: {lost(entry.segment)}.")
    file = None
    if first.file is not None:
        try:
            name = first.file.name.replace(first.run_id, run_id)
            file = build(name, new.accumulator, [s.file for s in states], dirpaths, new)
        except (SnapshotError, OSError) as error:
            warnings.append(str(error))
    return replace(first, run_id=run_id, entries=tuple(entries), file=file, saved=file is not None), warnings


def build(
    name: str, layout: TensorLayout, olds: Sequence[Stored | None], dirpaths: Sequence[Path], new: NewRank
) -> Stored:
    """Write the new rank's part of one snapshot, and return its file.

    Args:
        name: Of that file.
        layout: Of that part.
        olds: The files of all old ranks, by rank; ``None`` where one has lost it.
        dirpaths: Where these are.
        new: The new rank.

    Raises:
        SnapshotError: They do not hold all of it, or one of them is damaged.
        OSError: It cannot be written.
    """
    known = [s for s in olds if s is not None]
    if len(known) < len(olds):
        raise SnapshotError(f"a snapshot must be held by all old ranks, got one that {len(olds) - len(known)} lack.")
    paths = [DiskStorage(d).path(s.name) for d, s in zip(dirpaths, known, strict=True)]
    # Each rank keeps its own buffers, a new one takes rank 0's.
    parts = SnapshotParts(paths, [s.sha256 or "" for s in known], new.shapes, first=new.rank)
    parts.check_model()

    def blocks() -> Iterator[Tensor]:
        for slot in layout.slots:
            yield parts.assemble(*split_name(slot.name, slot.shape), slot.dtype).view(-1)

    return new.storage.write(name, layout, blocks())
