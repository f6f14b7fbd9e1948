"""Mixing blocks of bytes: the bits of ``mix_tensors``, with and without a compiler.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

import itertools
import logging
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_ckmerge.core.blockwise import mix_blocks
from lightning_ckmerge.core.layout import DTYPE_NAMES
from lightning_ckmerge.core.mixing import mix_tensors
from lightning_ckmerge.core.native.compiler import NoCompilerError
from lightning_ckmerge.core.native.mixing import MixKernel, load_mix_kernel, total_weight
from tests.core.test_merge import normal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def not_loaded() -> Iterator[None]:
    """Forget the kernel, before and after."""
    load_mix_kernel.cache_clear()
    yield
    load_mix_kernel.cache_clear()


def as_block(tensor: Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))


def mixed(tensors_K: Sequence[Tensor], w_K: Sequence[float], dtype: torch.dtype) -> Tensor:
    target = memoryview(bytearray(tensors_K[0].numel() * dtype.itemsize))
    types_K = [DTYPE_NAMES[t.dtype] for t in tensors_K]
    mix_blocks([as_block(t) for t in tensors_K], types_K, w_K, target, DTYPE_NAMES[dtype])
    return torch.frombuffer(target, dtype=dtype)


@pytest.mark.parametrize("num", [1, 2, 5, 9, 40])
@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES[:2], repeat=2), *((d, d) for d in DTYPES[2:])], ids=str)
def test_blocks_mix_to_the_bits_of_tensors(num: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Goes red if the C code multiplies and adds with two roundings, or adds up the weights in another order."""
    tensors_K = [normal(2051, seed=k, dtype=dtypes[k % 2]) for k in range(num)]
    w_K = [math.sin(k + 1) + 0.3 for k in range(num)]
    expected = mix_tensors(tensors_K, w_K)
    assert torch.equal(mixed(tensors_K, w_K, expected.dtype), expected)


@pytest.mark.usefixtures("not_loaded")
def test_without_a_compiler_the_bits_are_the_same_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    tensors_K = [normal(1030, seed=k, dtype=torch.float32) for k in range(3)]
    with caplog.at_level(logging.INFO):
        actual = mixed(tensors_K, [0.3, 0.7, -0.1], torch.float32)
    assert torch.equal(actual, mix_tensors(tensors_K, [0.3, 0.7, -0.1]))
    (record,) = caplog.records
    assert "no-such-compiler" in record.getMessage()


def test_what_is_not_finite_is_treated_alike() -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 1.0, -0.0, 3.4e38, 1e-45])
    tensors_K = list(torch.cartesian_prod(special, special).T)
    for w_K in ([0.5, 0.75], [0.0, 1.0]):
        actual, expected = mixed(tensors_K, w_K, torch.float32), mix_tensors(tensors_K, w_K)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(load_mix_kernel() is None, reason="needs a C compiler for an x86 processor with FMA")
def test_a_compiler_that_rounds_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header, wrapper = tmp_path / "rounds_twice.h", tmp_path / "cc"
    header.write_text("#include <math.h>\n#define fmaf(a, b, c) ((a) * (b) + (c))\n")
    wrapper.write_text(f'#!/bin/sh\nexec cc -include {header} "$@" -ffp-contract=off\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CC", str(wrapper))
    with pytest.raises(NoCompilerError, match="rounds otherwise"):
        MixKernel()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="PyTorch adds up in another order elsewhere")
@given(w_K=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=500))
def test_weights_add_up_as_pytorch_adds_them(w_K: list[float]) -> None:
    """mergekit divides by ``torch.sum`` of them, whose last bit is the order's."""
    assert total_weight(w_K) == torch.tensor(w_K).sum().item()
