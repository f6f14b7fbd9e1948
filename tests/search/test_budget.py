"""The forecast that ends a search early."""

from __future__ import annotations

from lightning_ckmerge.search.stopping import Budget


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_limit_it_never_stops() -> None:
    budget = Budget()
    budget.spent(1e9, 1)
    assert budget.stop_reason(10**9) is None


def test_it_forecasts_from_the_seconds_that_a_batch_took() -> None:
    clock = Clock()
    budget = Budget(10.0, reason="`search.timeout_s`", reserved_batches=20, clock=clock)
    clock.now += 4  # of which one went to the sampler
    budget.spent(3.0, 30)
    assert budget.elapsed_s == 4
    # 4 s spent, 0.1 s a batch: 2 s for the verdict leave 4 s.
    assert budget.stop_reason(40) is None
    assert budget.stop_reason(41) == (
        "the search would take 10.1 s, but `search.timeout_s` allows 10 s (4 s spent so far)"
    )


def test_nothing_is_allowed_once_all_is_spent() -> None:
    clock = Clock()
    budget = Budget(0.0, reason="`search.max_fraction_of_training`", clock=clock)
    clock.now += 0.25
    assert budget.stop_reason(0) is not None
