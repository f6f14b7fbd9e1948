"""When a search is due: triggers, the learning rate's way, and the length of the run.

Pure but for the Trainer's arguments that tell how long a run is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ckmerge.config import BufferConfig, Triggers

# With no trigger given: after each quarter of the run; the last one is the search at its end.
NUM_SEARCHES = 4
# Below this share of the peak the weights hardly move, and there is little left to average.
DECAYED_SHARE = 0.1
# A lower level than the one before is kept only if it is lower by this much; a whole decay is some hundred levels.
RESOLUTION = 0.01
# A constant rate differs from itself by rounding only.
MIN_RISE = 1e-6
# Length of the finest segment: this share of a run of known length, else so many steps at first.
SEGMENT_SHARE = 0.01
SEGMENT_STEPS = 25


@dataclass(kw_only=True)
class TriggerState:
    """Decides whether a search is due.

    Args:
        triggers: The callback's triggers.
        total_steps: Length of the run, where it is known.
        step: The last step that was looked at.
        searched_at_s: Training seconds at the last search by time.
        searched_step: The step of the last search of any kind.
    """

    triggers: Triggers
    total_steps: int | None = None
    step: int = 0
    searched_at_s: float = 0.0
    searched_step: int = 0

    def due_at_step(self, step: int, training_s: float) -> bool:
        """Whether to search after ``step``, which may have jumped: some optimizer loops count by twos."""
        before, self.step = self.step, step
        if self.triggers.every_n_train_steps is not None:
            return step // self.triggers.every_n_train_steps > before // self.triggers.every_n_train_steps
        if self.triggers.train_time_interval is not None:
            due = training_s - self.searched_at_s >= self.triggers.train_time_interval.total_seconds()
            self.searched_at_s = training_s if due else self.searched_at_s
            return due
        if self.triggers.every_n_epochs is None and self.total_steps:
            quarter = NUM_SEARCHES * step // self.total_steps
            return NUM_SEARCHES * before // self.total_steps < quarter < NUM_SEARCHES
        return False

    def due_at_epoch_end(self, epoch: int) -> bool:
        """Whether to search after an epoch, counted from 0."""
        return self.triggers.every_n_epochs is not None and (epoch + 1) % self.triggers.every_n_epochs == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {"step": self.step, "searched_at_s": self.searched_at_s, "searched_step": self.searched_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step, self.searched_at_s = int(state["step"]), float(state["searched_at_s"])
        self.searched_step = int(state["searched_step"])


class LearningRates:
    """The learning rates of all parameter groups: the highest, as a share of its own peak, over the steps.

    A group at a constant rate keeps a run high. Unknown rates count as high: a needless search costs minutes, a skipped
    one may cost the best model.

    Attributes:
        is_rising: Whether all of them rose at the last step.
    """

    def __init__(self) -> None:
        self.step = 0
        self._peaks: list[float] = []
        self._levels: list[tuple[int, float]] = []  # falling; each stands for the steps since the one before
        self.is_rising = False

    def record(self, step: int, rates: Sequence[float]) -> None:
        """Take in the rates after a step.

        Args:
            step: Optimizer steps so far; not less than before.
            rates: One a group, in the same order each time.
        """
        if step == self.step:
            return
        before, self.step = self._peaks, step
        self._peaks = [max(pair) for pair in zip_longest(before, rates, fillvalue=0.0)]
        rises = [new > (1 + MIN_RISE) * old for new, old in zip(rates, before, strict=False) if new > 0]
        self.is_rising = bool(rises) and all(rises)
        level = max((r / peak for r, peak in zip(rates, self._peaks, strict=False) if peak > 0), default=1.0)
        while self._levels and self._levels[-1][1] <= level:
            self._levels.pop()
        if self._levels and level >= (1 - RESOLUTION) * self._levels[-1][1]:
            level = self._levels.pop()[1]
        self._levels.append((step, level))

    def objection(self, first_step: int) -> str | None:
        """Return why a search would have little to find now; ``None`` if there is no objection.

        Args:
            first_step: The first step that the buffer's snapshots stand for; not less than before.
        """
        if self.is_rising:
            return "the learning rate is still warming up, so merging would gain little"
        self._levels = [(s, level) for s, level in self._levels if s >= first_step]
        if not self._levels or self._levels[-1][1] >= DECAYED_SHARE * self._levels[0][1]:
            return None
        share = 100 * self._levels[-1][1] / self._levels[0][1]
        return (
            f"the learning rate has decayed to {share:.2g} % of its peak over the buffered steps, so merging would "
            "gain little"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {"step": self.step, "peaks": self._peaks, "levels": self._levels, "is_rising": self.is_rising}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step, self.is_rising = state["step"], state["is_rising"]
        self._peaks, self._levels = list(state["peaks"]), [(step, level) for step, level in state["levels"]]


def rates_of(optimizers: Iterable[Any]) -> list[float]:
    """Return the learning rate of each parameter group that has one."""
    rates = [group.get("lr") for o in optimizers for group in getattr(o, "param_groups", ())]
    return [float(rate) for rate in rates if isinstance(rate, (int, float, Tensor))]


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as far as it can be known before it.

    Args:
        steps: Optimizer steps; ``None``: only training will tell.
        batches: Training batches on each rank; ``None`` where ``steps`` is.
        epochs: Epochs, an unfinished last one counted; ``None``: only training will tell.
    """

    steps: int | None = None
    batches: float | None = None
    epochs: int | None = None


def length_of_run(trainer: Trainer) -> RunLength:
    """Return the length of a run that has begun."""
    # By hand, each optimizer's step counts.
    by_hand = not trainer.lightning_module.automatic_optimization
    return run_length(trainer, trainer.num_training_batches, len(trainer.optimizers) if by_hand else 1)


def run_length(trainer: Trainer, batches_per_epoch: float, steps_per_update: int | None = 1) -> RunLength:
    """Return the length of a run, of which the Trainer knows no more than its arguments.

    Args:
        trainer: The Trainer; it need not have started.
        batches_per_epoch: Training batches of an epoch on each rank, after ``limit_train_batches``; infinite where
            unknown.
        steps_per_update: Optimizer steps that are counted an update: more than 1 where several optimizers are stepped
            by hand; ``None``: unknown.
    """
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    max_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    factors = accumulation_factors(trainer)
    if steps_per_update is None or math.isinf(batches_per_epoch):
        if math.isinf(max_steps):
            return RunLength()
        return RunLength(int(max_steps), max_steps * max(factors.values()) / (steps_per_update or 1))
    steps, batches, epochs = 0, 0.0, 0
    starts = sorted(factors)
    for start, stop in zip(starts, (*starts[1:], math.inf), strict=True):
        per_epoch = math.ceil(batches_per_epoch / factors[start]) * max(1, steps_per_update)
        left = max_steps - steps
        num = min(min(stop, max_epochs) - start, math.ceil(left / per_epoch) if left < math.inf else math.inf)
        if num <= 0 or per_epoch == 0:
            break
        if math.isinf(num):
            return RunLength()
        share = min(1.0, left / (num * per_epoch))
        steps += int(min(left, num * per_epoch))
        batches += share * num * batches_per_epoch
        epochs += int(num)
    return RunLength(steps, batches, epochs) if steps else RunLength()


def accumulation_factors(trainer: Trainer) -> Mapping[int, int]:
    """Return how many batches make an optimizer step, by the epoch, counted from 0, from which on they do."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        # By name: `pytorch_lightning` has a class of its own.
        if any(cls.__name__ == "GradientAccumulationScheduler" for cls in type(callback).__mro__):
            return {0: 1, **callback.scheduling}
    return {0: trainer.accumulate_grad_batches}


def finest_segment(config: BufferConfig, total_steps: int | None) -> int:
    """Return the length of the finest segment at the start of a run, in optimizer steps."""
    if config.every_n_train_steps is not None:
        return config.every_n_train_steps
    return max(1, round(SEGMENT_SHARE * total_steps)) if total_steps else SEGMENT_STEPS
