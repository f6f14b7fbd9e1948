"""What of a run's time is training, what searches, and what the next search may take."""

from __future__ import annotations

import time

import pytest

from lightning_ckmerge.config import SearchConfig
from lightning_ckmerge.errors import SkipError
from lightning_ckmerge.plugin.clock import MIN_TRAINING_S, Clock


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
        (80.0, 0.1, (70.0, "search.max_fraction_of_training")),
        (None, 0.1, (70.0, "search.max_fraction_of_training")),
        (None, 0.01, (0.0, "search.max_fraction_of_training")),
    ],
)
def test_the_stricter_argument_sets_the_limit(
    now: list[float], timeout_s: float | None, fraction: float | None, allowance: tuple[float | None, str]
) -> None:
    """A share of training counts what earlier searches took; overdrawn, nothing is left."""
    config = SearchConfig(timeout_s=timeout_s, max_fraction_of_training=fraction)
    assert Clock(training_s=1000.0, searched_s=30.0).allowance(config, is_last=True) == allowance


@pytest.mark.parametrize("training_s", [1.0, 30.0, 199.0, 201.0, 1e5])
def test_whatever_the_searches_before_it_take_the_last_one_has_as_much_as_all_of_them_or_half_the_floor(
    now: list[float], training_s: float
) -> None:
    """Four searches, each of which takes all that it may."""
    config, clock = SearchConfig(), Clock(training_s=0.0, searched_s=0.0)
    for quarter in range(1, 5):
        now[0] += training_s / 4
        allowed_s, _ = clock.allowance(config, is_last=quarter == 4)
        assert allowed_s is not None
        with clock.searching():
            now[0] += allowed_s
    total_s = 0.05 * max(training_s, MIN_TRAINING_S)
    assert clock.searched_s == pytest.approx(total_s)
    assert allowed_s >= min(total_s / 4, 0.05 * MIN_TRAINING_S / 2) - 1e-9


def test_a_search_that_cannot_end_in_time_is_skipped_before_it_costs_anything(now: list[float]) -> None:
    config, clock = SearchConfig(), Clock(training_s=0.0, searched_s=0.0)
    clock.require(10.0, config, is_last=True)
    with pytest.raises(SkipError, match=r"leaves 5 s, but the shortest search needs 6 s\. Raise "):
        clock.require(6.0, config, is_last=False)
    with pytest.raises(SkipError, match=r"`search\.max_fraction_of_training` leaves 0 s\. Raise `search"):
        Clock(training_s=1.0, searched_s=99.0).require(0.0, config, is_last=True)
    clock.require(1e9, SearchConfig(max_fraction_of_training=None), is_last=False)
