"""Snapshots as streams of blocks that fit the cache: converting or pooling one takes no memory of the model's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import cut, pool_means


def with_dtype(layout: TensorLayout, dtype: torch.dtype | None) -> TensorLayout:
    """Return the layout of the same tensors in another storage precision; float64 ones stay."""
    empty = [
        OwnedTensor(name=s.name, role=s.role, tensor=torch.empty(s.shape, dtype=s.dtype, device="meta"))
        for s in layout.slots
    ]
    return TensorLayout(empty, dtype)


def cast_blocks(tensors: Sequence[Tensor], layout: TensorLayout) -> Iterator[Tensor]:
    """Yield the flat memory of a snapshot from its tensors in slot order, which may be of other precision."""
    for slot, tensor in zip(layout.slots, tensors, strict=True):
        for block in cut(tensor):
            yield block.to(slot.dtype)


def pool_blocks(
    older: Sequence[Tensor], newer: Sequence[Tensor], share_of_newer: float, layout: TensorLayout
) -> Iterator[Tensor]:
    """Yield the flat memory of two snapshots' mean, taken in float32 (float64 for float64) and rounded once.

    Args:
        older: Tensors in the order of ``layout.slots``.
        newer: Tensors in the same order.
        share_of_newer: Its part of the mean, in (0, 1).
        layout: Of both snapshots and of their mean.
    """
    for slot, old, new in zip(layout.slots, older, newer, strict=True):
        dtype = torch.promote_types(slot.dtype, torch.float32)
        for old_block, new_block in zip(cut(old), cut(new), strict=True):
            newest = new_block.to(dtype)
            mean = pool_means(old_block.to(dtype), newest, share_of_newer)
            if slot.role == "buffer":
                fill_nonfinite(mean, newest)
            yield mean.to(slot.dtype)


@torch.no_grad()
def fill_nonfinite(mean: Tensor, newest: Tensor) -> None:
    """Copy elements that are not finite in ``mean`` from ``newest``: the mean of two masks of ``-inf`` is ``nan``."""
    torch.where(mean.isfinite(), mean, newest.to(mean.dtype), out=mean)
