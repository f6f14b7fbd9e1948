"""What a search may still spend, forecast before each evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds that one search may take, and seconds that a batch takes, as measured so far.

    Args:
        allowed_s: Seconds; ``None``: no limit.
        reason: Names the argument that set the limit, for messages.
        reserved_batches: Batch evaluations that the verdict will need in any case.
        clock: Seconds on a clock that never goes back.

    Attributes:
        forecast_s: Seconds from the search's begin to its end, by the last ``stop_reason``.
    """

    def __init__(
        self,
        allowed_s: float | None = None,
        *,
        reason: str = "",
        reserved_batches: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed_s = allowed_s
        self._reason = reason
        self._reserved_batches = reserved_batches
        self._clock = clock
        self._start = clock()
        self.forecast_s = 0.0
        self._evaluating_s = 0.0
        self._num_batches = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._start

    def spent(self, seconds: float, num_batches: int) -> None:
        """Take one evaluation into the forecast."""
        self._evaluating_s += seconds
        self._num_batches += num_batches

    def stop_reason(self, num_batches: int) -> str | None:
        """Why ``num_batches`` more batch evaluations would exceed the budget; ``None`` if they fit."""
        if self._allowed_s is None:
            return None
        seconds_per_batch = self._evaluating_s / max(1, self._num_batches)
        self.forecast_s = self.elapsed_s + seconds_per_batch * (num_batches + self._reserved_batches)
        if self.forecast_s <= self._allowed_s:
            return None
        return (
            f"{self.forecast_s:.3g} s would exceed the {self._allowed_s:.3g} s that {self._reason} allows, "
            f"{self.elapsed_s:.3g} s are spent"
        )
