"""The buffer of a run that goes on with other ranks, or other shards: built anew from the files of the old ranks.

Each new rank reads the boxes that it needs (``buffer/parts.py``). What cannot be put together, or comes from a damaged
file, is left out, never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lightning_ckmerge.buffer.archive import lost
from lightning_ckmerge.buffer.parts import OtherModelError, Shapes, SnapshotParts
from lightning_ckmerge.buffer.state import BufferState, Progress
from lightning_ckmerge.buffer.storage import DiskStorage, Stored
from lightning_ckmerge.core.boxes import split_name
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.errors import SnapshotError


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
        except OtherModelError as error:  # and so are all others
            step = first.progress.last_step
            anew = Progress.after(step)
            warnings = [f"{error} The model has changed since the checkpoint: the buffer starts anew at step {step}."]
            return replace(first, run_id=run_id, entries=(), file=None, saved=True, progress=anew), warnings
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


def _build(
    name: str, layout: TensorLayout, olds: Sequence[Stored | None], dirpaths: Sequence[Path], new: NewRank
) -> Stored:
    known = [s for s in olds if s is not None]
    if len(known) < len(olds):
        raise SnapshotError(f"a snapshot must be held by all old ranks, got one that {len(olds) - len(known)} lack.")
    paths = [DiskStorage(d).path(s.name) for d, s in zip(dirpaths, known, strict=True)]
    # Each rank goes on with its own buffers, a new one with rank 0's.
    parts = SnapshotParts(paths, [s.sha256 or "" for s in known], new.shapes, first=new.rank)
    parts.check_model()

    def blocks() -> Iterator[Tensor]:
        for slot in layout.slots:
            yield parts.assemble(*split_name(slot.name, slot.shape), slot.dtype).view(-1)

    return new.storage.write(name, layout, blocks())
