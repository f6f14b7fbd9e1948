"""Compare memory bit by bit, and sum it up where it is too large to be copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of more than this, evenly spaced pieces stand for all.
MAX_SUMMED_BYTES = 64 << 20
NUM_PIECES, PIECE_BYTES = 4096, 4096
# Sums of so many words are weighted by their place, so that a permutation shows.
ROW_WORDS = 64


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two plain tensors of one shape and dtype are the same, NaN and the sign of zero included."""
    return torch.equal(_as_integers(a), _as_integers(b))


def array_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array's bytes in one dimension, as a view where that is possible."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def checksum(memory: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Return a number, on the memory's own device, that nearly any change of ``memory`` changes.

    SavedState of more than ``MAX_SUMMED_BYTES`` is represented by ``NUM_PIECES`` pieces.

    Raises:
        ValueError: It is that large, and does not lie in one piece.
    """
    data = _tensor_bytes(memory) if isinstance(memory, Tensor) else torch.from_numpy(_dense_bytes(memory))
    if data.numel() > MAX_SUMMED_BYTES:
        stride = data.numel() // NUM_PIECES
        data = data[: NUM_PIECES * stride].view(NUM_PIECES, stride)[:, :PIECE_BYTES].reshape(-1)
    if data.storage_offset() % 8:
        data = data.clone()
    num_rows = data.numel() // (8 * ROW_WORDS)
    body, tail = data[: num_rows * 8 * ROW_WORDS], data[num_rows * 8 * ROW_WORDS :]
    rows = body.view(torch.int64).view(num_rows, ROW_WORDS).sum(1)
    places = torch.arange(1, num_rows + 1, device=data.device)
    ends = torch.arange(1, tail.numel() + 1, device=data.device)
    return rows.mul_(places).sum() + 31 * (tail.long() * ends).sum()


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _tensor_bytes(tensor: Tensor) -> Tensor:
    integers = _as_integers(tensor)
    if not integers.is_contiguous():
        order = sorted(range(integers.dim()), key=integers.stride, reverse=True)
        integers = integers.permute(order)  # channels last, and other orders of the same memory
    if not integers.is_contiguous():
        _require_small(integers.nbytes)
    return integers.reshape(-1).view(torch.uint8)


def _dense_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    dense = array.T if array.flags.f_contiguous else array
    if not dense.flags.c_contiguous:
        _require_small(array.nbytes)
    return array_bytes(dense)


def _require_small(num_bytes: int) -> None:
    if num_bytes > MAX_SUMMED_BYTES:
        raise ValueError(f"{num_bytes} bytes that do not lie in one piece")
