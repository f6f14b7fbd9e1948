"""The rolling buffer: averages training's weights over segments and keeps a bounded number of them.

The training thread updates the running mean of the segment in progress; where that is in host memory, the thread of the
staging does, and all others read it after a wait. The writer's thread stores finished segments and keeps the archive in
order. So the archive belongs to the writer while it works; the training thread touches it only after a flush, but for
retiring a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lightning_ckmerge.buffer.archive import Archive, lost
from lightning_ckmerge.buffer.blocks import cast_blocks, fill_nonfinite, with_dtype
from lightning_ckmerge.buffer.host_staging import HostStaging
from lightning_ckmerge.buffer.segment_mean import SegmentMean
from lightning_ckmerge.buffer.state import BufferState, Entry, Progress
from lightning_ckmerge.buffer.storage import Storage, Stored
from lightning_ckmerge.buffer.writer import Writer, beside_training, reached
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import Flats, TensorLayout
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import SnapshotError

# One fills while the other is written; of a long segment, the other holds the mean so far.
NUM_ACCUMULATORS = 2
# Where the run's length is unknown, the finest segment stays between 1 % and 2 % of it.
MAX_FINEST_SEGMENTS = 100


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One entry of the buffer, ready to be merged.

    Args:
        segment: The steps that it stands for.
        sha256: Of its file; ``None`` if it never was one.
        files_sha256: Of the files of all ranks, by rank, where there are several; ``sha256`` is of this rank's.
        tensors: The weights, in the order of the model's layout, in the stored precision. To be read only, and only
            until the buffer's next ``update``; those of a file are read from the disk as they are used.
    """

    segment: Segment
    sha256: str | None
    files_sha256: tuple[str, ...] = ()
    tensors: list[Tensor] = field(repr=False, compare=False)


class RollingBuffer:
    """At most ``config.capacity`` snapshots of the recent past, and the segment in progress.

    Args:
        config: The settings of the buffer.
        layout: The model's floating tensors, in their own precision.
        storage: Where snapshots go.
        device: The weights' device. The running means live there too, or as ``config.accumulate_on`` says.
        run_id: Eight hexadecimal digits that mark this buffer's files; each rank needs its own, or its own directory.
        segment_steps: Length of the finest segment in optimizer steps.
        double_segments: The run's length is unknown: double ``segment_steps`` whenever the run is 100 times as long.
    """

    def __init__(
        self,
        config: BufferConfig,
        layout: TensorLayout,
        storage: Storage,
        *,
        device: torch.device | str,
        run_id: str,
        segment_steps: int,
        double_segments: bool,
    ) -> None:
        self.config = config
        self.segment_steps = segment_steps
        self._double_segments = double_segments
        self._device = torch.device(device)
        self._storage = storage
        self._set_layout(layout)
        self._warnings: deque[str] = deque()
        self._archive = Archive(config, self.stored_layout, storage, run_id, self._warnings)
        self._writer = Writer()
        self._progress = Progress()
        self._open_file: Stored | None = None
        self._state_taken = False
        self._state_loaded = False

    @property
    def num_bytes_in_memory(self) -> int:
        """Bytes that the buffer holds at most in memory: two segments in progress and, if kept there, all snapshots.

        For segments in host memory also the copy of the weights that they are updated from, but not the staging.
        """
        num_stored = 0 if self._storage.durable else self.config.capacity + 2
        means = NUM_ACCUMULATORS * self.accumulator_layout.num_bytes
        return means + num_stored * self.stored_layout.num_bytes + self.num_bytes_of_update

    @property
    def num_bytes_of_update(self) -> int:
        """Bytes that an update sends to host memory, and that wait there to be averaged."""
        return self._layout.num_bytes if self.config.accumulate_on == "host" else 0

    @property
    def num_bytes_on_disk(self) -> int:
        """Bytes that the buffer holds at most on the disk, up to a few KB of headers.

        The kept snapshots, one too many, the one that a pair is pooled into, all that the last checkpoint needs,
        and the segment in progress of the last two checkpoints.
        """
        if not self._storage.durable:
            return 0
        num_open = 2 if self.config.snapshot == "mean" else 0
        num_stored = 2 * self.config.capacity + 2
        return num_stored * self.stored_layout.num_bytes + num_open * self.accumulator_layout.num_bytes

    @property
    def segment_start(self) -> int | None:
        """The first step of the segment in progress; ``None`` before the first update of a run."""
        return self._progress.first_step

    def restart_segment(self) -> None:
        """Start the segment in progress again, after the last step."""
        if self._open_file:
            self._archive.retire(self._open_file.name)
            self._open_file = None
        self._forget_mean()
        self._progress = Progress.after(self._progress.last_step)

    def start_anew(self, layout: TensorLayout, step: int) -> None:
        """Continue after ``step`` with a model of another layout: the snapshots, which do not fit it, are given up.

        Files that the last checkpoint needs stay until there is a newer one.
        """
        self.flush()
        self.pass_by(step)
        self.restart_segment()
        self._set_layout(layout)
        self._archive.start_anew(self.stored_layout)

    def abandon(self) -> None:
        """Give up everything, for good. Only files that the last checkpoint needs stay."""
        if self._staging is not None:
            self._staging.close()
        self._writer.flush()
        self.restart_segment()
        self._archive.start_anew(self.stored_layout)

    def ends_segment(self, step: int) -> bool:
        """Whether ``update`` at this step ends a segment."""
        return self._is_end(step, step if self._progress.first_step is None else self._progress.first_step)

    def pass_by(self, step: int) -> None:
        """Note a step whose weights are not taken in."""
        if self._progress.first_step is None:
            self._progress = Progress.after(step - 1)
        self._progress.last_step = step

    def reads_weights(self, step: int) -> bool:
        """Whether ``update`` at this step looks at the weights: at most steps it does not."""
        last_update = step - 1 if self._progress.first_step is None else self._progress.last_update
        return self.ends_segment(step) or self._is_update(step, last_update)

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        """Take in the weights after an optimizer step. They may change again once this returns.

        Args:
            weights: The live tensors, in the order of the model's layout; not read unless ``reads_weights`` says so.
            step: Optimizer steps taken so far; above the last call's, by more than 1 where steps are not seen.
        """
        if self._state_taken or self._state_loaded:
            # Only now: the checkpoint of a state is written after `state_dict` returned, and a state that is loaded to
            # look at a run, without going on from it, must leave the run's files alone.
            self._archive.release()
            self._state_taken = self._state_loaded = False
        self.pass_by(step)
        ends = self.ends_segment(step)
        if ends or self._is_update(step, self._progress.last_update):
            self._take(weights, ends=ends)

    def snapshots(self) -> list[Snapshot]:
        """Return the kept snapshots, oldest first, and the mean of the segment in progress if it has begun.

        A damaged snapshot is dropped, with a warning.
        """
        self.flush()
        snapshots = []
        for entry in list(self._archive.entries):
            try:
                tensors = self._in_model_order(self._archive.read(entry), self.stored_layout)
            except SnapshotError as error:
                self._warnings.append(str(error))
            else:
                snapshots.append(Snapshot(segment=entry.segment, sha256=entry.stored.sha256, tensors=tensors))
        if self._progress.num_updates:
            tensors = self._in_model_order(self._read_mean(), self.accumulator_layout)
            snapshots.append(Snapshot(segment=self._progress.segment("mean"), sha256=None, tensors=tensors))
        return snapshots

    def first_step(self) -> int | None:
        """Return the first step that a snapshot stands for; ``None`` if there is nothing to merge."""
        self.flush()
        entries = self._archive.entries
        return entries[0].segment.first_step if entries else self._progress.first_step

    def hand_over(self, job: Callable[[Sequence[Entry]], None]) -> None:
        """Let ``job`` work behind training, on the snapshots as they are now; nothing waits for it.

        Args:
            job: Called in the writer's thread with the kept snapshots, oldest first, once all that have ended by now
                are stored, and before a later one is.
        """
        self._wait_for_means()  # a segment that has ended is the writer's next job
        self._writer.offer(lambda: job(tuple(self._archive.entries)))

    def copy_mean(self) -> tuple[Segment, Flats] | None:
        """Return the mean of the segment in progress, copied to host memory; ``None`` if it has not begun.

        From a GPU the copy is under way when this returns.
        """
        if not self._progress.num_updates:
            return None
        copy = self.accumulator_layout.allocate("cpu", pinned=self._device.type == "cuda")
        for dtype, flat in self._read_mean().items():
            copy[dtype].copy_(flat, non_blocking=True)
        return self._progress.segment("mean"), copy

    def flush(self) -> None:
        """Wait until all that was handed over or ended is written."""
        self._wait_for_means()
        self._writer.flush()

    def lend(self, names: Collection[str]) -> None:
        """Keep the files that followers read, all that they need from now on. For a job that was handed over."""
        self._archive.lend(names)

    def keep(self, segments: Collection[Segment]) -> None:
        """Drop the snapshots of other segments, which another rank has lost: buffers that differ pool other pairs."""
        self.flush()
        for entry in list(self._archive.entries):
            if entry.segment not in segments:
                self._archive.remove(entry)
                self._warnings.append(f"A snapshot must be held by all ranks, got one lost: {lost(entry.segment)}.")

    def take_warnings(self) -> list[str]:
        """Return the faults since the last call, for the caller to report. Does not wait for the writer."""
        failures = [str(error) for error in self._writer.take_failures()]
        return [self._warnings.popleft() for _ in range(len(self._warnings))] + failures

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for ``load_state_dict``; no tensors.

        A durable storage gets the mean in progress as a file, so that nothing is lost; ``saved`` says whether it did.
        The files that this state names are kept until the first update after the next state was taken.
        """
        self.flush()
        self._save_mean()
        state = BufferState(
            run_id=self._archive.run_id,
            snapshot=self.config.snapshot,
            durable=self._storage.durable,
            segment_steps=self.segment_steps,
            entries=tuple(self._archive.entries) if self._storage.durable else (),
            progress=self._progress,
            saved=not self._progress.num_updates or self._open_file is not None,
            file=self._open_file,
        )
        self._archive.hold(state)
        self._state_taken = True
        return state.to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state into a buffer that has not been updated yet. ``take_warnings`` names the losses.

        Files of the same run that the state does not name are deleted by the first update: a crash left them, or steps
        that are undone by then.

        Raises:
            SnapshotError: This is not the state of a buffer.
        """
        state = BufferState.from_dict(state_dict)
        usable = state.durable and self._storage.durable and state.snapshot == self.config.snapshot
        if not usable:
            self._warnings.append(
                "A resumed buffer needs snapshots on disk, of the same kind as before, got "
                f"`buffer.snapshot: {state.snapshot}` {'on disk' if state.durable else 'in memory'} before. It starts "
                f"empty at step {state.progress.last_step}; with `buffer.storage: disk` a restart loses nothing."
            )
        if self._double_segments:
            self.segment_steps = max(self.segment_steps, state.segment_steps)
        self._archive.reopen(state, usable=usable)
        self._resume_mean(state.progress, state.file if usable else None)
        self._state_loaded = True

    def close(self, *, is_saved: bool = True) -> None:
        """Finish writing and end the thread. Snapshots on disk stay.

        Args:
            is_saved: Whether the last state is in a checkpoint. One that training died in may never have been written,
                so the files of the one before have to stay.
        """
        if self._staging is not None:
            self._staging.close()
        self._writer.close()
        if is_saved and self._state_taken and not self._state_loaded:
            self._archive.release()
            self._state_taken = False

    def _set_layout(self, layout: TensorLayout) -> None:
        self._layout = layout
        self.stored_layout, self.accumulator_layout = stored_layouts(self.config, layout)
        self._free_accumulators: SimpleQueue[Flats] = SimpleQueue()
        self._num_accumulators = 0
        self._mean = self._new_mean()
        self._staging: HostStaging | None = None
        if self.config.accumulate_on == "host":
            self._staging = HostStaging(layout, self._device, parse_size(self.config.bucket_size))

    @property
    def _means_device(self) -> torch.device:
        return self._device if self._staging is None else torch.device("cpu")

    def _forget_mean(self) -> None:
        if self._staging is not None:
            self._staging.close()
        for flats in self._mean.memory():
            self._free_accumulators.put(flats)
        self._mean = self._new_mean()

    def _is_end(self, step: int, first_step: int) -> bool:
        return step - first_step + 1 >= self.segment_steps

    def _is_update(self, step: int, last_update: int) -> bool:
        return self.config.snapshot == "mean" and step - last_update >= self.config.update_every_n_steps

    def _take(self, weights: Sequence[Tensor], *, ends: bool) -> None:
        self._progress.num_updates += 1
        self._progress.last_update = self._progress.last_step
        mean, finish = self._mean, self._end_segment() if ends else None

        def take(weights: Sequence[Tensor]) -> None:
            mean.take(weights)
            if finish is not None:
                finish(weights)

        if self._staging is None:
            take(weights)
        else:
            self._staging.send(weights, take)

    def _read_mean(self) -> Flats:
        """Return the mean of the segment in progress, to be read until the next update."""
        self._wait_for_means()
        return self._mean.read()

    def _wait_for_means(self) -> None:
        if self._staging is not None:
            self._staging.wait()

    def _new_mean(self) -> SegmentMean:
        return SegmentMean(
            self._acquire_accumulator, lambda flats: self._in_model_order(flats, self.accumulator_layout)
        )

    def _acquire_accumulator(self) -> Flats:
        if self._num_accumulators < NUM_ACCUMULATORS and self._free_accumulators.empty():
            self._num_accumulators += 1
            pinned = self._staging is not None and self._device.type == "cuda"
            return self.accumulator_layout.allocate(self._means_device, pinned=pinned)
        return self._free_accumulators.get()

    def _end_segment(self) -> Callable[[Sequence[Tensor]], None]:
        """Begin the next segment, and return what is left to do once the last weights are in the mean of this one."""
        segment = self._progress.segment(self.config.snapshot)
        finish = partial(self._finish, self._mean, segment, self.segment_steps)
        if self._open_file:
            self._archive.retire(self._open_file.name)
        self._mean, self._open_file = self._new_mean(), None
        self._progress = Progress.after(segment.last_step)
        if self._double_segments and segment.last_step >= MAX_FINEST_SEGMENTS * self.segment_steps:
            self.segment_steps *= 2
        return finish

    def _finish(self, mean: SegmentMean, segment: Segment, finest: int, weights: Sequence[Tensor]) -> None:
        """Hand a segment's mean over to be stored, and give back the memory that it needs no more."""
        accumulator = mean.read()
        means = self._in_model_order(accumulator, self.accumulator_layout)
        for slot, own, newest in zip(self._layout.slots, means, weights, strict=True):
            if slot.role == "buffer":
                fill_nonfinite(own, newest)
        for spare in mean.memory()[1:]:
            self._free_accumulators.put(spare)
        self._writer.submit(partial(self._store, segment, accumulator, finest, reached(self._means_device)))

    def _store(self, segment: Segment, accumulator: Flats, finest: int, ready: torch.cuda.Event | None) -> None:
        """Runs in the writer's thread."""
        blocks = cast_blocks(self.accumulator_layout.views(accumulator), self.stored_layout)
        with beside_training(self._device, ready):
            try:
                self._archive.admit(segment, blocks)
            finally:
                self._free_accumulators.put(accumulator)
            self._archive.make_room(finest)

    def _save_mean(self) -> None:
        """Write the mean in progress to a file, where that would survive and has not been done at this step."""
        if not (self._storage.durable and self._progress.num_updates):
            return
        old, name = self._open_file, self._archive.name(self._progress.segment("mean"), "open")
        if old and old.name == name:
            return
        blocks = cast_blocks(self.accumulator_layout.views(self._read_mean()), self.accumulator_layout)
        try:
            self._open_file = self._storage.write(name, self.accumulator_layout, blocks)
        except OSError as error:
            self._open_file = None
            self._warnings.append(
                f"The segment in progress must fit the disk to survive a restart, got {error}. Resuming from this "
                "checkpoint would start it again; free some space."
            )
        if old:
            self._archive.retire(old.name)

    def _resume_mean(self, progress: Progress, file: Stored | None) -> None:
        self._progress = progress
        if not progress.num_updates:
            return
        try:
            if file is None:
                raise SnapshotError("The checkpoint does not hold the segment in progress.")
            flats = self._storage.read(file, self.accumulator_layout)
        except SnapshotError as error:
            self._progress = Progress.after(progress.last_step)
            self._warnings.append(f"{error} The segment starts again after step {progress.last_step}.")
            return
        self._open_file = file
        self._mean.resume(flats, progress.num_updates)

    def _in_model_order(self, flats: Flats, layout: TensorLayout) -> list[Tensor]:
        return in_order_of(self._layout, flats, layout)


def stored_layouts(config: BufferConfig, layout: TensorLayout) -> tuple[TensorLayout, TensorLayout]:
    """Return the layouts of a model's snapshots as they are stored, and of its segment in progress."""
    dtype = getattr(torch, config.dtype) if config.dtype else None
    is_mean = config.snapshot == "mean"
    stored = with_dtype(layout, (dtype or torch.float32) if is_mean else dtype)
    return stored, with_dtype(layout, torch.float32) if is_mean else stored


def in_order_of(model: TensorLayout, flats: Flats, layout: TensorLayout) -> list[Tensor]:
    """Return the tensors of a snapshot's memory, which ``layout`` describes, in the order of the model's layout."""
    by_name = {slot.name: view for slot, view in zip(layout.slots, layout.views(flats), strict=True)}
    return [by_name[slot.name] for slot in model.slots]
