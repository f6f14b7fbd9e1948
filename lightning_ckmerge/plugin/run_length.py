"""How long a run is, and how fine its buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_ckmerge.config import BufferConfig

# Length of the finest segment: this share of a run of known length, else so many steps to begin with.
SEGMENT_SHARE = 0.01
SEGMENT_STEPS = 25


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
            nobody knows.
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
