"""What a rank leaves for followers at a due moment: written behind training, and taken away when nobody needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lightning_ckmerge.artifact.due import (
    INDEX_NAME,
    DuePart,
    DueResult,
    RunInfo,
    due_path,
    due_step,
    has_result,
    list_due,
    part_dirpath,
    remove_due,
    remove_part,
)
from lightning_ckmerge.artifact.leases import find_lease
from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.buffer.blocks import cast_blocks
from lightning_ckmerge.buffer.state import Entry
from lightning_ckmerge.buffer.storage import DiskStorage, Stored
from lightning_ckmerge.buffer.writer import reached
from lightning_ckmerge.core.layout import Flats, TensorLayout
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import CkmergeError
from lightning_ckmerge.plugin.rank.buffer import RankBuffer
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.rank.resume import buffer_dirpath


class RankDues:
    """The due searches of one rank. No rank waits for another, nor for the disk, nor for a follower.

    The newest due search stays whole, an older one only while a follower's lease on it counts.

    Args:
        model: Whose weights.
        buffer: Whose snapshots.
        place: The run's directory.
        session: Eight hexadecimal digits of this session of training, the same on all ranks.
        device: The weights' device.

    Attributes:
        num_left: Due searches that were left here so far.
        num_bytes: Bytes that the last one took, beside the snapshots.
    """

    def __init__(
        self, model: RankModel, buffer: RankBuffer, place: Place, *, session: str, device: torch.device
    ) -> None:
        self._model = model
        self._buffer = buffer
        self._dirpath = place.dirpath
        self._run_id = place.run_id
        self._session = session
        self._device = device
        self._rank, self._world_size = model.comm.rank, model.comm.world_size
        self._lent: dict[Path, frozenset[str]] = {}  # by due search
        self._is_writing = False
        self.num_left = 0
        self.num_bytes = 0
        for due in list_due(self._dirpath):  # of an earlier session
            with contextlib.suppress(OSError, CkmergeError):
                self._lent[due] = DuePart.read(self._part(due)).names
        self._buffer.rolling.lend(self._names())

    def leave(self, step: int, info: RunInfo) -> bool:
        """Leave a due search. Weights are copied to host memory; the rest is done behind training.

        Returns:
            Whether it was left: not while an earlier one is still being written, so that memory holds one at most.
        """
        due = due_path(self._dirpath, step, self._session)
        if self._is_writing or due in self._lent:
            return False
        self._is_writing = True
        try:
            layout, weights = self._copy_weights()
            mean = self._buffer.rolling.copy_mean()
            ready = reached(self._device)
        except BaseException:
            self._is_writing = False
            raise
        self.num_left += 1
        self._buffer.rolling.hand_over(partial(self._write, due, step, info, layout, weights, mean, ready))
        return True

    def settle(self) -> dict[str, list[str]]:
        """Wait for the own writing, at the end of training, and take away what nobody needs by now.

        Returns:
            Names of files that only followers need still, by their directory's name.
        """
        kept: list[str] = []

        def look(entries: Sequence[Entry]) -> None:
            self._sweep()
            kept.extend(sorted(self._names() - {e.stored.name for e in entries}))

        self._buffer.rolling.hand_over(look)
        self._buffer.rolling.flush()
        return {self._buffer_name(): kept} if kept else {}

    def _copy_weights(self) -> tuple[TensorLayout, Flats]:
        """Copy the tensors that this rank owns, and on rank 0 those that are not averaged, to host memory."""
        ownership = self._model.ownership
        ownership.settle()
        tensors = ownership.owned() + (ownership.others() if self._rank == 0 else [])
        layout = TensorLayout(tensors)
        copy = layout.allocate("cpu", pinned=self._device.type == "cuda")
        with torch.no_grad():
            for own, live in zip(layout.views(copy), layout.order(tensors), strict=True):
                own.copy_(live, non_blocking=True)
        return layout, copy

    def _write(
        self,
        due: Path,
        step: int,
        info: RunInfo,
        layout: TensorLayout,
        weights: Flats,
        mean: tuple[Segment, Flats] | None,
        ready: torch.cuda.Event | None,
        entries: Sequence[Entry],
    ) -> None:
        """Runs in the writer's thread; the index comes last."""
        try:
            if ready is not None:
                ready.synchronize()
            directory = self._part(due)
            storage = DiskStorage(directory)
            latest = _store(storage, f"{self._run_id}-{step:09d}-{step:09d}-latest.safetensors", layout, weights)
            opened = None
            if mean is not None:
                segment, flats = mean
                name = f"{self._run_id}-{segment.first_step:09d}-{segment.last_step:09d}-open.safetensors"
                opened = Entry(
                    segment=segment, stored=_store(storage, name, self._buffer.rolling.accumulator_layout, flats)
                )
            part = DuePart(
                run_id=self._run_id,
                step=step,
                rank=self._rank,
                world_size=self._world_size,
                buffer=self._buffer_name(),
                snapshots=tuple(entries),
                open=opened,
                latest=latest,
                info=info,
            )
            self._lent[due] = part.names
            part.write(directory)
            self.num_bytes = latest.num_bytes + (opened.stored.num_bytes if opened else 0)
        finally:
            self._is_writing = False
            self._sweep()

    def _sweep(self) -> None:
        """Take away what is done, and older due searches unless somebody works on them."""
        found = sorted(list_due(self._dirpath), key=self._age)
        own = [due for due in found if (self._part(due) / INDEX_NAME).is_file()]
        # Those that other ranks have left already, and this one has not, come after its newest.
        for due in found[: found.index(own[-1]) + 1] if own else []:
            is_done = has_result(self._dirpath, due.name)
            if (due == own[-1] and not is_done) or find_lease(due) is not None:
                continue
            # Its index goes first: a follower that has its lease by now finds it gone, and one that had it before is
            # seen here.
            (self._part(due) / INDEX_NAME).unlink(missing_ok=True)
            if find_lease(due) is not None:
                continue
            remove_part(self._part(due))
            if self._rank == 0:
                self._remove_strangers(due)
            self._lent.pop(due, None)
            if self._rank == 0 and not is_done:
                self._record_eviction(due)
            remove_due(due)
        self._lent = {due: names for due, names in self._lent.items() if due.exists()}
        self._buffer.rolling.lend(self._names())

    def _remove_strangers(self, due: Path) -> None:
        """Take away the parts of ranks that are no more, since a run went on with another number of them."""
        for path in due.glob("rank=*"):
            if not path.name.endswith(f"-of-{self._world_size:05d}"):
                remove_part(path)

    def _age(self, due: Path) -> tuple[bool, int]:
        """A run that went on from an earlier checkpoint comes by some steps again: its own are the newer ones."""
        return due.name.endswith(self._session), due_step(due)

    def _record_eviction(self, due: Path) -> None:
        DueResult(
            due=due.name,
            run_id=self._run_id,
            step=due_step(due),
            status="evicted",
            reason="no follower came before the next search was due. Start one, or search less often.",
        ).write(self._dirpath)

    def _names(self) -> frozenset[str]:
        return frozenset[str]().union(*self._lent.values())

    def _part(self, due: Path) -> Path:
        return part_dirpath(due, self._rank, self._world_size)

    def _buffer_name(self) -> str:
        return buffer_dirpath(self._dirpath, self._rank, self._world_size).relative_to(self._dirpath).as_posix()


def _store(storage: DiskStorage, name: str, layout: TensorLayout, flats: Flats) -> Stored:
    return storage.write(name, layout, cast_blocks(layout.views(flats), layout))
