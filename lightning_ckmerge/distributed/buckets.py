"""Tensors sent together: many small messages as a few large ones, and none larger than a bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Tensors of every dtype may begin here.
ALIGNMENT = 16


class Bucket:
    """Tensors that one rank sends to all, packed side by side unless it is a single dense one.

    Args:
        source: The rank that sends.
        tensors: On every rank the same shapes and dtypes.
    """

    def __init__(self, source: int, tensors: Sequence[Tensor]) -> None:
        self._source = source
        self._tensors = tensors
        self._starts = []
        end = 0
        for tensor in tensors:
            self._starts.append(_aligned(end))
            end = self._starts[-1] + tensor.nbytes
        self.extra_bytes = 0 if len(tensors) == 1 and tensors[0].is_contiguous() else end

    def broadcast(self, memory: Tensor, *, rank: int) -> None:
        """Send, or receive, in at least ``extra_bytes`` bytes of memory. A collective, which allocates nothing."""
        # As bytes: backends differ in the types that they know, and a bucket may hold several.
        if not self.extra_bytes:
            dist.broadcast(self._tensors[0].view(-1).view(torch.uint8), src=self._source)
            return
        packed = memory[: self.extra_bytes]
        parts = [
            packed[start : start + t.nbytes].view(t.dtype).view(t.shape)
            for start, t in zip(self._starts, self._tensors, strict=True)
        ]
        if rank == self._source:
            for part, tensor in zip(parts, self._tensors, strict=True):
                part.copy_(tensor)
        dist.broadcast(packed, src=self._source)
        if rank != self._source:
            for part, tensor in zip(parts, self._tensors, strict=True):
                tensor.copy_(part)


def make_buckets(source: int, tensors: Iterable[Tensor], max_bytes: int) -> Iterator[Bucket]:
    """Group tensors into buckets of at most ``max_bytes``; larger tensors are cut."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        for part in _cut(tensor, max_bytes):
            if bucket and _aligned(size) + part.nbytes > max_bytes:
                yield Bucket(source, bucket)
                bucket, size = [], 0
            bucket.append(part)
            size = _aligned(size) + part.nbytes
    if bucket:
        yield Bucket(source, bucket)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _cut(tensor: Tensor, max_bytes: int) -> Iterator[Tensor]:
    if tensor.nbytes <= max_bytes:
        yield tensor
    elif tensor.is_contiguous():
        size = max(1, max_bytes // tensor.element_size())
        flat = tensor.view(-1)
        yield from (flat[start : start + size] for start in range(0, flat.numel(), size))
    else:
        for row in tensor:
            yield from _cut(row, max_bytes)
