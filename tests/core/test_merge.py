"""Merge arithmetic: what comes out unchanged, what is not read, and how large rounding errors get.

Letters: K snapshots, oldest first.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.core import merge
from lightning_ckmerge.core.merge import merge_tensor, pool_means, update_means
from lightning_ckmerge.errors import SnapshotError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def coefficients(min_size: int = 1) -> st.SearchStrategy[list[float]]:
    """Draw K coefficients that sum to 1, negative ones, zeros and large ones among them."""
    rest = st.lists(st.sampled_from([0.0, -0.5, 1 / 3]) | st.floats(-3, 3), min_size=min_size - 1, max_size=7)
    return rest.flatmap(lambda c: st.permutations([*c, 1 - math.fsum(c)])).filter(any)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(sources_K: list[Tensor], c_K: list[float]) -> Tensor:
    """Return the sum in float64."""
    return sum((c * s.double() for c, s in zip(c_K, sources_K, strict=True)), torch.zeros(()))


def rounding(sources_K: list[Tensor], c_K: list[float], dtype: torch.dtype) -> Tensor:
    """Return what one rounding to ``dtype`` and a mean in float32 (float64) may cost.

    The mean is over all positive coefficients before the negative ones stretch it back, and its errors with it.
    """
    base = sources_K[max(range(len(c_K)), key=lambda k: c_K[k])].double()
    distance = sum((abs(c) * (s.double() - base).abs() for c, s in zip(c_K, sources_K, strict=True)), torch.zeros(()))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    peak = sum(c for c in c_K if c > 0)
    sloppy = (len(c_K) + 2) * torch.finfo(work).eps * max(1, peak) * (base.abs() + distance)
    # That coefficients sum to 1 only to the last bit of a float64 scales with the base.
    slack = 8 * torch.finfo(torch.float64).eps * base.abs() * sum(map(abs, c_K))
    return sloppy + slack + torch.finfo(dtype).eps / 2 * exact(sources_K, c_K).abs() + torch.finfo(dtype).tiny


@dtypes
@given(c_K=coefficients())
def test_merging_equal_snapshots_changes_no_bit(dtype: torch.dtype, c_K: list[float]) -> None:
    """Goes red if the sum is taken as it is written: frozen weights would drift by a bit a search."""
    w = normal(257, dtype=dtype)
    target = torch.full_like(w, math.nan)
    merge_tensor(target, [w.clone() for _ in c_K], c_K)
    assert torch.equal(target, w)


@dtypes
@given(c_K=coefficients(), seed=st.integers(0, 99))
def test_a_merge_is_the_exact_sum_rounded_once(dtype: torch.dtype, c_K: list[float], seed: int) -> None:
    """Goes red if sums run in bfloat16 or float16, or the coefficients are cast to them."""
    start = normal(64, seed=seed)
    sources_K = [(start + 0.01 * normal(64, seed=seed + k + 1)).to(dtype) for k in range(len(c_K))]
    target = torch.empty(64, dtype=dtype)
    merge_tensor(target, sources_K, c_K)
    error = (target.double() - exact(sources_K, c_K)).abs()
    assert (error <= rounding(sources_K, c_K, dtype)).all()


def test_float32_means_are_merged_into_bfloat16_weights_with_one_rounding() -> None:
    sources_K = [normal(1000, seed=k, dtype=torch.float32) for k in range(8)]
    target = torch.empty(1000, dtype=torch.bfloat16)
    merge_tensor(target, sources_K, [1 / 8] * 8)
    torch.testing.assert_close(target, exact(sources_K, [1 / 8] * 8).bfloat16(), rtol=1e-2, atol=0)
    assert (target == exact(sources_K, [1 / 8] * 8).bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("role", ["parameter", "buffer"])
def test_a_source_with_coefficient_zero_is_not_read(role: merge.Role) -> None:
    """Also goes red if an exact 0 is taken for a coefficient that was left out."""
    sources_K = [torch.full((3,), math.nan), torch.ones(3), torch.full((3,), 3.0), torch.full((3,), math.inf)]
    target = torch.empty(3)
    merge_tensor(target, sources_K, [0.0, 0.5, 0.5, 0.0], role)
    assert torch.equal(target, torch.full((3,), 2.0))


@given(c_K=coefficients(min_size=2))
def test_masks_come_from_the_newest_snapshot(c_K: list[float]) -> None:
    mask = torch.full((4, 4), -math.inf).triu(1)
    sources_K = [mask + k for k in range(len(c_K))]
    sources_K[-1] = sources_K[-1].clone()
    sources_K[-1][0, 0] = math.inf
    target = torch.zeros(4, 4)
    merge_tensor(target, sources_K, c_K, "buffer")
    finite = sources_K[-1].isfinite()
    if c_K[-1]:
        assert torch.equal(target[~finite], sources_K[-1][~finite])
    assert torch.equal(target == -math.inf, mask == -math.inf)
    average = math.fsum(c * k for k, c in enumerate(c_K))
    torch.testing.assert_close(target[finite], torch.full((int(finite.sum()),), average), rtol=1e-5, atol=1e-5)


@dtypes
def test_any_strides_and_shapes_are_written(dtype: torch.dtype) -> None:
    sources_K = [normal(6, 4, seed=k, dtype=dtype).T for k in range(3)]
    c_K = [0.5, -0.25, 0.75]
    dense = torch.empty(4, 6, dtype=dtype)
    merge_tensor(dense, [s.contiguous() for s in sources_K], c_K)
    transposed = torch.empty(6, 4, dtype=dtype).T
    strided = torch.empty(4, 12, dtype=dtype)
    merge_tensor(transposed, sources_K, c_K)
    merge_tensor(strided[:, ::2], sources_K, c_K)
    assert torch.equal(transposed, dense)
    assert torch.equal(strided[:, ::2], dense)
    scalar, empty = torch.empty((), dtype=dtype), torch.empty(0, 3, dtype=dtype)
    merge_tensor(scalar, [s[0, 0] for s in sources_K], c_K)
    merge_tensor(empty, [empty.clone() for _ in c_K], c_K)
    assert scalar == dense[0, 0]


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("role", ["parameter", "buffer"])
def test_blocks_change_nothing(numel: int, role: merge.Role, monkeypatch: pytest.MonkeyPatch) -> None:
    sources_K = [normal(numel, seed=k, dtype=torch.float32) for k in range(3)]
    if role == "buffer":
        sources_K[0][-1] = -math.inf
    whole, blocks = torch.empty(numel), torch.empty(numel)
    merge_tensor(whole, sources_K, [0.2, 0.3, 0.5], role)
    monkeypatch.setattr(merge, "BLOCK_NUMEL", 8)
    merge_tensor(blocks, sources_K, [0.2, 0.3, 0.5], role)
    assert torch.equal(blocks, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["device", "pinned", "pageable"])
def test_a_merge_on_a_gpu_is_that_of_the_cpu(place: str, dtype: torch.dtype) -> None:
    """Goes red if a block is read before its copy to the GPU is done."""
    sources_K = [normal(3 * merge.DEVICE_BLOCK_NUMEL + 5, seed=k, dtype=dtype) for k in range(4)]
    expected = torch.empty_like(sources_K[0])
    target = expected.cuda()
    merge_tensor(expected, sources_K, [0.2, 0.3, 0.6, -0.1])
    moved = {"device": Tensor.cuda, "pinned": Tensor.pin_memory, "pageable": Tensor.clone}[place]
    merge_tensor(target, [moved(s) for s in sources_K], [0.2, 0.3, 0.6, -0.1])
    torch.testing.assert_close(target.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_sources_stay_as_they_are() -> None:
    sources_K = [normal(9, seed=k, dtype=torch.float32) for k in range(3)]
    before = [s.clone() for s in sources_K]
    target = torch.nn.Parameter(torch.zeros(9))
    merge_tensor(target, sources_K, [0.0, 0.0, 1.0])
    target.data.zero_()
    assert all(map(torch.equal, sources_K, before))
    assert target.requires_grad
    assert target.grad_fn is None


def test_another_shape_is_refused() -> None:
    """Broadcasting would be silent."""
    with pytest.raises(SnapshotError, match=r"got \(1,\) in snapshot 1 for \(3,\)\. Clear the buffer"):
        merge_tensor(torch.empty(3), [torch.empty(3), torch.empty(1)], [0.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_running_mean_is_the_mean(dtype: torch.dtype) -> None:
    """Goes red if it runs in the weights' precision: bfloat16 stops moving after some 256 updates."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    steps = [[(3 + normal(50, seed=t)).to(dtype), normal(2, 3, seed=t, dtype=dtype)] for t in range(1000)]
    means = [torch.full((50,), math.nan, dtype=work), torch.full((2, 3), math.nan, dtype=work)]
    for t, weights in enumerate(steps):
        update_means(means, weights, t + 1)
    expected = [torch.stack([w.double() for w in states]).mean(0) for states in zip(*steps, strict=True)]
    torch.testing.assert_close(means, [e.to(work) for e in expected], rtol=1e-5, atol=1e-6)


def test_precisions_may_be_mixed_and_weights_stay_as_they_are() -> None:
    weights = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)]
    means = [torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.float64)]
    update_means(means, [0 * w for w in weights], 1)
    update_means(means, weights, 2)
    assert [m.tolist() for m in means] == [[0.5, 0.5]] * 3
    assert [w.tolist() for w in weights] == [[1, 1]] * 3


def test_a_rank_may_own_nothing() -> None:
    update_means([], [], 1)
    update_means([], [], 2)


@dtypes
def test_means_of_frozen_weights_change_no_bit(dtype: torch.dtype) -> None:
    w = normal(99, dtype=dtype)
    mean = torch.empty(99, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for t in range(1, 20):
        update_means([mean], [w], t)
    assert torch.equal(mean.to(dtype), w)
    assert torch.equal(pool_means(mean, mean.clone(), 0.3).to(dtype), w)


@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_pooled_means_are_the_mean_over_all_steps(lengths: list[int]) -> None:
    steps = normal(sum(lengths), 5)
    parts = steps.split(lengths)
    pooled, num_steps = parts[0].mean(0), lengths[0]
    for part, length in zip(parts[1:], lengths[1:], strict=True):
        num_steps += length
        older = pooled.clone()
        pooled, before = pool_means(older, part.mean(0), length / num_steps), pooled
        assert torch.equal(older, before)
    torch.testing.assert_close(pooled, steps.mean(0))
