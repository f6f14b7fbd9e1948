"""Interleaved rounds, and rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NUM_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        what: What was measured.
        target: What it should be, in words; empty where it is there to compare with.
        measured: The value, in words.
        met: Whether the target is met; ``None`` without one.
    """

    what: str
    target: str
    measured: str
    met: bool | None


def at_least(what: str, value: float, low: float, detail: str = "") -> Row:
    """Return a row whose value should be ``low`` or more."""
    return Row(what=what, target=f">= {low:g}", measured=f"{value:.2f}{detail}", met=value >= low)


def at_most(what: str, value: float, high: float, detail: str = "") -> Row:
    """Return a row whose value should be ``high`` or less."""
    return Row(what=what, target=f"<= {high:g}", measured=f"{value:.3g}{detail}", met=value <= high)


def medians(
    methods: Mapping[str, Callable[[], object]],
    num_rounds: int = NUM_ROUNDS,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return each method's median seconds over rounds in which all take turns; a first round does not count.

    Args:
        methods: What to measure.
        num_rounds: How often.
        prepare: What to do before each call, beside its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(num_rounds + 1):
        for name, method in methods.items():
            prepare()
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
