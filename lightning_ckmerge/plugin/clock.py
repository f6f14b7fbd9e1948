"""A run's own course: seconds of training and searching, and the monitored metric over the steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from lightning_ckmerge.config import SearchConfig
from lightning_ckmerge.core.outcome import SearchOutcome
from lightning_ckmerge.core.wording import amount_told
from lightning_ckmerge.errors import SkipError
from lightning_ckmerge.search.verdict import RECENT_SHARE, Point

# A shorter run counts as if it had taken so long, or its searches would come to nothing: 10 s at 5 %.
MIN_TRAINING_S = 200.0


class Clock:
    """Seconds of training and of searches, over resumptions. It runs from the start.

    Args:
        training_s: Seconds of training before.
        searched_s: Seconds of searches before.
    """

    def __init__(self, training_s: float, searched_s: float) -> None:
        self.searched_s = searched_s
        self._earlier_training_s = training_s
        self._searched_here_s = 0.0
        self._start = time.monotonic()

    @property
    def training_s(self) -> float:
        """Seconds of training so far, without the searches."""
        return self._earlier_training_s + time.monotonic() - self._start - self._searched_here_s

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """Count the time spent within as a search's, once it is over."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.searched_s += seconds
            self._searched_here_s += seconds

    def allowance(self, config: SearchConfig, *, is_last: bool) -> tuple[float | None, str]:
        """Return the seconds that the next search may take, ``None`` for any, and the argument that says so.

        Args:
            config: The limits.
            is_last: Whether it is the run's last, so that no time has to be saved.
        """
        allowed_s, allowed_by = config.timeout_s or math.inf, "search.timeout_s"
        if config.max_fraction_of_training is not None:
            share_s = max(0.0, self._share(config.max_fraction_of_training, is_last=is_last))
            if share_s < allowed_s:
                allowed_s, allowed_by = share_s, "search.max_fraction_of_training"
        return (None, "") if math.isinf(allowed_s) else (allowed_s, allowed_by)

    def require(self, needed_s: float, config: SearchConfig, *, is_last: bool) -> None:
        """Raise ``SkipError`` if the next search may take less than ``needed_s`` seconds, or none at all."""
        allowed_s, allowed_by = self.allowance(config, is_last=is_last)
        if allowed_s is not None and (allowed_s < needed_s or allowed_s == 0):
            needs = f", but the shortest search needs {amount_told(needed_s)} s" if needed_s else ""
            raise SkipError(
                f"`{allowed_by}` leaves {amount_told(allowed_s)} s{needs}. Raise `{allowed_by}`, or search less often.",
                needed_s=needed_s,
            )

    def _share(self, fraction: float, *, is_last: bool) -> float:
        """The last search may take all that is left; those before it half of that, so that it has something left."""
        training_s = self.training_s
        if is_last:
            return fraction * max(training_s, MIN_TRAINING_S) - self.searched_s
        grown = (fraction * training_s - self.searched_s) / 2
        return max(grown, fraction * MIN_TRAINING_S / 2 - self.searched_s)


class Curve:
    """Steps and values of weights on the way, as far back as a search looks.

    ``validated`` are the run's own validations, ``searched`` the latest weights of its searches on the confirmation
    half. A resumed run may confirm on other batches, so the second start again.
    """

    def __init__(self) -> None:
        self.validated: list[Point] = []
        self.searched: list[Point] = []
        self._num_published = 0

    @property
    def unpublished(self) -> list[Point]:
        """The run's own validations since the last search, for the timeline."""
        return self.validated[self._num_published :]

    def add_validation(self, step: int, value: float) -> None:
        """Take in a value of the run's own validation."""
        if math.isfinite(value):
            self.validated.append((step, value))

    def add_search(self, outcome: SearchOutcome) -> None:
        """Take in a search that was published, and forget points too old for the next."""
        latest = outcome.anchors[0].confirm
        if latest is not None and math.isfinite(latest.value):
            self.searched.append((outcome.step, latest.value))
        first = (1 - RECENT_SHARE) * outcome.step
        self.validated, self.searched = ([p for p in ps if p[0] > first] for ps in (self.validated, self.searched))
        self._num_published = len(self.validated)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {"validated": self.validated, "num_published": self._num_published}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.validated = [(step, value) for step, value in state["validated"]]
        self._num_published = state["num_published"]
