"""What of a run's time is training, what searches, and what the next search may take."""

from __future__ import annotations

import time

import pytest

from lightning_ckmerge.config import SearchConfig
from lightning_ckmerge.plugin.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Set the time by its only element."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_search_is_no_training_also_where_it_fails(now: list[float]) -> None:
    clock = Clock(training_s=50.0, searched_s=3.0)
    now[0] += 10

    def search() -> None:
        with clock.searching():
            now[0] += 4
            raise RuntimeError

    with pytest.raises(RuntimeError):
        search()
    now[0] += 1
    assert (clock.training_s, clock.searched_s) == (61.0, 7.0)


@pytest.mark.parametrize(
    ("timeout_s", "fraction", "allowance"),
    [
        (None, None, (None, "")),
        (2.0, None, (2.0, "search.timeout_s")),
        (2.0, 0.5, (2.0, "search.timeout_s")),
        (20.0, 0.1, (7.0, "search.max_fraction_of_training")),
        (None, 0.1, (7.0, "search.max_fraction_of_training")),
        (None, 0.01, (0.0, "search.max_fraction_of_training")),
    ],
)
def test_the_stricter_argument_sets_the_limit(
    now: list[float], timeout_s: float | None, fraction: float | None, allowance: tuple[float | None, str]
) -> None:
    """A share of training counts what earlier searches took; overdrawn, nothing is left."""
    config = SearchConfig(timeout_s=timeout_s, max_fraction_of_training=fraction)
    assert Clock(training_s=100.0, searched_s=3.0).allowance(config) == allowance
