"""``standing.json``: a run's best artifact against the newest weights that were measured on the same batches."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_ckmerge.core.objectives import Mode, sign_of
from lightning_ckmerge.core.wording import change_told
from lightning_ckmerge.tensorfiles.durable import replace_json
from lightning_ckmerge.tensorfiles.untrusted import read_json

STANDING_NAME = "standing.json"
SMALL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Which weights of a run to use, by the confirmation half of the batches.

    Args:
        run_id: The run.
        monitor: The metric; the first of several.
        mode: Whether a lower or a higher value is better.
        step: Of the newest weights.
        value: Theirs.
        is_final: Whether training has ended with them.
        best: Name of the run's best artifact.
        best_step: The step of its search.
        best_value: Its value.
        interval: 95 % interval of its gain over the newest weights, where that is known.
    """

    run_id: str
    monitor: str
    mode: Mode
    step: int
    value: float
    is_final: bool
    best: str
    best_step: int
    best_value: float
    interval: tuple[float, float] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether the newest weights are better than the best artifact."""
        return sign_of(self.mode) * (self.value - self.best_value) < 0

    @property
    def advice(self) -> str:
        """Which weights to use, in a sentence."""
        weights = f"the {'final ' if self.is_final else ''}weights of step {self.step}"
        merge = f"the best merge, of step {self.best_step}"
        first, second, subject = (weights, merge, "the merge") if self.is_stale else (merge, weights, "it")
        change, interval = change_told(self.monitor, self.mode, self.value, self.best_value, self.interval)
        of_gain = f"; 95 % interval {interval}" if interval else ""
        unsure = ", so it may be nothing" if self.interval and self.interval[0] <= 0 <= self.interval[1] else ""
        return f"Use {first}, not {second}: {subject} {change}{of_gain}, on the same batches{unsure}."


def write_standing(dirpath: Path, standing: Standing | None) -> None:
    """Write how a run stands into its directory; ``None``: nothing is known."""
    if standing is None or not math.isfinite(standing.value) or not math.isfinite(standing.best_value):
        (dirpath / STANDING_NAME).unlink(missing_ok=True)
    else:
        replace_json(dirpath / STANDING_NAME, asdict(standing))


def read_standing(dirpath: Path) -> Standing | None:
    """Return how a run stands; ``None`` where that is not known, or the file is damaged."""
    try:
        found = read_json(dirpath / STANDING_NAME, max_bytes=SMALL_BYTES)
        interval = found.pop("interval")
        standing = Standing(**found, interval=None if interval is None else (float(interval[0]), float(interval[1])))
        numbers = (standing.step, standing.value, standing.best_step, standing.best_value)
        texts = (standing.run_id, standing.monitor, standing.mode, standing.best)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    is_sound = all(isinstance(n, (int, float)) for n in numbers) and all(isinstance(t, str) for t in texts)
    return standing if is_sound else None
