"""Restores a buffer after a restart, on the same ranks and shards as before, or on others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.sharded_snapshot import NewRank, reshard
from lightning_ckmerge.buffer.state import BufferState
from lightning_ckmerge.buffer.storage import DiskStorage
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import SnapshotError


def buffer_dirpath(dirpath: Path, rank: int, world_size: int) -> Path:
    """Return where a rank's snapshots go."""
    buffer = dirpath / "buffer"
    return buffer if world_size == 1 else buffer / f"rank={rank:05d}-of-{world_size:05d}"


def fingerprint(layout: TensorLayout) -> str:
    """Return an identifier of one rank's part of the model."""
    return hashlib.sha256(repr([(s.name, s.shape) for s in layout.slots]).encode()).hexdigest()


def resume_buffer(
    buffer: RollingBuffer,
    states: Sequence[dict[str, Any]],
    layouts: Sequence[str],
    ownership: Ownership,
    comm: Comm,
    place: Place,
) -> tuple[Leftovers, list[str]]:
    """Restore the old ranks' states; their files are used as they are if each rank has the same part as before.

    Files elsewhere are linked or copied, and left alone there. So are those that another living process may count on,
    until a newer checkpoint does without them.

    Args:
        buffer: A new one.
        states: Of all old ranks, by rank.
        layouts: Their fingerprints.
        ownership: The parts of this rank.
        comm: The ranks.
        place: Where artifacts go, and where the files lie.

    Returns:
        The unused files, and warnings of snapshots that could not be taken over.

    Raises:
        SnapshotError: These are no states of a buffer.
    """
    now = comm.exchange(fingerprint(TensorLayout(ownership.owned())))
    old = [BufferState.from_dict(s) for s in states]
    usable = buffer.config.storage == "disk" and all(s.durable and s.snapshot == buffer.config.snapshot for s in old)
    dirpath, source = place.dirpath, place.source or place.dirpath
    if list(layouts) == now or not usable:
        before = old[comm.rank if list(layouts) == now else 0]
        state = before if place.file_id is None else before.renamed(place.file_id)
        own = [buffer_dirpath(path, comm.rank, comm.world_size) for path in (source, dirpath)]
        if usable and state is not before:
            _bring(dict(zip(before.names_in_order, state.names_in_order, strict=True)), *own)
        buffer.load_state_dict(state.to_dict())
        is_outdated = source == dirpath and state.run_id != before.run_id
        return Leftovers(own[:1] if is_outdated else [], before.run_id), []
    dirpaths = [buffer_dirpath(source, rank, len(old)) for rank in range(len(old))]
    new = NewRank(
        rank=comm.rank,
        world_size=comm.world_size,
        storage=DiskStorage(buffer_dirpath(dirpath, comm.rank, comm.world_size)),
        stored=buffer.stored_layout,
        accumulator=buffer.accumulator_layout,
        shapes=ownership.shapes,
        file_id=place.file_id,
    )
    state, warnings = reshard(old, dirpaths, new)
    buffer.load_state_dict(state.to_dict())
    own_leftovers = dirpaths[comm.rank :: comm.world_size] if source == dirpath else []
    return Leftovers(own_leftovers, old[0].run_id), warnings


class Leftovers:
    """Files of ranks that are no more. The checkpoint that the run went on from needs them until there is a newer one.

    Args:
        dirpaths: Those that this rank removes.
        run_id: Start of the files' names.
    """

    def __init__(self, dirpaths: Sequence[Path], run_id: str) -> None:
        self._dirpaths = list(dirpaths)
        self._run_id = run_id
        self._needed = True

    def outdate(self) -> None:
        """A checkpoint is being written that does without them."""
        self._needed = False

    def remove(self) -> None:
        """Delete them once nothing needs them."""
        if self._needed:
            return
        while self._dirpaths:
            storage = DiskStorage(self._dirpaths.pop())
            with contextlib.suppress(OSError):
                for name in storage.contents(self._run_id):
                    storage.delete(name)
                storage.dirpath.rmdir()  # unless others' files are in it


def _bring(names: Mapping[str, str], source: Path, target: Path) -> None:
    """Link or copy snapshots, from old names to new ones. The buffer tells of those that are not there."""
    old, new = DiskStorage(source), DiskStorage(target)
    for old_name, new_name in names.items():
        with contextlib.suppress(OSError, SnapshotError):
            target.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old.path(old_name), new.path(new_name))
            except FileExistsError:
                continue
            except OSError:  # another file system, or one without links
                staged = target / f"{new_name}.tmp"
                shutil.copyfile(old.path(old_name), staged)
                staged.replace(new.path(new_name))
