"""How long a run is, and how fine its buffer."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from lightning_ckmerge.config import BufferConfig

# Length of the finest segment: this share of a run of known length, else so many steps to begin with.
SEGMENT_SHARE = 0.01
SEGMENT_STEPS = 25


def length_of_run(trainer: Trainer) -> int | None:
    """Return the run's optimizer steps, ``None`` where only training will tell."""
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        return None
    by_steps_alone = trainer.max_steps == steps
    # By hand, each optimizer's step counts; `max_steps` counts them all already.
    per_batch = 1 if trainer.lightning_module.automatic_optimization or by_steps_alone else len(trainer.optimizers)
    total = int(steps) * max(1, per_batch)
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def finest_segment(config: BufferConfig, total_steps: int | None) -> int:
    """Return the length of the finest segment at the start of a run, in optimizer steps."""
    if config.every_n_train_steps is not None:
        return config.every_n_train_steps
    return max(1, round(SEGMENT_SHARE * total_steps)) if total_steps else SEGMENT_STEPS
