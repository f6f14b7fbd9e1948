from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.core.merge import BLOCK_NUMEL
from lightning_ckmerge.core.mixing import SLERP_NUMEL, mix_tensors, slerp_tensors
from lightning_ckmerge.errors import SnapshotError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_tensors(num: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(num)
    return [torch.randn(shape).to(dtype) for _ in range(num)]


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(-2, 3), min_size=1, max_size=5).filter(lambda w: abs(sum(w)) > 0.1))
def test_mixing_is_the_weighted_mean(weights: list[float]) -> None:
    tensors = random_tensors(len(weights), 7, 3, dtype=torch.float64)
    expected = sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)
    torch.testing.assert_close(mix_tensors(tensors, weights), expected, rtol=1e-9, atol=1e-9)


def test_a_weight_of_zero_counts_as_zero() -> None:
    old, new = random_tensors(2, 50)
    assert torch.equal(mix_tensors([old, new], [0, 1]), new)
    assert torch.equal(mix_tensors([old, new], [1.0, 0.0]), old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, BLOCK_NUMEL, BLOCK_NUMEL + 3])
def test_blocks_leave_nothing_out(dtype: torch.dtype, numel: int) -> None:
    tensors = random_tensors(3, numel, dtype=dtype)
    mixed = mix_tensors(tensors, [1, 2, 1])
    assert mixed.dtype == dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (tensors[0].to(work) + 2 * tensors[1].to(work) + tensors[2].to(work)) / 4
    torch.testing.assert_close(mixed, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_sums_are_taken_in_float32() -> None:
    """Goes red if bfloat16 tensors are summed in bfloat16, where 256 + 1 is 256."""
    tensors = [torch.tensor([256.0]).bfloat16(), *[torch.tensor([1.0]).bfloat16()] * 8]
    assert mix_tensors(tensors, [1.0] * 9).item() == torch.tensor(264 / 9).bfloat16().item()


def test_inputs_stay_as_they_are_and_the_output_is_fresh() -> None:
    tensors = random_tensors(2, 4, 4)
    before = [t.clone() for t in tensors]
    mixed = mix_tensors([t.T for t in tensors], [1, 0])
    mixed.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_precisions_are_promoted() -> None:
    a, b = torch.ones(3), torch.zeros(3).bfloat16()
    assert mix_tensors([a, b], [1, 1]).dtype == slerp_tensors(b, a, 0.5).dtype == torch.float32


@pytest.mark.parametrize("merge", [lambda a, b: mix_tensors([a, b], [1, 1]), lambda a, b: slerp_tensors(a, b, 0.5)])
def test_other_shapes_are_refused(merge: object) -> None:
    with pytest.raises(SnapshotError, match=r"got \(2,\) and \(3,\)"):
        merge(torch.ones(2), torch.ones(3))  # type: ignore[operator]


@settings(max_examples=30, deadline=None)
@given(t=st.floats(0, 1), angle=st.floats(0.1, 3.0))
def test_slerp_walks_the_great_circle_evenly(t: float, angle: float) -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
    torch.testing.assert_close(slerp_tensors(a, b, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("numel", [5, SLERP_NUMEL + 7])
def test_slerp_ends_at_its_ends(numel: int) -> None:
    a, b = random_tensors(2, numel)
    torch.testing.assert_close(slerp_tensors(a, b, 0.0), a)
    torch.testing.assert_close(slerp_tensors(a, b, 1.0), b)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0])
def test_slerp_is_linear_where_there_is_no_angle(factor: float) -> None:
    a = torch.tensor([1.0, 2.0, -3.0])
    torch.testing.assert_close(slerp_tensors(a, factor * a, 0.25), 0.75 * a + 0.25 * factor * a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (64, 65), (1100, 1000)])
def test_linear_and_slerp_equal_mergekit_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Wants mergekit 0.1.5 (LGPL), which is no dependency."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    for num, weights in ((2, [0.0, 0.7]), (3, [0.2, 0.3, 0.1])):
        tensors = random_tensors(num, *shape, dtype=dtype)
        states = [{"w": t} for t in tensors]
        linear = api.merge_state_dicts(states, "linear", parameters={"weight": weights})
        assert torch.equal(mix_tensors(tensors, weights), linear["w"])
    a, b = random_tensors(2, *shape, dtype=dtype)
    for near in (b, a + b, a * 1.01):
        for t in (0.0, 0.3, 1.0, 1.2):
            slerp = api.merge_state_dicts([{"w": a}, {"w": near}], "slerp", parameters={"t": t}, base=0)
            assert torch.equal(slerp_tensors(a, near, t), slerp["w"])
