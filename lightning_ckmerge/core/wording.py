"""A metric's change in words: from, to, share and interval. One form for the verdict, the reports and the logs.

The words follow the change itself, ``less`` or ``more``, and never the sign of a gain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from lightning_ckmerge.core.objectives import Mode

# From here on Python's own exponents read better.
SMALLEST, LARGEST = 1e-4, 1e7
MOST_LISTED = 5
MOST_QUOTED = 3
MOST_DIGITS = 1e-4  # two digits of this share are six of the whole


def change_told(
    monitor: str,
    mode: Mode,
    before: float,
    after: float,
    interval: Sequence[float] | None = None,
    *,
    by_share: bool = True,
    others: Sequence[float] = (),
) -> tuple[str, str]:
    """Return a metric's change in words, and its interval; the second is empty where there is none.

    A change is given as a share of the value before, unless a share makes no sense: around zero, below it, or beyond
    100 %.

    >>> change_told("val_loss", "min", 0.38, 0.306, (0.061, 0.091))
    ('lowers val_loss from 0.380 to 0.306, 19 % less', '16 to 24 %')
    >>> change_told("val_loss", "min", 0.38, 0.379, (-0.002, 0.004))
    ('lowers val_loss from 0.3800 to 0.3790, 0.26 % less', '0.53 % more to 1.1 % less')
    >>> change_told("reward", "max", -1.2, -0.8, (0.3, 0.5))
    ('raises reward from -1.20 to -0.80, 0.40 more', '0.30 to 0.50')
    >>> change_told("val_loss", "min", 0.4622, 0.128, others=[0.1289])[0]
    'lowers val_loss from 0.4622 to 0.1280, 72 % less'

    Args:
        monitor: The metric.
        mode: Whether lower or higher values are better.
        before: Value of the latest weights.
        after: Value of the merge, on the same batches.
        interval: Ends of the gain's interval, above 0 where the merge is better; the change lies inside.
        by_share: Whether a share makes sense, as far as the caller knows.
        others: Values that stand beside these two, by ``value_told``: all have digits enough to be told apart.
    """
    change = after - before
    if not math.isfinite(change):
        return f"changes {monitor} from {before} to {after}", ""
    if not change:
        told = f"leaves {monitor} at {value_told(before)}"
    else:
        first, then = (value_told(v, (before, after, *others)) for v in (before, after))
        told = f"{'lowers' if change < 0 else 'raises'} {monitor} from {first} to {then}"
    word, other = ("less", "more") if change < 0 or (not change and mode == "min") else ("more", "less")
    ends = tuple(interval or ())
    if (mode == "min") != (word == "less"):
        ends = tuple(-end for end in reversed(ends))
    share = by_share and before > 0 and after > 0 and max(map(abs, (change, *ends))) <= before
    unit = " %" if share else ""

    def told_amount(value: float) -> str:
        amount = 100 * abs(value) / before if share else abs(value)
        return _number(amount, amount or 1.0)

    if change:
        told += f", {told_amount(change)}{unit} {word}"
    if not ends:
        return told, ""
    low, high = ends
    if low < 0:
        return told, f"{told_amount(low)}{unit} {other} to {told_amount(high)}{unit} {word}"
    return told, f"{told_amount(low)} to {told_amount(high)}{unit}"


def value_told(value: float, among: Sequence[float] = ()) -> str:
    """Return a value to four digits, or to as many as tell it and others apart.

    >>> value_told(0.31415926), value_told(-12.5), value_told(0.1289, (0.4622, 0.128, 0.1289))
    ('0.3142', '-12.50', '0.1289')

    Args:
        value: The value.
        among: The values of one sentence, which all have the same decimal places: two digits of the change from the
            first to the second, and one of the other differences, down to a millionth of the largest value.
    """
    change = among[1] - among[0] if among else 0.0
    if not change:
        return _number(value, value / 100 or 1.0)
    known = [v for v in among if math.isfinite(v)]
    widest = max(map(abs, known))
    apart = [abs(v - other) for v in known[2:] for other in known[:2] if v != other]
    finest = min([abs(change), *(max(10 * difference, MOST_DIGITS * widest) for difference in apart)])
    return _number(value, finest, widest)


def amount_told(value: float) -> str:
    """Return an amount to three digits, without exponents.

    >>> amount_told(18432.7), amount_told(999.6), amount_told(51.62), amount_told(0.0)
    ('18400', '1000', '51.6', '0')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def _number(value: float, change: float, widest: float | None = None) -> str:
    """Return ``value`` to two digits of ``change``."""
    widest = abs(value) if widest is None else widest
    places = 1 - _exponent(change)
    if SMALLEST <= widest < LARGEST or not widest:
        return f"{value:.{min(max(0, places), 12)}f}"
    return f"{value:.{max(3, _exponent(widest) + places + 1)}g}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def listed(names: Collection[str]) -> str:
    """Return the first few of some names by alphabet, and how many more there are.

    >>> listed({"b", "a"}), listed("gfedcba")
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    return and_more(sorted(names)[:MOST_LISTED], len(names))


def quoted(names: Sequence[str]) -> str:
    """Return the first three of some names in quotes, in their order, and how many more there are.

    >>> quoted(["a", "b"]), quoted(["a", "b", "c", "d", "e"])
    ("'a', 'b'", "'a', 'b', 'c' and 2 more")
    """
    return and_more([repr(name) for name in names[:MOST_QUOTED]], len(names))


def and_more(shown: Sequence[str], total: int, separator: str = ", ", last: str = " and ") -> str:
    """Return the texts shown of ``total``, and how many more there are.

    >>> and_more(["a", "b"], 2), and_more(["a: 1", "b: 2"], 5, "; ", "; and ")
    ('a, b', 'a: 1; b: 2; and 3 more')
    """
    return separator.join(shown) + (f"{last}{total - len(shown)} more" if total > len(shown) else "")
