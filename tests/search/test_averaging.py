"""Averages of outputs: of equal models they are the model's own, and none of them underflows."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.search.averaging import Averaging, average_outputs, losses

every_way = pytest.mark.parametrize("averaging", get_args(Averaging))


@every_way
@given(w_M=st.lists(st.floats(0.01, 1), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_equal_models_predict_as_one_of_them(averaging: Averaging, w_M: list[float], seed: int) -> None:
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)) * 20
    averaged = average_outputs([z] * len(w_M), [w / sum(w_M) for w in w_M], averaging)
    expected = z.log_softmax(-1) if averaging == "probabilities" else z
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-4)


def test_probabilities_are_averaged_in_log_space() -> None:
    """Goes red if probabilities are summed: exp(-2000) is 0 in any precision, and its loss infinite."""
    z_M = [torch.tensor([[0.0, 2000.0]]), torch.tensor([[0.0, 3000.0]])]
    logs = average_outputs(z_M, [0.25, 0.75], "probabilities")
    assert losses(logs, torch.tensor([0])).item() == pytest.approx(2000 - math.log(0.25))


def test_averages_of_probabilities_are_probabilities() -> None:
    z_M = torch.randn(4, 50, 11).bfloat16()
    averaged = average_outputs(z_M, [0.1, 0.2, 0.3, 0.4], "probabilities")
    expected = sum(w * z.float().softmax(-1) for w, z in zip((0.1, 0.2, 0.3, 0.4), z_M, strict=True))
    assert averaged.dtype == torch.float32
    torch.testing.assert_close(averaged.exp(), expected)
    torch.testing.assert_close(averaged.softmax(-1), expected)


def test_means_of_logits_are_geometric_means_of_probabilities() -> None:
    z_M = torch.randn(2, 5, 3)
    p_M = z_M.softmax(-1)
    geometric = (p_M[0] * p_M[1]).sqrt()
    averaged = average_outputs(z_M, [0.5, 0.5], "logits").softmax(-1)
    torch.testing.assert_close(averaged, geometric / geometric.sum(-1, keepdim=True))


@every_way
def test_a_member_without_weight_changes_nothing(averaging: Averaging) -> None:
    z_M = list(torch.randn(2, 5, 3))
    with_it = average_outputs([z_M[0], z_M[1]], [1.0, 0.0], averaging)
    torch.testing.assert_close(with_it, average_outputs(z_M[:1], [1.0], averaging))


@every_way
def test_no_output_is_changed(averaging: Averaging) -> None:
    z_M = torch.randn(3, 5, 3, dtype=torch.float64)
    before = z_M.clone()
    average_outputs(list(z_M), [0.2, 0.3, 0.5], averaging)
    assert torch.equal(z_M, before)
