"""Reads a due search into the follower's module: the latest weights, and the snapshots beside them, whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_ckmerge.artifact.due import DueSearch
from lightning_ckmerge.buffer.archive import lost
from lightning_ckmerge.buffer.rolling import Snapshot, in_order_of, stored_layouts
from lightning_ckmerge.buffer.sharded_snapshot import NewRank, SnapshotParts, build
from lightning_ckmerge.buffer.storage import DiskStorage, Stored
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import TensorLayout, as_real
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.specs import whole
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.errors import ConfigError, SnapshotError
from lightning_ckmerge.plugin.rank.model import RankModel


class DueReader:
    """Reads due searches of one run, one after another.

    Snapshots of a single process are mapped where they lie. Those of several ranks are put together in files of the
    follower's own, one a snapshot, which the next due search takes up where they are still needed.

    Args:
        config: The run's settings of the buffer.
        model: The follower's model, whole, in one process.
        scratch: An existing directory for files of its own.
        tell: Told of snapshots that cannot be read.
    """

    def __init__(self, config: BufferConfig, model: RankModel, scratch: Path, tell: Callable[[str], None]) -> None:
        self._model = model
        self._stored, self._accumulator = stored_layouts(config, model.layout)
        self._scratch = DiskStorage(scratch)
        self._storages: dict[Path, DiskStorage] = {}  # they know the files that have been hashed
        self._whole: dict[tuple[str, ...], Stored] = {}
        self._tell = tell

    def load(self, due: DueSearch) -> None:
        """Put the latest weights into the module.

        Raises:
            ConfigError: They are those of another module.
            SnapshotError: A file is damaged.
        """
        ownership = self._model.ownership
        targets = {o.name: as_real(o.tensor) for o in (*ownership.owned(), *ownership.others())}
        paths = [DiskStorage(d).path(p.latest.name) for d, p in zip(due.part_dirpaths, due.parts, strict=True)]
        hashes = [p.latest.sha256 or "" for p in due.parts]
        parts = SnapshotParts(paths, hashes, {name: tuple(t.shape) for name, t in targets.items()})
        _require_same(parts, targets)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(parts.assemble(name, whole(target.shape), target.dtype))

    def snapshots(self, due: DueSearch) -> list[Snapshot]:
        """Return what is merged beside the latest weights, oldest first; what a rank has lost is left out.

        The tensors are to be read only, and only until the next call.
        """
        found, used = [], set[tuple[str, ...]]()
        for segment, olds in _common(due).items():
            key = tuple(s.sha256 or "" for s in olds)
            try:
                snapshot = self._read(segment, olds, due.buffer_dirpaths, self._stored)
            except (SnapshotError, OSError) as error:
                self._tell(f"{error} {lost(segment).capitalize()}.")
            else:
                used.add(key)
                found.append(snapshot)
        opened = [p.open for p in due.parts if p.open is not None]
        if len(opened) == len(due.parts) and len({e.segment for e in opened}) == 1:
            mean = self._read(opened[0].segment, [e.stored for e in opened], due.part_dirpaths, self._accumulator)
            # In the run it is no file.
            found.append(Snapshot(segment=mean.segment, sha256=None, tensors=mean.tensors))
            used.add(tuple(e.stored.sha256 or "" for e in opened))
        self._forget(used)
        return found

    def _read(
        self, segment: Segment, olds: Sequence[Stored], dirpaths: Sequence[Path], layout: TensorLayout
    ) -> Snapshot:
        if len(olds) == 1:
            storage = self._storages.setdefault(dirpaths[0], DiskStorage(dirpaths[0]))
            tensors = in_order_of(self._model.layout, storage.read(olds[0], layout), layout)
            return Snapshot(segment=segment, sha256=olds[0].sha256, tensors=tensors)
        hashes = tuple(s.sha256 or "" for s in olds)
        stored = self._whole.get(hashes) or self._build(segment, olds, dirpaths, layout)
        self._whole[hashes] = stored
        tensors = in_order_of(self._model.layout, self._scratch.read(stored, layout), layout)
        return Snapshot(segment=segment, sha256=None, files_sha256=hashes, tensors=tensors)

    def _build(
        self, segment: Segment, olds: Sequence[Stored], dirpaths: Sequence[Path], layout: TensorLayout
    ) -> Stored:
        marks = hashlib.sha256("".join(s.sha256 or "" for s in olds).encode()).hexdigest()[:8]
        name = f"{marks}-{segment.first_step:09d}-{segment.last_step:09d}-{segment.kind}.safetensors"
        alone = NewRank(
            rank=0,
            world_size=1,
            storage=self._scratch,
            stored=self._stored,
            accumulator=self._accumulator,
            shapes=self._model.ownership.shapes,
        )
        return build(name, layout, olds, dirpaths, alone)

    def _forget(self, used: set[tuple[str, ...]]) -> None:
        for key in self._whole.keys() - used:
            self._scratch.delete(self._whole.pop(key).name)


def _common(due: DueSearch) -> dict[Segment, list[Stored]]:
    """Return the files, by rank, of the snapshots that no rank has lost, oldest first."""
    held = [{e.segment: e.stored for e in p.snapshots} for p in due.parts]
    return {segment: [h[segment] for h in held] for segment in held[0] if all(segment in h for h in held)}


def _require_same(parts: SnapshotParts, targets: Mapping[str, Tensor]) -> None:
    """Raise ``ConfigError`` unless the files hold the module's tensors."""
    common = targets.keys() & parts.names
    faults = {
        "missing from the run's weights": targets.keys() - parts.names,
        "unknown to the follower's module": parts.names - targets.keys(),
        "of another shape": {n for n in common if parts.shape(n) != tuple(targets[n].shape)},
        "of another precision": {n for n in common if parts.dtype(n) != targets[n].dtype},
    }
    if found := "; ".join(f"{listed(names)} {fault}" for fault, names in faults.items() if names):
        raise ConfigError(f"a follower's module must be the run's, got {found}. Use the run's config and code.")
