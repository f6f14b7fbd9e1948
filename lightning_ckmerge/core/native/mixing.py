"""``mixing.c`` as a function: the weighted mean of checkpoints, on blocks of bytes.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable, Sequence
from operator import add
from typing import TypeVar

from lightning_ckmerge.core.native.compiler import NoCompilerError, compile_library, is_wanted

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
            total: As returned by ``total_weight``.
            target: Memory for as many elements.
            target_type: Its type, of ``TYPES``.
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
    if not is_wanted():
        return None
    try:
        return MixKernel()
    except NoCompilerError as error:
        logger.info("Merging without PyTorch needs a C compiler for this processor, got: %s.", error)
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
