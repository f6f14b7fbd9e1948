"""Numbers as people read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class ReportPlace:
    """Place of a search's artifact.

    Args:
        path: Its directory.
        up: Link from its page to the one above: the run's, or that of the search whose Pareto front it is on.
    """

    path: Path
    up: str = "../report.html"


def run_name(dirpath: Path) -> str:
    """Return a run's name: the end of the path that its artifacts' directory has.

    >>> run_name(Path("/data/lightning_logs/version_3/merges")), run_name(Path("/data/gpt"))
    ('lightning_logs/version_3', 'data/gpt')
    """
    parts = [part for part in dirpath.parts if part not in ("merges", dirpath.anchor)]
    return "/".join(parts[-2:])


def date(created: str | None) -> str:
    """Return the day and minute of an ISO date; an empty text for none.

    >>> date("2026-11-24T22:05:31+00:00")
    '2026-11-24 22:05 UTC'
    """
    return "" if created is None else f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M} UTC"


def number(value: float | None, form: str = "#.5g") -> str:
    """Return a value for people, to 5 significant digits or as ``form`` says; a dash for a missing one.

    >>> number(2.3), number(-0.00012, ".5g"), number(None)
    ('2.3000', '−0.00012', '–')
    """
    return MISSING if value is None else f"{value:{form}}".replace("-", "−")


def gain_text(gain: float | None, interval: list[float] | None) -> str:
    """Return a gain with its 95 % interval, all to one decimal place; the interval does not break over lines.

    >>> gain_text(0.0123456, [0.004, 0.02]).replace("\\xa0", "_")
    '+0.0123 [+0.0040,_+0.0200]'
    """
    largest = max(map(abs, (gain or 0.0, *(interval or ()))))
    form = f"+.{max(0, 2 - math.floor(math.log10(largest)))}f" if largest else "+.0f"
    ends = f" [{number(interval[0], form)},\xa0{number(interval[1], form)}]" if interval else ""
    return number(gain, form) + ends


def count(value: float) -> str:
    """Return a whole number with thousands apart."""
    return f"{value:,.0f}".replace(",", " ")


def size(num_bytes: int) -> str:
    """Return a file's size.

    >>> size(999), size(5_000_000_000)
    ('999 B', '5.0 GB')
    """
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def steps_worth(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the fact, label and text, that a gain is worth training steps; none where a verdict does not say so."""
    num_steps = record.get("equivalent_steps")
    return [] if num_steps is None else [("Worth, at the current slope", f"≈ {count(num_steps)} further steps")]


def seconds(value: float) -> str:
    """Return a duration.

    >>> seconds(4.26), seconds(3725)
    ('4.3 s', '62 min 5 s')
    """
    return f"{value:.1f} s" if value < 120 else f"{value // 60:.0f} min {value % 60:.0f} s"


def steps(snapshot: dict[str, Any]) -> str:
    """Return the steps that a snapshot stands for."""
    first, last = snapshot["first_step"], snapshot["last_step"]
    return count(last) if first == last else f"{count(first)}–{count(last)}"
