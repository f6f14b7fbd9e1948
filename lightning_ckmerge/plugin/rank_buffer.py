"""One rank's part of the buffer: filled by training, the same snapshots as on other ranks, taken up after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.distributed.comm import together
from lightning_ckmerge.plugin.rank_model import RankModel
from lightning_ckmerge.plugin.resume import Leftovers, buffer_dirpath, fingerprint, resume_buffer
from lightning_ckmerge.plugin.run_length import finest_segment


class RankBuffer:
    """Keeps the snapshots of one rank's tensors. What goes wrong is a warning, after the call in which it was seen.

    Args:
        config: What to keep.
        model: Whose tensors.
        place: Where artifacts go; snapshots on disk lie below it.
        device: The weights' device.
        total_steps: Length of the run, where it is known.

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
    ) -> None:
        self._model = model
        self._place = place
        self._leftovers = Leftovers([], "")
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
            run_id=place.run_id,
            segment_steps=finest_segment(config, total_steps),
            double_segments=config.every_n_train_steps is None and total_steps is None,
        )

    def update(self, step: int) -> None:
        """Take in the live weights after an optimizer step."""
        self._leftovers.remove()
        self.rolling.update(self._model.live() if self.rolling.reads_weights(step) else (), step)
        self.warn()

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

    def state_dict(self) -> dict[str, Any]:
        """Return plain data from which all ranks' buffers go on; no tensors. All ranks call it together."""
        with together(self._model.comm):
            own = self.rolling.state_dict()
        self._leftovers.outdate()
        # A checkpoint holds rank 0's state alone, so that has to hold everybody's.
        return {
            "buffers": self._model.comm.exchange(own),
            "layouts": self._model.comm.exchange(fingerprint(self._model.layout)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also of other ranks and shards. All ranks call it together.

        Raises:
            SnapshotError: This is not the state of a buffer.
        """
        model = self._model
        with together(model.comm):
            self._leftovers, warnings = resume_buffer(
                self.rolling, state["buffers"], state["layouts"], model.ownership, model.comm, self._place
            )
        for warning in warnings:
            rank_zero_warn(warning)
        self.warn()

    def warn(self) -> None:
        """Warn of what went wrong since the last time."""
        for warning in self.rolling.take_warnings():
            rank_zero_warn(warning)
