"""Where the run stands on its learning rate's way: still rising, high, or decayed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

# Below this share of the peak the weights hardly move, and there is little left to average.
DECAYED_SHARE = 0.1
# A lower level than the one before is kept only if it is lower by this much; a whole decay is some hundred levels.
RESOLUTION = 0.01
# A constant rate differs from itself by rounding only.
MIN_RISE = 1e-6


class LearningRates:
    """The learning rates of all parameter groups: the highest, as a share of its own peak, over the steps.

    Groups at a constant rate keep a run high, and so does a rate that nobody can see: to look in vain costs a search,
    not to look may cost the run's best model.
    """

    def __init__(self) -> None:
        self.step = 0
        self._peaks: list[float] = []
        self._levels: list[tuple[int, float]] = []  # falling; each stands for the steps since the one before
        self._is_rising = False

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
        self._is_rising = bool(rises) and all(rises)
        level = max((r / peak for r, peak in zip(rates, self._peaks, strict=False) if peak > 0), default=1.0)
        while self._levels and self._levels[-1][1] <= level:
            self._levels.pop()
        if self._levels and level >= (1 - RESOLUTION) * self._levels[-1][1]:
            level = self._levels.pop()[1]
        self._levels.append((step, level))

    def objection(self, first_step: int) -> str | None:
        """Return why a search would have little to find now; ``None`` if nothing speaks against it.

        Args:
            first_step: The first step that the buffer's snapshots stand for; not less than before.
        """
        if self._is_rising:
            return "the learning rate is still rising, and merging the weights of a warm-up gains little"
        self._levels = [(s, level) for s, level in self._levels if s >= first_step]
        if not self._levels or self._levels[-1][1] >= DECAYED_SHARE * self._levels[0][1]:
            return None
        share = 100 * self._levels[-1][1] / self._levels[0][1]
        return (
            f"the learning rate has been decayed, to {share:.2g} % of its peak over the buffer's snapshots, and little "
            "is to be expected of merging"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"step": self.step, "peaks": self._peaks, "levels": self._levels, "is_rising": self._is_rising}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step, self._is_rising = state["step"], state["is_rising"]
        self._peaks, self._levels = list(state["peaks"]), [(step, level) for step, level in state["levels"]]


def rates_of(optimizers: Iterable[Any]) -> list[float]:
    """Return the learning rate of each parameter group that has one."""
    rates = [group.get("lr") for o in optimizers for group in getattr(o, "param_groups", ())]
    return [float(rate) for rate in rates if isinstance(rate, (int, float, Tensor))]
