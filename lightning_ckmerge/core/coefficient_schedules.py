"""Published coefficients for checkpoints that are merged without a search.

Letters: K checkpoints, oldest first, equally spaced. ``c_K`` coefficients; they sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lightning_ckmerge.errors import ConfigError

FORMS = "uniform, ema:TAU, linear, minus-sqrt, power:P or slerp:T"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A family of coefficients, by name, with its number where it takes one.

    Args:
        name: ``uniform``, ``ema``, ``linear``, ``minus-sqrt``, ``power`` or ``slerp``.
        value: ``ema``: decay length in checkpoints; ``power``: exponent; ``slerp``: place between two checkpoints, 0
            being the older; ``None`` for the others.
    """

    name: str
    value: float | None = None

    def coefficients(self, num_checkpoints: int) -> tuple[float, ...]:
        """Return ``c_K`` for K = ``num_checkpoints``; those of ``slerp`` are its arguments ``1 - t`` and ``t``.

        Raises:
            ConfigError: ``slerp`` was asked for other than two checkpoints.

        Source:
            ``linear`` and ``minus-sqrt`` stand for a learning rate that decays as ``1 - x`` or ``1 - sqrt(x)`` over the
            checkpoints, whose differences they are (WSM, arXiv:2507.17634); the first is the uniform mean. ``power``:
            averages weighted by a power of time, Karras et al. 2024, arXiv:2312.02696.
        """
        if self.name == "slerp":
            if num_checkpoints != 2:
                raise ConfigError(
                    f"slerp takes two checkpoints, got {num_checkpoints}. Name two, or choose another schedule."
                )
            assert self.value is not None
            return (1 - self.value, self.value)
        if self.name == "ema":
            assert self.value is not None
            ages_K = range(num_checkpoints - 1, -1, -1)
            weights_K = [math.exp(-age / self.value) for age in ages_K]
            return tuple(w / math.fsum(weights_K) for w in weights_K)
        if self.name in ("uniform", "linear"):
            return (1 / num_checkpoints,) * num_checkpoints
        cumulated = self._cumulated()
        edges = [cumulated(k / num_checkpoints) for k in range(num_checkpoints + 1)]
        return tuple(after - before for before, after in pairwise(edges))

    def _cumulated(self) -> Callable[[float], float]:
        """The share of all weight that lies before a point of the window, which runs from 0 to 1."""
        if self.name == "minus-sqrt":
            return math.sqrt
        assert self.value is not None
        exponent = 1 + self.value
        return lambda x: x**exponent


def parse_schedule(text: str) -> Schedule:
    """Return the schedule that ``text`` names.

    Raises:
        ConfigError: There is no such schedule, or its number is missing or out of range.

    >>> parse_schedule("power:1").coefficients(2)
    (0.25, 0.75)
    >>> parse_schedule("minus-sqrt").coefficients(4)[0]
    0.5
    """
    name, colon, number = text.partition(":")
    try:
        value = float(number) if colon else None
    except ValueError:
        value = math.nan
    if name in ("uniform", "linear", "minus-sqrt") and value is None:
        return Schedule(name=name)
    lows = {"ema": 0.0, "power": -1.0, "slerp": -math.inf}
    if name in lows and value is not None and math.isfinite(value) and value > lows[name]:
        return Schedule(name=name, value=value)
    raise ConfigError(
        f"a schedule must be one of {FORMS}, with TAU > 0 and P > -1, got {text!r}. "
        "`uniform` is a good start; TAU counts checkpoints."
    )
