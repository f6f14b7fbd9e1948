"""A paused run: its weights and all else around them, kept while candidates take their place."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import explain
from lightning_ckmerge.plugin.restore.bits import same_bits
from lightning_ckmerge.plugin.restore.randomness import is_same_state, random_state, set_random_state
from lightning_ckmerge.plugin.restore.run_state import Gradients, keep_run, run_data, run_weights
from lightning_ckmerge.plugin.restore.saved_state import Allowance, SavedState

# What is copied of the run's state and of its data, in bytes of one thing and in all; the rest is summed up. In data
# that are larger nearly all is data, and not state.
MODULE_ALLOWANCE = (64 << 20, 256 << 20)
OTHER_ALLOWANCE = (4 << 20, 64 << 20)
MAX_COPIED_BYTES = MODULE_ALLOWANCE[1] + OTHER_ALLOWANCE[1]


class PausedRun:
    """Within it, weights and state may change; after it, both are as they were before, bit for bit.

    Args:
        trainer: The Trainer, inside ``fit``.
        ownership: Knows this rank's tensors.
        layout: Of all tensors that this rank holds. Their copy is host memory: a candidate needs the device's.

    Attributes:
        weights: This rank's weights as they were, by name.
        traces: What differed after all had been put back, at any proof.
    """

    def __init__(self, trainer: Trainer, ownership: Ownership, layout: TensorLayout) -> None:
        self._trainer = trainer
        self._ownership = ownership
        self._layout = layout
        self.weights: dict[str, Tensor] = {}
        self.traces: list[str] = []

    @torch.no_grad()
    def __enter__(self) -> PausedRun:
        trainer: Any = self._trainer
        module = trainer.lightning_module
        self._ownership.settle()
        flats = self._layout.allocate("cpu", pinned=trainer.strategy.root_device.type == "cuda")
        copies = self._layout.views(flats)
        # Detached, they stay where the weights are now, whatever memory a parameter is given later.
        self._places = [t.detach() for t in self._layout.order(self._ownership.local())]
        for copy, place in zip(copies, self._places, strict=True):
            copy.copy_(place)
        self.weights = {slot.name: copy for slot, copy in zip(self._layout.slots, copies, strict=True)}
        self._metrics = [m for m in module.modules() if isinstance(m, torchmetrics.Metric)]
        self._random = random_state()
        self._memory = SavedState(run_weights(module), run_data(trainer).values())
        # The module's buffers are copied whatever they take.
        self._memory.take(module, "module", Allowance(*MODULE_ALLOWANCE, buffers=Allowance(sys.maxsize)))
        self._allowance = Allowance(*OTHER_ALLOWANCE)
        keep_run(trainer, self._memory, self._allowance)
        self._gradients = Gradients(module, trainer.optimizers)
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.prove()
            if not self.traces:
                self._memory.forget_writes()
        finally:
            self._gradients.put_back()
            # Whoever still holds this must not keep the run's iterators from ending, nor a copy of the weights.
            self._memory.release()
            self.weights, self._places, self._metrics = {}, [], []

    @property
    def left_out(self) -> dict[str, str]:
        """Places of what is not looked after, with the reasons."""
        return self._memory.left_out

    def watch(self, name: str, objects: Iterable[Any]) -> None:
        """Keep more objects as they are now."""
        for i, item in enumerate(objects):
            self._memory.take(item, f"{name}[{i}]", self._allowance)

    @torch.no_grad()
    def begin(self) -> None:
        """Bring all but the weights to where the pause began, so that a value depends on the weights alone."""
        self._ownership.settle()
        self._restore()
        self._memory.lend()
        for metric in self._metrics:
            metric.reset()

    @torch.no_grad()
    def prove(self) -> None:
        """Put everything back, look at it once more, and keep in ``traces`` what differed all the same."""
        faults = {**self._restore_weights(), **self._restore()}
        traces = self._memory.changed()
        if not is_same_state(random_state(), self._random):
            traces.append("the random state of the process")
        if traces:
            faults.update(self._restore())
        found = [f"{t} ({faults[t]})" if t in faults else t for t in dict.fromkeys([*traces, *faults])]
        self.traces += [trace for trace in found if trace not in self.traces]

    def random_state(self) -> Any:
        """Return the state of all that draws random numbers, as it is now."""
        return random_state(self._memory.generators)

    def set_random_state(self, state: Any) -> None:
        """Put such a state back."""
        set_random_state(state, self._memory.generators)

    def _restore(self) -> dict[str, str]:
        """Put back all but the weights, and return what failed: random state first, and last, should that draw."""
        set_random_state(self._random)
        faults = self._memory.put_back()
        self._gradients.lay_aside()
        set_random_state(self._random)
        return faults

    def _restore_weights(self) -> dict[str, str]:
        self._ownership.settle()
        faults = {}
        for place, (name, copy) in zip(self._places, self.weights.items(), strict=True):
            try:
                saved = copy.to(place.device)
                if not same_bits(place, saved):
                    place.copy_(saved)
            except Exception as error:
                faults[name] = explain(error)
        return faults
