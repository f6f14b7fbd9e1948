"""The snapshots that the buffer keeps, and the files behind them: carries out the decisions of ``retention``.

A file goes when its replacement is complete and the last checkpoint does not need it. So a crash at any moment leaves
a checkpoint with all that it names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from lightning_ckmerge.buffer.blocks import pool_blocks
from lightning_ckmerge.buffer.retention import Drop, decide, pooled
from lightning_ckmerge.buffer.state import BufferState, Entry
from lightning_ckmerge.buffer.storage import Storage, Stored
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import Flats, TensorLayout
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import SnapshotError


class Archive:
    """The kept snapshots. One thread at a time.

    Args:
        config: How many, and laid out how.
        layout: Of the stored snapshots.
        storage: Their place.
        run_id: Eight hexadecimal digits that start the name of every file.
        warnings: Takes faults that stop nothing.
    """

    def __init__(
        self, config: BufferConfig, layout: TensorLayout, storage: Storage, run_id: str, warnings: deque[str]
    ) -> None:
        self.entries: list[Entry] = []
        self.run_id = run_id
        self._config = config
        self._layout = layout
        self._storage = storage
        self._warnings = warnings
        self._saved_names: frozenset[str] = frozenset()
        self._retired: set[str] = set()

    def admit(self, segment: Segment, blocks: Iterable[Tensor]) -> None:
        """Store a snapshot as the newest one.

        Args:
            segment: Follows the newest one's.
            blocks: Its flat memory, in the stored precision.

        Raises:
            SnapshotError: It could not be written; the others stay as they are.
        """
        stored = self._write(segment, blocks)
        self.entries.append(Entry(segment=segment, stored=stored))

    def make_room(self, finest: int) -> None:
        """Drop and pool until at most ``capacity`` snapshots are left.

        Args:
            finest: Steps of the finest segment.

        Raises:
            SnapshotError: One of a pair was damaged, or there was no space for the pooled one; it is gone.
        """
        capacity, layout = self._config.capacity, self._config.layout
        while action := decide([e.segment for e in self.entries], capacity=capacity, layout=layout, finest=finest):
            if isinstance(action, Drop):
                self.remove(self.entries[action.index])
            else:
                self._pool(action.index)

    def read(self, entry: Entry) -> Flats:
        """Return a snapshot's memory.

        Raises:
            SnapshotError: It is missing or damaged, and no longer kept.
        """
        try:
            return self._storage.read(entry.stored, self._layout)
        except SnapshotError as error:
            self.remove(entry)
            raise SnapshotError(f"{error} Until then, {lost(entry.segment)}.") from error

    def remove(self, entry: Entry) -> None:
        """Give up a snapshot."""
        self.entries.remove(entry)
        self.retire(entry.stored.name)

    def start_anew(self, layout: TensorLayout) -> None:
        """Give up all snapshots; those to come are of another layout."""
        for entry in list(self.entries):
            self.remove(entry)
        self._layout = layout

    def name(self, segment: Segment, kind: str) -> str:
        """Return the name of a file."""
        return f"{self.run_id}-{segment.first_step:09d}-{segment.last_step:09d}-{kind}.safetensors"

    def retire(self, name: str) -> None:
        """Delete a file, now or when no checkpoint needs it any more."""
        if name in self._saved_names:
            self._retired.add(name)
        else:
            self._delete(name)

    def hold(self, state: BufferState) -> None:
        """From here on, keep the files that ``state`` names; those of the state before stay until ``release``."""
        self._saved_names = state.names

    def release(self) -> None:
        """Delete the retired files that the last state does not need."""
        due = self._retired - self._saved_names
        self._retired &= self._saved_names
        for name in due:
            self._delete(name)

    def reopen(self, state: BufferState, *, usable: bool) -> None:
        """Take over the files of an earlier process. Files that its state does not name go with the next ``release``.

        Args:
            state: That state.
            usable: Whether its snapshots may enter this buffer; otherwise they are kept for the checkpoint's sake only.
        """
        self.run_id = state.run_id
        found = self._storage.contents(state.run_id)
        self._saved_names = state.names
        wanted = state.entries if usable else ()
        self.entries += [e for e in wanted if found.get(e.stored.name) == e.stored.num_bytes]
        if missing := [e for e in wanted if e not in self.entries]:
            self._warnings.append(
                f"The checkpoint's snapshots must be on disk, got {len(missing)} of {len(wanted)} missing or "
                f"incomplete, starting with {missing[0].stored.name}. Resume with the run's `dirpath`; until then, "
                f"{lost(*(e.segment for e in missing))}."
            )
        kept = {e.stored.name for e in self.entries} | ({state.file.name} if usable and state.file else set())
        self._retired = found.keys() - kept

    def _pool(self, index: int) -> None:
        older, newer = self.entries[index : index + 2]
        segment, stored = pooled(older.segment, newer.segment), newer.stored
        if segment.kind == "mean":
            old, new = (self._layout.views(self.read(e)) for e in (older, newer))
            share_of_newer = newer.segment.num_steps / (older.segment.num_steps + newer.segment.num_steps)
            try:
                stored = self._write(segment, pool_blocks(old, new, share_of_newer, self._layout))
            except SnapshotError as error:
                # Both cannot stay, or the buffer would outgrow its capacity; the newer one is worth more.
                self.remove(older)
                raise SnapshotError(f"{error} Of these, steps from {newer.segment.first_step} on are kept.") from error
        self.entries[index : index + 2] = [Entry(segment=segment, stored=stored)]
        for name in {older.stored.name, newer.stored.name} - {stored.name}:
            self.retire(name)

    def _write(self, segment: Segment, blocks: Iterable[Tensor]) -> Stored:
        try:
            return self._storage.write(self.name(segment, segment.kind), self._layout, blocks)
        # Not OSError alone: memory runs out as RuntimeError on a GPU, and no snapshot is worth the run.
        except Exception as error:
            raise SnapshotError(
                f"A snapshot must fit its storage, got {type(error).__name__}: {error}. Free some space, or lower "
                f"`buffer.capacity` or `buffer.dtype`; until then, {lost(segment)}."
            ) from error

    def _delete(self, name: str) -> None:
        try:
            self._storage.delete(name)
        except OSError as error:
            self._retired.add(name)
            self._warnings.append(
                f"The buffer must be able to delete its files, got {error}. It tries again after the next checkpoint; "
                f"remove {name} yourself if it stays."
            )


def lost(*segments: Segment) -> str:
    """Return a phrase naming the lost steps, from their segments, oldest first."""
    spans: list[tuple[int, int]] = []
    for segment in segments:
        follows = spans and spans[-1][1] + 1 == segment.first_step
        first = spans.pop()[0] if follows else segment.first_step
        spans.append((first, segment.last_step))
    told = ", ".join(str(last) if first == last else f"{first} to {last}" for first, last in spans)
    noun = "step" if len(spans) == 1 and spans[0][0] == spans[0][1] else "steps"
    return f"merges will miss {noun} {told}"
