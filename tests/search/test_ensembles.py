"""Members and weights, chosen by predictions whose best ensemble is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.averaging import Averaging, average_outputs, losses
from lightning_ckmerge.search.ensembles import Predicted, SearchHalf, choose_ensemble, choose_members

SIZES = (8, 8, 5)


def half_of(averaging: Averaging, targets: Tensor, outputs_P: Sequence[Tensor]) -> SearchHalf:
    """Predictions of whole models, cut to batches of unequal sizes."""
    models = [Predicted() for _ in outputs_P]
    for model, outputs in zip(models, outputs_P, strict=True):
        for o, t in zip(outputs.split(SIZES), targets.split(SIZES), strict=True):
            model.take(o, t, averaging)
    return SearchHalf(averaging, targets.split(SIZES), models)


def off_by(*errors: float) -> SearchHalf:
    """Models whose values are wrong by so much on every sample."""
    y = torch.linspace(-1, 1, sum(SIZES))[:, None]
    return half_of("outputs", y, [y + e for e in errors])


def classes(num_models: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (sum(SIZES),), generator=generator)
    logits = 2 * torch.nn.functional.one_hot(targets, 4) + 2 * torch.randn(
        num_models, sum(SIZES), 4, generator=generator
    )
    return targets, logits


def test_errors_that_cancel_are_chosen_before_better_models() -> None:
    """The best is off by 1, the second best by 1.1 to the same side; the third, by 1.2 to the other one, cancels it."""
    steps, weights = choose_members(off_by(1.1, 1.0, -1.2), range(3), 2)
    assert [p for p, _ in steps] == [1, 2]
    assert weights == {1: 0.5, 2: 0.5}


def test_a_worse_model_may_get_a_smaller_share() -> None:
    """With equal weights an error of -6 beside one of 1 would make things worse; an eighth of it cancels the other."""
    half = off_by(1.0, -6.0)
    assert choose_members(half, range(2), 2)[1] == {0: 0.875, 1: 0.125}
    assert choose_members(half, range(2), 2, shares=None)[1] == {0: 1.0}


def test_a_member_must_be_worth_its_forward_pass() -> None:
    """An eighth of an error of -6 lowers the loss from 1 to 0.0156, by 98 %."""
    half = off_by(1.0, -6.0)
    assert len(choose_members(half, range(2), 2, min_gain=0.98)[1]) == 2
    assert len(choose_members(half, range(2), 2, min_gain=0.99)[1]) == 1


def test_copies_of_a_model_add_nothing() -> None:
    steps, _ = choose_members(off_by(0.5, 0.5, 0.5), range(3), 3)
    assert steps == [(0, pytest.approx(0.25))]


def test_the_loss_falls_with_each_member_that_is_taken() -> None:
    targets, logits = classes(8)
    half = half_of("probabilities", targets, logits)
    steps, weights = choose_members(half, range(8), 8)
    loss = [loss for _, loss in steps]
    assert loss == sorted(loss, reverse=True)
    assert sum(weights.values()) == pytest.approx(1)
    assert half.loss(weights) == pytest.approx(loss[-1])
    assert len(loss) > 2


def test_members_come_from_those_allowed() -> None:
    targets, logits = classes(8)
    half = half_of("logits", targets, logits)
    assert choose_members(half, range(3, 6), 8)[1].keys() <= {3, 4, 5}


def test_members_disagree_as_much_as_is_asked_for() -> None:
    targets, logits = classes(8)
    half = half_of("probabilities", targets, logits)
    chosen = list(choose_members(half, range(8), 8, min_disagreement=0.3)[1])
    apart = [half.disagreement(p, q) for i, p in enumerate(chosen) for q in chosen[:i]]
    assert apart
    assert min(apart) >= 0.3
    assert list(choose_members(half, range(8), 8, min_disagreement=1.1)[1]) == chosen[:1]


def test_searched_weights_are_near_the_known_optimum() -> None:
    """Errors of 1 and -2 cancel at weights of 2/3 and 1/3."""
    chosen = choose_ensemble(off_by(1.0, -2.0), range(2), size=2, n_trials=16)
    assert chosen.members_M == (0, 1)
    assert chosen.weights_M == pytest.approx((2 / 3, 1 / 3), abs=0.02)
    assert chosen.num_trials > 0


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
@pytest.mark.parametrize("n_trials", [0, 4])
def test_weights_sum_to_one_and_are_no_worse_than_equal_ones(averaging: Averaging, n_trials: int) -> None:
    targets, logits = classes(5, seed=1)
    half = half_of(averaging, targets, logits)
    chosen = choose_ensemble(half, range(5), size=3, n_trials=n_trials)
    assert math.fsum(chosen.weights_M) == pytest.approx(1)
    assert min(chosen.weights_M) > 0
    assert list(chosen.weights_M) == sorted(chosen.weights_M, reverse=True)
    assert chosen.loss <= chosen.steps[-1][1] + 1e-12
    assert chosen.loss == pytest.approx(half.loss(dict(zip(chosen.members_M, chosen.weights_M, strict=True))))


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
def test_the_loss_is_that_of_the_averaged_outputs(averaging: Averaging) -> None:
    """Goes red if probabilities are not weighted as ``average_outputs`` does, or batches count alike."""
    targets, logits = classes(3)
    w_M = [0.2, 0.5, 0.3]
    expected = losses(average_outputs(logits, w_M, averaging), targets).mean().item()
    assert half_of(averaging, targets, logits).loss(dict(enumerate(w_M))) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_has_no_finite_loss_is_left_out() -> None:
    assert choose_members(off_by(math.nan, 1.0, math.inf), range(3), 3)[1] == {1: 1.0}
    with pytest.raises(SearchError, match="finite loss"):
        choose_members(off_by(math.nan), range(1), 1)
