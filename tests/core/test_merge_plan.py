"""Merging all tensors at once: the same bits as one by one, with and without a compiler, and nothing on the side.

Letters: K snapshots, oldest first; N tensors of one snapshot.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.core import merge_plan
from lightning_ckmerge.core.layout import Role
from lightning_ckmerge.core.merge import BLOCK_NUMEL, merge_tensor
from lightning_ckmerge.core.merge_plan import MergePlan
from lightning_ckmerge.core.native import fused
from lightning_ckmerge.core.native.fused import Kernel, Pieces, gives_the_same_bits, load_kernel
from lightning_ckmerge.core.native.mixing import load_mix_kernel
from lightning_ckmerge.errors import SnapshotError
from tests.core.test_merge import coefficients, normal


@pytest.fixture(autouse=True)
def fuse_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_plan, "MIN_FUSED_NUMEL", 1)


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """The kernel, where there is a C compiler for a processor with FMA."""
    return load_kernel() or pytest.skip("needs a C compiler for a processor with FMA")


@pytest.fixture
def not_loaded() -> Iterator[None]:
    """Forget the kernel, before and after."""
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


def make_tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return a model's tensors: of several precisions, shapes and strides, with a mask."""
    mask = torch.full((5, 5), -math.inf).triu(1) + seed
    return [
        normal(33, 31, seed=seed, dtype=dtype),
        normal(7, seed=seed, dtype=torch.float64),
        normal(4, 6, seed=seed, dtype=dtype).T,
        mask,
        normal(seed=seed, dtype=dtype),
        normal(0, 3, dtype=dtype),
        normal(2100, seed=seed, dtype=torch.bfloat16),
        normal(9, seed=seed, dtype=torch.float16),
    ]


ROLES: list[Role] = ["parameter"] * 3 + ["buffer"] + ["parameter"] * 4


def one_by_one(targets_N: list[Tensor], sources_KN: list[list[Tensor]], c_K: list[float]) -> list[Tensor]:
    expected = [torch.empty_like(t) for t in targets_N]
    for n, target in enumerate(expected):
        merge_tensor(target, [s[n] for s in sources_KN], c_K, ROLES[n])
    return expected


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_threads", [1, 3])
@given(c_K=coefficients(min_size=2))
def test_all_at_once_gives_the_bits_of_one_by_one(num_threads: int, c_K: list[float]) -> None:
    """Float32 means and bfloat16 latest weights are mixed, as in a run with bfloat16 weights."""
    sources_KN = [make_tensors(k) for k in range(len(c_K) - 1)] + [make_tensors(99, torch.bfloat16)]
    targets_N = make_tensors(0, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        MergePlan(targets_N, sources_KN, ROLES).merge(c_K)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(targets_N, one_by_one(targets_N, sources_KN, c_K))


@pytest.mark.parametrize("num_terms", [1, 2, 3, 15, 16, 17, 32, 33, 40])
@pytest.mark.parametrize("dtypes", [*itertools.product(fused.DTYPES, repeat=3)], ids=str)
def test_the_kernel_gives_the_bits_of_the_reference(
    kernel: Kernel, num_terms: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Goes red if it multiplies and adds with two roundings, or drops the terms that one pass has no room for."""
    numel = 1030  # a block and a bit
    sources_K = [normal(numel, seed=k, dtype=dtypes[k % 2]) for k in range(num_terms)]
    c_K = [(-1) ** k / (k + 2) for k in range(num_terms - 1)]
    c_K.append(1 - math.fsum(c_K))
    actual, expected = torch.empty(numel, dtype=dtypes[2]), torch.empty(numel, dtype=dtypes[2])
    kernel(Pieces([actual], [[s] for s in sources_K]), c_K)
    merge_tensor(expected, sources_K, c_K)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@given(start=st.integers(0, 40), numel=st.integers(0, 200), c_K=coefficients(min_size=1))
def test_targets_may_begin_and_end_within_a_cache_line(
    kernel: Kernel, dtype: torch.dtype, start: int, numel: int, c_K: list[float]
) -> None:
    """Goes red if a head or a tail is left out, or lines are written beyond them."""
    around, expected = torch.full((300,), 7.0, dtype=dtype), torch.full((300,), 7.0, dtype=dtype)
    target = around[start : start + numel]
    sources_K = [normal(numel, seed=k, dtype=dtype) for k in range(len(c_K))]
    kernel(Pieces([target], [[s] for s in sources_K]), c_K)
    merge_tensor(expected[start : start + numel], sources_K, c_K)
    assert torch.equal(around, expected)


@pytest.mark.usefixtures("kernel")
def test_what_is_not_finite_is_treated_alike() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 1.0, -0.0, 3.4e38, 1e-45])
    sources_K = [s.contiguous() for s in torch.cartesian_prod(special, special, special).T]
    for dtype in fused.DTYPES:
        targets = [torch.empty(343, dtype=dtype) for _ in range(2)]
        MergePlan(targets[:1], [[s] for s in sources_K], ["parameter"]).merge([0.5, 0.75, -0.25])
        merge_tensor(targets[1], sources_K, [0.5, 0.75, -0.25])
        assert_same_bits(targets[:1], targets[1:])


@pytest.mark.usefixtures("kernel")
def test_large_tensors_are_cut_and_nothing_beside_them_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PIECE_NUMEL", 100)
    around = torch.full((1003 + 64,), 7.0)
    target, sources_K = around[32:-32], [normal(1003, seed=k, dtype=torch.float32) for k in range(3)]
    MergePlan([target], [[s] for s in sources_K], ["parameter"]).merge([0.25, 0.25, 0.5])
    expected = torch.empty(1003)
    merge_tensor(expected, sources_K, [0.25, 0.25, 0.5])
    assert torch.equal(target, expected)
    assert (around[:32] == 7).all()
    assert (around[-32:] == 7).all()


@pytest.mark.usefixtures("not_loaded")
def test_without_a_compiler_the_bits_are_the_same_and_the_log_says_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    sources_KN, c_K = [make_tensors(k) for k in range(3)], [0.5, -0.25, 0.75]
    targets_N = make_tensors(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plan = MergePlan(targets_N, sources_KN, ROLES)
            plan.merge(c_K)
            plan.merge(c_K)
    assert_same_bits(targets_N, one_by_one(targets_N, sources_KN, c_K))
    (record,) = caplog.records
    assert "no-such-compiler" in record.getMessage()
    assert "environment variable CC" in record.getMessage()


@pytest.mark.usefixtures("not_loaded")
def test_a_compiler_that_refuses_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does for a processor without FMA, by `#error`."""
    monkeypatch.setenv("CC", f"{sys.executable} -c 'raise SystemExit(1)'")
    assert load_kernel() is None


@pytest.mark.usefixtures("not_loaded")
def test_the_switch_keeps_everything_in_pytorch_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CKMERGE_NATIVE", "0")
    monkeypatch.setenv("CC", "no-such-compiler")
    load_mix_kernel.cache_clear()
    with caplog.at_level(logging.INFO):
        assert load_kernel() is None
        assert load_mix_kernel() is None
    load_mix_kernel.cache_clear()
    assert not caplog.records


@pytest.mark.usefixtures("kernel")
def test_a_kernel_that_rounds_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of them multiplies and adds in two steps."""
    assert gives_the_same_bits(Kernel())
    header, wrapper = tmp_path / "rounds_twice.h", tmp_path / "cc"
    header.write_text("#include <math.h>\n#define fmaf(a, b, c) ((a) * (b) + (c))\n")
    wrapper.write_text(f'#!/bin/sh\nexec cc -include {header} "$@" -ffp-contract=off\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CC", str(wrapper))
    assert not gives_the_same_bits(Kernel())


@pytest.mark.usefixtures("not_loaded")
def test_small_models_ask_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_plan, "MIN_FUSED_NUMEL", 10_000)
    MergePlan(make_tensors(0), [make_tensors(k) for k in range(2)], ROLES).merge([0.5, 0.5])
    assert load_kernel.cache_info().misses == 0


@given(seed=st.integers(0, 99))
def test_a_plan_may_be_used_again(seed: int) -> None:
    sources_KN = [make_tensors(seed + k) for k in range(3)]
    targets_N = make_tensors(0)
    plan = MergePlan(targets_N, sources_KN, ROLES)
    for c_K in ([0.25, 0.25, 0.5], [0.0, 0.0, 1.0], [0.5, -0.25, 0.75]):
        plan.merge(c_K)
        assert_same_bits(targets_N, one_by_one(targets_N, sources_KN, c_K))


def give_new_memory(parameter: Tensor) -> None:
    parameter.data = torch.full_like(parameter, 7.0)


def give_another_precision(parameter: Tensor) -> None:
    parameter.data = parameter.data.bfloat16()


def give_other_strides(parameter: Tensor) -> None:
    parameter.data = parameter.data.T.contiguous().T


def give_another_storage(parameter: Tensor) -> None:
    parameter.detach().set_(torch.full_like(parameter, 7.0).untyped_storage(), 0, parameter.shape)  # type: ignore[call-overload]


def resize_the_storage(parameter: Tensor) -> None:
    parameter.untyped_storage().resize_(1 << 22)


CHANGES = [give_new_memory, give_another_precision, give_other_strides, give_another_storage, resize_the_storage]


@pytest.mark.parametrize("side", ["target", "source"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_merge_goes_where_a_tensors_memory_is_now(change: Callable[[Tensor], None], side: str) -> None:
    """Goes red if addresses are kept from one merge to the next: freed memory is written, or read."""
    targets_N = [torch.nn.Parameter(normal(33, 31, dtype=torch.float32)), torch.nn.Parameter(torch.zeros(5))]
    sources_KN = [[normal(33, 31, seed=k, dtype=torch.float32), torch.full((5,), float(k))] for k in range(3)]
    plan = MergePlan(targets_N, sources_KN, ["parameter"] * 2)
    plan.merge([0.5, 0.25, 0.25])
    change(targets_N[0] if side == "target" else sources_KN[1][0])
    plan.merge([0.25, 0.25, 0.5])
    expected = torch.empty_like(targets_N[0])
    merge_tensor(expected, [s[0] for s in sources_KN], [0.25, 0.25, 0.5])
    assert_same_bits([targets_N[0].detach(), targets_N[1].detach()], [expected, torch.full((5,), 1.25)])


def test_a_merge_goes_into_tensors_that_took_the_targets_place() -> None:
    old, new = [normal(50)], [normal(50)]
    plan = MergePlan(old, [[normal(50, seed=k)] for k in range(2)], ["parameter"])
    before = old[0].clone()
    plan.merge([0.25, 0.75], new)
    expected = torch.empty_like(new[0])
    merge_tensor(expected, [normal(50, seed=k) for k in range(2)], [0.25, 0.75])
    assert_same_bits([*new, *old], [expected, before])


@pytest.mark.parametrize("size", [0, 20])
def test_targets_that_were_resized_are_refused(size: int) -> None:
    """A shape that other sources have, and memory that was freed."""
    target = torch.nn.Parameter(torch.zeros(50))
    plan = MergePlan([target], [[torch.ones(50)]], ["parameter"])
    plan.merge([1.0])
    if size:
        target.data = torch.zeros(size)
    else:
        target.untyped_storage().resize_(0)
    with pytest.raises(SnapshotError, match="shapes" if size else "memory"):
        plan.merge([1.0])


class Doubled(Tensor):
    """A subclass whose values are not in its own memory, as those of quantised weights are not."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Doubled:
        made = Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)  # type: ignore[attr-defined]
        made.half = half
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map(
            lambda x: 2 * x.half if isinstance(x, Doubled) else x, (args, kwargs or {})
        )
        return function(*plain[0], **plain[1])


def test_c_code_reads_no_tensor_subclass() -> None:
    """Goes red if the address of a wrapper, which is 0, is read."""
    target = torch.zeros(50)
    MergePlan([target], [[Doubled(torch.ones(50))], [torch.zeros(50)]], ["parameter"]).merge([0.5, 0.5])
    assert (target == 1).all()


def test_another_shape_is_refused_before_anything_is_written() -> None:
    target = torch.full((3,), 5.0)
    with pytest.raises(SnapshotError, match=r"got \(1,\) in snapshot 1 for \(3,\)\. Clear the buffer"):
        MergePlan([target], [[torch.empty(3)], [torch.empty(1)]], ["parameter"])
    assert (target == 5).all()


def test_groups_are_merged_with_their_own_coefficients() -> None:
    generator = torch.Generator().manual_seed(0)
    sources_KN = [[torch.randn(50, generator=generator) for _ in range(4)] for _ in range(3)]
    targets = [torch.empty(50) for _ in range(4)]
    by_group = {"a": (0.2, 0.3, 0.5), "b": (1.5, -0.5, 0.0)}
    groups_N = ["a", "b", "a", "b"]
    MergePlan(targets, sources_KN, ["parameter"] * 4, groups_N).merge(by_group)
    for n, group in enumerate(groups_N):
        expected = torch.empty(50)
        merge_tensor(expected, [sources_N[n] for sources_N in sources_KN], by_group[group])
        assert torch.equal(targets[n], expected)


def test_inner_products_are_those_of_each_groups_parameters() -> None:
    """Over several blocks; differences are taken before products, so weights that lie close together lose nothing."""
    torch.manual_seed(0)
    shapes = [(3, BLOCK_NUMEL // 2), (5,), (4,)]
    far_N = [1e3 * torch.randn(shape) for shape in shapes]
    sources_KN = [[far + 0.01 * torch.randn(far.shape) for far in far_N] for _ in range(3)]
    for sources_N in sources_KN:
        sources_N[2].fill_(-torch.inf)  # a mask
    gradients_N = [torch.randn(shape) for shape in shapes]
    targets_N = [torch.empty(shape) for shape in shapes]
    plan = MergePlan(targets_N, sources_KN, ["parameter", "parameter", "buffer"], ["a", "b", "b"])
    found = plan.inner_products(gradients_N)
    for group, n in (("a", 0), ("b", 1)):
        latest = sources_KN[-1][n]
        vectors_K = [(s[n] - latest).double().flatten() for s in sources_KN[:-1]] + [gradients_N[n].double().flatten()]
        expected = torch.tensor([[float(a @ b) for a in vectors_K] for b in vectors_K], dtype=torch.float64)
        torch.testing.assert_close(found[group], expected, rtol=1e-4, atol=1e-4)
