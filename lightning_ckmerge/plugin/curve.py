"""The monitored metric over the run: what its own validations and its searches measured on the way."""

from __future__ import annotations

import math
from typing import Any

from lightning_ckmerge.core.outcome import SearchOutcome
from lightning_ckmerge.search.verdict import RECENT_SHARE, Point


class Curve:
    """Steps and values of weights on the way, as far back as a search looks.

    ``validated`` are the run's own validations, ``searched`` the latest weights of its searches on the confirmation
    half. A resumed run may confirm on other batches, so the second begin anew.
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
        """Take in a search that was published, and forget what is too old for the next."""
        latest = outcome.anchors[0].confirm
        if latest is not None and math.isfinite(latest.value):
            self.searched.append((outcome.step, latest.value))
        first = (1 - RECENT_SHARE) * outcome.step
        self.validated, self.searched = ([p for p in ps if p[0] > first] for ps in (self.validated, self.searched))
        self._num_published = len(self.validated)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"validated": self.validated, "num_published": self._num_published}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.validated = [(step, value) for step, value in state["validated"]]
        self._num_published = state["num_published"]
