"""The weighted mean of ``core/mixing.py`` on blocks of bytes, in C where there is a compiler.

Then a merge needs no PyTorch, whose import takes longer than merging 2 GB, and 140 MiB of memory.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable, Collection, Sequence
from operator import add
from typing import TypeVar

from lightning_ckmerge.core.compiler import NoCompilerError, compile_library

# Types that the C code knows.
TYPES = {"F32", "BF16"}
LANES = 8
T = TypeVar("T")
logger = logging.getLogger(__name__)


class MixKernel:
    """``mixing.c`` as a function.

    Raises:
        NoCompilerError: There is no compiler for this processor, or it gives other bits.
    """

    def __init__(self) -> None:
        self._mix = compile_library("mixing.c").mix
        self._mix.restype = None
        # 2 ** -24 with one rounding, 0 with two.
        sources_K = [bytearray(struct.pack("f", x)) for x in (1 + 2**-11, 1 + 2**-12)]
        target = bytearray(4)
        self(sources_K, ["F32"] * 2, [-1, 1 + 2**-12], 1, target, "F32")
        if struct.unpack("f", target) != (2**-24,):
            raise NoCompilerError("the compiler rounds otherwise than PyTorch")

    def __call__(
        self,
        blocks_K: Sequence[bytearray | memoryview],
        types_K: Sequence[str],
        w_K: Sequence[float],
        total: float,
        target: bytearray | memoryview,
        target_type: str,
    ) -> None:
        """Fill ``target`` with ``sum_k w_k block_k / total``.

        Args:
            blocks_K: K writable blocks of memory of equally many elements.
            types_K: Their types, of ``TYPES``.
            w_K: K weights.
            total: What ``total_weight`` returns.
            target: Memory for as many elements.
            target_type: Its type, likewise.
        """
        num = len(blocks_K)
        self._mix(
            ctypes.c_int64(len(memoryview(target)) // (2 if target_type == "BF16" else 4)),
            ctypes.c_int32(num),
            (ctypes.c_void_p * num)(*map(_address, blocks_K)),
            (ctypes.c_int32 * num)(*(t == "BF16" for t in types_K)),
            (ctypes.c_float * num)(*w_K),
            ctypes.c_float(total),
            ctypes.c_void_p(_address(target)),
            ctypes.c_int32(target_type == "BF16"),
        )


@functools.cache
def load_mix_kernel() -> MixKernel | None:
    """Return the kernel, compiled in a tenth of a second; ``None``, and why in the log, where it cannot be had."""
    try:
        return MixKernel()
    except NoCompilerError as error:
        logger.info("Merging without PyTorch needs a C compiler for this processor, got: %s.", error)
        return None


def mix_blocks(
    blocks_K: Sequence[memoryview], types_K: Sequence[str], w_K: Sequence[float], target: memoryview, target_type: str
) -> None:
    """Fill ``target`` with ``sum_k w_k block_k / sum_k w_k``; the bits are ``mix_tensors``'.

    Args:
        blocks_K: K writable blocks of memory of equally many elements, oldest first; at least one.
        types_K: Their types: floating ones of ``TENSOR_TYPES``.
        w_K: K weights; their sum must not be 0.
        target: Memory for as many elements.
        target_type: Its type: the common one of ``types_K``.

    >>> blocks = [memoryview(bytearray(struct.pack("2f", *x))) for x in ((1, 2), (3, 6))]
    >>> target = memoryview(bytearray(8))
    >>> mix_blocks(blocks, ["F32", "F32"], [1, 3], target, "F32")
    >>> struct.unpack("2f", target)
    (2.5, 5.0)
    """
    if kernel := prepare_to_mix({*types_K, target_type}):
        kernel(blocks_K, types_K, w_K, total_weight(w_K), target, target_type)
        return
    from lightning_ckmerge.core.mixing import mix_bytes

    mix_bytes(blocks_K, types_K, w_K, target, target_type)


def prepare_to_mix(types: Collection[str]) -> MixKernel | None:
    """Return the kernel for blocks of these types; ``None``, with PyTorch imported, where it cannot be had."""
    if kernel := load_mix_kernel() if TYPES.issuperset(types) else None:
        return kernel
    import lightning_ckmerge.core.mixing  # noqa: F401

    return None


def total_weight(w_K: Sequence[float]) -> float:
    """Return the sum of weights in float32, added in the order in which PyTorch 2 adds up to 500 on x86.

    >>> total_weight([0.25, 0.5, 2])
    2.75
    """
    w_K = [_float32(w) for w in w_K]
    if len(w_K) < LANES:
        return _row_sum(w_K, _add, 0.0)
    end = len(w_K) // LANES * LANES
    rows = [w_K[i : i + LANES] for i in range(0, end, LANES)]
    lanes = _row_sum(rows, lambda a, b: [*map(_add, a, b)], [0.0] * LANES)
    return functools.reduce(_add, [*w_K[end:], *lanes], 0.0)


def _row_sum(row: Sequence[T], plus: Callable[[T, T], T], zero: T) -> T:
    """Add up by four partial sums side by side."""
    end = len(row) // 4 * 4
    partial = [functools.reduce(plus, row[lane:end:4], zero) for lane in range(4)]
    partial[0] = functools.reduce(plus, row[end:], partial[0])
    return functools.reduce(plus, partial)


def _add(a: float, b: float) -> float:
    return _float32(add(a, b))


def _float32(x: float) -> float:
    """Round; a sum of two float32 is the same when it was rounded to float64 before."""
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def _address(memory: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
