"""How long a run trains, how long it searches, and how long the next search may take."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from lightning_ckmerge.config import SearchConfig


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
        """Count what is done within, once it is over, as a search."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.searched_s += seconds
            self._searched_here_s += seconds

    def allowance(self, config: SearchConfig) -> tuple[float | None, str]:
        """Return the seconds that the next search may take, ``None`` for any, and the argument that says so."""
        allowed_s, allowed_by = config.timeout_s or math.inf, "search.timeout_s"
        if config.max_fraction_of_training is not None:
            share_s = max(0.0, config.max_fraction_of_training * self.training_s - self.searched_s)
            if share_s < allowed_s:
                allowed_s, allowed_by = share_s, "search.max_fraction_of_training"
        return (None, "") if math.isinf(allowed_s) else (allowed_s, allowed_by)
