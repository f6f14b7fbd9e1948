"""The weighted sum at the speed of memory: ``fused.c``, compiled once a process when a large merge first asks for it.

PyTorch's operators pass over a block once a snapshot and operator; C code reads all snapshots side by side. It is used
only if it gives the same bits as ``merge_tensor``, so whether there is a compiler never shows in the weights.
``torch.compile`` reaches the same speed, but takes tens of seconds instead of one, and rounds otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ckmerge.core.merge import blending, merge_tensor
from lightning_ckmerge.core.native.compiler import NoCompilerError, compile_library, is_wanted

DTYPES = (torch.float32, torch.bfloat16)
# Pieces are dealt out over threads; this many elements take a millisecond or so.
PIECE_NUMEL = 1 << 20
logger = logging.getLogger(__name__)


class Pieces:
    """Tensors of equal roles and precisions, cut into pieces whose addresses C code can read.

    Args:
        targets_N: N contiguous tensors in host memory, of one dtype of ``DTYPES``.
        sources_KN: K times N contiguous tensors of the same shapes; each snapshot's are of one dtype of ``DTYPES``.
    """

    def __init__(self, targets_N: Sequence[Tensor], sources_KN: Sequence[Sequence[Tensor]]) -> None:
        self._memory = (targets_N, sources_KN)  # addresses keep nothing alive
        self.numels = array("q")
        self.targets = array("q")
        self.sources_K = [array("q") for _ in sources_KN]
        self.target_dtype = targets_N[0].dtype
        self.dtypes_K = [sources_N[0].dtype for sources_N in sources_KN]
        tables = (self.targets, *self.sources_K)
        for tensors in zip(targets_N, *sources_KN, strict=True):
            numel = tensors[0].numel()
            starts = range(0, numel, PIECE_NUMEL)
            self.numels.extend(min(PIECE_NUMEL, numel - start) for start in starts)
            for addresses, tensor in zip(tables, tensors, strict=True):
                first, size = tensor.data_ptr(), tensor.element_size()
                addresses.extend(first + start * size for start in starts)

    def __len__(self) -> int:
        return len(self.numels)


class Kernel:
    """``fused.c`` as a function.

    Raises:
        NoCompilerError: There is no compiler for this processor.
    """

    def __init__(self) -> None:
        self._merge = compile_library("fused.c").merge
        self._merge.restype = None

    def __call__(self, pieces: Pieces, c_K: Sequence[float], first: int = 0, last: int | None = None) -> None:
        """Write ``sum_k c_k source_k`` into the targets of pieces ``first`` to ``last``, exclusive.

        Other Python threads run meanwhile.
        """
        used, shares = zip(*blending(c_K), strict=True)
        num_pieces = (len(pieces) if last is None else last) - first
        self._merge(
            ctypes.c_int64(num_pieces),
            _address(pieces.numels, first),
            ctypes.c_int32(len(used) - 1),
            (ctypes.c_void_p * len(used))(*(_address(pieces.sources_K[k], first).value for k in used)),
            (ctypes.c_int32 * len(used))(*(pieces.dtypes_K[k] == torch.bfloat16 for k in used)),
            (ctypes.c_float * len(used))(*shares[1:]),
            _address(pieces.targets, first),
            ctypes.c_int32(pieces.target_dtype == torch.bfloat16),
        )


@functools.cache
def load_kernel() -> Kernel | None:
    """Return the kernel; ``None``, and the reason in the log, where it cannot be had. Takes a second the first time."""
    if not is_wanted():
        return None
    try:
        kernel = Kernel()
        if gives_the_same_bits(kernel):
            return kernel
        reason = "this processor rounds differently from PyTorch"
    except NoCompilerError as error:
        reason = str(error)
    logger.warning(
        "Merging at full speed needs a C compiler for this processor, got: %s. Without one, float32 merges take about "
        "1.5 times as long, bfloat16 merges three to four times. Install one, or name it in the environment variable "
        "CC.",
        reason,
    )
    return None


def gives_the_same_bits(kernel: Kernel) -> bool:
    """Whether a sample of merges, of all precisions, equals ``merge_tensor``'s."""
    # No powers of two: a product with one of these is exact, and would hide a rounding.
    # Shares of a half and more are added from the other end; the tail has one that is not the first.
    c_K = [0.7, 0.7, -0.1, 0.0, *[0.05] * 8, *[-0.03] * 8, -1.3]
    # Not random: the run's generators must not move.
    values_K = [torch.linspace(k, 700 - k, 1100).sin() for k in range(len(c_K))]
    for target_dtype in DTYPES:
        for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sources_K = [v.to(DTYPES[(first, second)[k % 2]]) for k, v in enumerate(values_K)]
            for num in (3, len(c_K)):
                fused, expected = torch.zeros(2, 1100, dtype=target_dtype)
                kernel(Pieces([fused], [[s] for s in sources_K[:num]]), c_K[:num])
                merge_tensor(expected, sources_K[:num], c_K[:num])
                if not torch.equal(fused, expected):
                    return False
    return True


def _address(table: array[int], first: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(table.buffer_info()[0] + first * table.itemsize)
