"""A loss that is a paraboloid over weights: all that a study finds can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.pilot.plan import Merge
from lightning_ckmerge.search.problem import Half

# Around an optimum at 0: the checkpoints drift along the first axis, and swing from side to side along the second.
CIRCLING = [(4.0, 1.0), (3.0, -1.0), (2.0, 1.0), (1.0, -1.0), (0.5, 1.0), (0.25, -1.0)]
NUM_BATCHES = 8


@dataclass
class Quadratic:
    """Scores merges; batches lie around the loss, and are the same for every merge.

    Args:
        points_K: Checkpoints.
        noise: How far the optimum moves from batch to batch, along both axes.
        stop_after: Evaluations after which it is interrupted.
    """

    points_K: Sequence[tuple[float, ...]] = field(default_factory=lambda: CIRCLING)
    noise: float = 0.01
    stop_after: int | None = None
    asked: list[str] = field(default_factory=list)

    def at(self, merge: Merge) -> tuple[float, ...]:
        """The weights of a merge; a great circle bulges away from the straight line by a known amount."""
        bulge = 0.1 * merge.lam * (1 - merge.lam) if merge.path == "slerp" else 0.0
        c_K = merge.coefficients(len(self.points_K))
        return tuple(
            bulge + sum(c * p[d] for c, p in zip(c_K, self.points_K, strict=True)) for d in range(len(self.points_K[0]))
        )

    def loss(self, merge: Merge) -> float:
        """Its loss, without noise."""
        return sum(w * w for w in self.at(merge))

    def __call__(self, merge: Merge, half: Half) -> Score:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(f"{half} {merge.key()}")
        shifts = [self.noise * (b - (NUM_BATCHES - 1) / 2) for b in range(NUM_BATCHES)]
        values = tuple(sum((w - shift) ** 2 for w in self.at(merge)) for shift in shifts)
        return Score(
            value=sum(values) / NUM_BATCHES, values_B=values, sizes_B=(1.0,) * NUM_BATCHES, num_batches=NUM_BATCHES
        )
