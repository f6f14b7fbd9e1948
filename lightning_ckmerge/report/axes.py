"""The axes that all charts share: their size in pixels, scales and ticks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Small enough that the letters can be read when a phone shrinks the picture.
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 464, 14, 224


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from ``low`` to ``high`` laid from pixel ``start`` to pixel ``end``, by their logarithms if ``log``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return how far ``value`` lies along the axis: 0 at ``low``, 1 at ``high``."""
        scale = math.log if self.log else float
        span = scale(self.high) - scale(self.low)
        return (scale(value) - scale(self.low)) / (span or 1.0)

    def value(self, share: float) -> float:
        """Return the value that lies so far along the axis."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def at(self, value: float) -> float:
        """Return the pixel of ``value``."""
        return self.start + (self.end - self.start) * self.share(value)

    def clipped(self, value: float) -> float:
        """Return the pixel of ``value``, or of the nearer end for one that lies outside."""
        return self.at(min(max(value, self.low), self.high))

    def ticks(self, num: int, label: Callable[[float], str]) -> list[Tick]:
        """Return about ``num`` round values with their places."""
        values = log_ticks(self.low, self.high, num) if self.log else nice_ticks(self.low, self.high, num)
        return [Tick(at=self.at(v), label=label(v)) for v in values]


def horizontal(low: float, high: float, *, log: bool = False) -> Axis:
    """Return a horizontal axis along the lower side."""
    return Axis(low=low, high=high, start=LEFT, end=RIGHT, log=log)


def vertical(low: float, high: float, *, log: bool = False) -> Axis:
    """Return a vertical axis along the left side."""
    return Axis(low=low, high=high, start=BOTTOM, end=TOP, log=log)


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """Return about ``num`` round numbers in ``[low, high]``.

    >>> nice_ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / num))
    # Two more digits than the step has: 0.1 * 3 shall read 0.3.
    digits = 2 - math.floor(math.log10(power))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - num))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, num: int) -> list[float]:
    """Return about ``num`` round numbers in ``[low, high]``, evenly spread by their logarithms.

    >>> log_ticks(5.0, 3000.0, 4)
    [10.0, 100.0, 1000.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ladders = [
        [m * 10.0**power for power in range(first, last + 1) for m in multiples if low <= m * 10.0**power <= high]
        for multiples in ((1,), (1, 3), (1, 2, 5))
    ]
    best = min(ladders, key=lambda ladder: abs(len(ladder) - num))
    return best if len(best) > 1 else nice_ticks(low, high, num)
