"""One rank's part of the buffer: filled by training, the same snapshots as on other ranks, taken up after a restart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.wording import quoted
from lightning_ckmerge.distributed.comm import together
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.rank.resume import Leftovers, buffer_dirpath, fingerprint, resume_buffer
from lightning_ckmerge.plugin.triggers import finest_segment

# The parts that differ between faults of one kind: steps, file names, sizes.
NUMBER = re.compile(r"[\da-f]*\d[\da-f]*")
MAX_TOLD = 2
# Of one module buffer: one that changes again, as a memory bank that grows, will go on.
MAX_CHANGES = 2


class RankBuffer:
    """Keeps the snapshots of one rank's tensors. A fault is a warning, after the call in which it was seen.

    A model may change while it is trained. Ranks agree on that where a segment ends and where a search begins, which is
    at the same step for all; until then, a rank that has seen a change or a fault takes nothing in.

    Args:
        config: The settings of the buffer.
        model: Whose tensors.
        place: Where artifacts go; snapshots on disk are below it.
        device: The weights' device.
        total_steps: Length of the run, where it is known.
        warn: Tells people, on rank 0.

    Attributes:
        rolling: The buffer itself.
    """

    def __init__(
        self,
        config: BufferConfig,
        model: RankModel,
        place: Place,
        *,
        device: torch.device,
        total_steps: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self._model = model
        self._warn = warn
        self._told: Counter[str] = Counter()
        self._num_changes: Counter[str] = Counter()
        self._place = place
        self._leftovers = Leftovers([], "")
        self._changes: list[str] = []
        self._fault: Exception | None = None
        storage: Storage = (
            DiskStorage(buffer_dirpath(place.dirpath, model.comm.rank, model.comm.world_size))
            if config.storage == "disk"
            else MemoryStorage(device if config.storage == "device" else "cpu")
        )
        self.rolling = RollingBuffer(
            config,
            model.layout,
            storage,
            device=device,
            run_id=place.file_id or place.run_id,
            segment_steps=finest_segment(config, total_steps),
            double_segments=config.every_n_train_steps is None and total_steps is None,
        )

    def update(self, step: int) -> bool:
        """Take in the live weights after an optimizer step, and return whether the buffer started again.

        Raises:
            Exception: It cannot continue, on this rank or another. Every rank raises, where a segment ends.
        """
        if not self.rolling.reads_weights(step):
            self.rolling.update((), step)
            return False
        if self.rolling.ends_segment(step) and self.agree(step):
            return True
        self._note_changes(everywhere=False)
        if self._changes or self._fault is not None:
            self.rolling.pass_by(step)
        else:
            self._take(step)
        self.warn()
        return False

    def agree(self, step: int) -> bool:
        """Start again if the model has changed on any rank, and return whether it did. All ranks call it together.

        Raises:
            Exception: The buffer cannot continue, on this rank or another.
        """
        self._note_changes(everywhere=True)
        comm = self._model.comm
        if self._fault is not None:
            comm.give_up(self._fault)  # once: the others leave when they hear it
            raise self._fault
        changes = next((found for found in comm.exchange(self._changes) if found), [])
        if changes:
            self._start_anew(step, changes)
        return bool(changes)

    def is_empty(self, step: int) -> bool:
        """Whether there is nothing of steps up to this one, on any rank. All ranks call it together."""
        return any(self._model.comm.exchange((self.rolling.first_step() or 0) > step))

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots that no rank has lost; others are dropped. All ranks call it together."""
        own = self.rolling.snapshots()
        self.warn()
        everywhere = self._model.comm.exchange({s.segment: s.sha256 for s in own})
        common = set.intersection(*map(set, everywhere))
        self.rolling.keep(common)
        if len(everywhere) == 1:
            return own
        files = {segment: tuple(f for rank in everywhere if (f := rank[segment]) is not None) for segment in common}
        return [replace(s, files_sha256=files[s.segment]) for s in own if s.segment in common]

    def _note_changes(self, *, everywhere: bool) -> None:
        try:
            self._changes = self._changes or self._model.changes(everywhere=everywhere)
        except Exception as error:
            self._fault = self._fault or error

    def _take(self, step: int) -> None:
        try:
            self._leftovers.remove()
            self.rolling.update(self._model.live(), step)
        except Exception as error:
            self._fault = error

    def _start_anew(self, step: int, changes: list[str]) -> None:
        """Rebuild everything that depends on the model's tensors, which are the same on all ranks."""
        is_loss = (self.rolling.first_step() or step) <= step
        self._num_changes.update(name for name in changes if self._model.ownership.is_buffer(name))
        growing = [name for name in changes if self._num_changes[name] == MAX_CHANGES]
        with together(self._model.comm):
            self._model.begin(left_out=growing)
        self._model.ownership.check_alike()
        with together(self._model.comm):
            self.rolling.start_anew(self._model.layout, step)
        self._changes = []
        if growing:
            self._warn(
                f"The model changed by step {step}: {quoted(growing)} changed again. From now on merges leave them "
                "out, as they are in the latest weights, and the buffer starts again for the last time because of them."
            )
        elif is_loss:
            self._warn(
                f"The model changed by step {step}: {quoted(changes)} were added, removed, replaced, resized, cast or "
                "moved. Older snapshots no longer fit, so the buffer starts again."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain data that restores all ranks' buffers; no tensors. All ranks call it together."""
        with together(self._model.comm):
            own = self.rolling.state_dict()
        self._leftovers.outdate()
        # A checkpoint holds rank 0's state alone, so that has to hold every rank's.
        return {
            "buffers": self._model.comm.exchange(own),
            "layouts": self._model.comm.exchange(fingerprint(self._model.layout)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, also of other ranks and shards. All ranks call it together.

        Raises:
            SnapshotError: This is not the state of a buffer.
        """
        model = self._model
        with together(model.comm):
            self._leftovers, warnings = resume_buffer(
                self.rolling, state["buffers"], state["layouts"], model.ownership, model.comm, self._place
            )
        if len(set(model.comm.exchange(self.rolling.segment_start))) > 1:
            self.rolling.restart_segment()  # where one rank has lost it: segments end at the same step for all
        for warning in warnings:
            self._warn(warning)
        self.warn()

    def warn(self) -> None:
        """Warn of the faults since the last call, of each kind twice at most: a full disk stays full."""
        for warning in self.rolling.take_warnings():
            kind = NUMBER.sub("", warning)
            self._told[kind] += 1
            if self._told[kind] <= MAX_TOLD:
                self._warn(
                    warning + (" Further warnings of this kind are suppressed." if self._told[kind] == MAX_TOLD else "")
                )
