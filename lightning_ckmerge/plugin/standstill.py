"""The run at a standstill: its weights and all else around them, kept while candidates take their place."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.plugin.guard import Guard


class Standstill:
    """Within it, weights and state may change; after it, both are as they were before, bit for bit.

    Args:
        trainer: The Trainer, inside ``fit``.
        ownership: Knows this rank's tensors.
        layout: Of all tensors that this rank holds. Their copy is host memory: a candidate needs the device's.
    """

    def __init__(self, trainer: Trainer, ownership: Ownership, layout: TensorLayout) -> None:
        self._trainer = trainer
        self._ownership = ownership
        self._layout = layout
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> Standstill:
        trainer: Any = self._trainer
        self._ownership.settle()
        flats = self._layout.allocate("cpu", pinned=trainer.strategy.root_device.type == "cuda")
        self._copies = self._layout.views(flats)
        for copy, live in zip(self._copies, self._live(), strict=True):
            copy.copy_(live)
        self.weights = {slot.name: copy for slot, copy in zip(self._layout.slots, self._copies, strict=True)}
        self._guard = Guard(trainer.lightning_module, trainer.model or trainer.lightning_module, [trainer.datamodule])
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._guard.restore()
        finally:  # above all, the weights
            self._ownership.settle()
            for copy, live in zip(self._copies, self._live(), strict=True):
                live.copy_(copy)

    def watch(self, others: Iterable[Any]) -> None:
        """Keep more objects as they are now."""
        self._guard.watch(others)

    def begin(self) -> None:
        """Bring all but the weights to where the standstill began."""
        self._guard.begin()
        self._ownership.settle()

    def random_state(self) -> Any:
        """Return the state of all that draws random numbers, as it is now."""
        return self._guard.random_state()

    def set_random_state(self, state: Any) -> None:
        """Put such a state back."""
        self._guard.set_random_state(state)

    def _live(self) -> list[Tensor]:
        return self._layout.order(self._ownership.local())
