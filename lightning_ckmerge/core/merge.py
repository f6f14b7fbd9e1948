"""Weighted sums and running means of snapshots, in float32, in place.

Letters: K snapshots, oldest first; N tensors of one snapshot. Fresh memory costs more than arithmetic here, so sums run
in blocks that stay in cache, and no temporary is larger than one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ckmerge.core.layout import Role
from lightning_ckmerge.errors import SnapshotError

BLOCK_NUMEL = 1 << 18


@torch.no_grad()
def merge_tensor(target: Tensor, sources_K: Sequence[Tensor], c_K: Sequence[float], role: Role = "parameter") -> None:
    """Write ``sum_k c_k source_k`` into ``target``, rounding once.

    The sum is taken as ``base + sum_k c_k (source_k - base)``, where ``base`` has the largest coefficient: equal
    sources come out unchanged to the bit (frozen weights), and the rounding error shrinks with their distance.

    Args:
        target: The tensor to overwrite: floating, shape ``(*S)``, any dtype, device and strides.
        sources_K: K floating tensors of shape ``(*S)``, oldest first; the last is the latest weights. Left unchanged.
        c_K: K coefficients that sum to 1.
        role: In a ``buffer``, entries that are not finite after the sum are copied from the newest source.

    Raises:
        SnapshotError: A source has another shape than the target.

    Source:
        Wortsman et al. 2022, arXiv:2203.05482; ``c_K = [1 / K] * K`` is their uniform soup.

    >>> target = torch.empty(2)
    >>> merge_tensor(target, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], [0.5, 0.5])
    >>> target
    tensor([2., 4.])
    """
    check_shapes(target, sources_K)
    newest = sources_K[-1]
    b = base_index(c_K)
    base = sources_K[b]
    terms = [(s, float(c)) for k, (s, c) in enumerate(zip(sources_K, c_K, strict=True)) if c != 0 and k != b]
    if not target.is_contiguous():
        dense = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        merge_tensor(dense, sources_K, c_K, role)
        target.copy_(dense)
        return
    flat = target.view(-1)
    for start in range(0, flat.numel(), BLOCK_NUMEL):
        block = slice(start, start + BLOCK_NUMEL)
        out = flat[block]
        base_block = _block(base, block, out)
        total = base_block.clone()
        for source, c in terms:
            total.add_(_block(source, block, out) - base_block, alpha=c)
        if role == "buffer":
            total = torch.where(total.isfinite(), total, _block(newest, block, out))
        out.copy_(total)


def base_index(c_K: Sequence[float]) -> int:
    """Return which snapshot the others' differences are taken from: the first with the largest coefficient."""
    return max(range(len(c_K)), key=lambda k: c_K[k])


def check_shapes(target: Tensor, sources_K: Sequence[Tensor]) -> None:
    """Raise ``SnapshotError`` unless the K sources have the target's shape: broadcasting would be silent."""
    for k, source in enumerate(sources_K):
        if source.shape != target.shape:
            raise SnapshotError(
                f"snapshots must have the model's shapes, got {tuple(source.shape)} in snapshot {k} for "
                f"{tuple(target.shape)}. Clear the buffer after resizing a model."
            )


def _block(source: Tensor, block: slice, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return source.reshape(-1)[block].to(device=like.device, dtype=dtype)


@torch.no_grad()
def update_means(means_N: Sequence[Tensor], weights_N: Sequence[Tensor], num_updates: int) -> None:
    """Take the ``num_updates``-th weights into running means, in place: ``mean += (weights - mean) / num_updates``.

    Args:
        means_N: N float32 or float64 tensors, changed in place.
        weights_N: N floating tensors of the same shapes, of any dtype.
        num_updates: Weight states averaged, these included; from 1 on. 1 overwrites.
    """
    if not means_N:
        # A rank may own no tensor; `_foreach_copy_` wants one.
        return
    if num_updates == 1:
        torch._foreach_copy_(list(means_N), list(weights_N))
        return
    same = [(m, w) for m, w in zip(means_N, weights_N, strict=True) if m.dtype == w.dtype]
    if same:
        torch._foreach_lerp_([m for m, _ in same], [w for _, w in same], 1 / num_updates)
    for mean, weights in zip(means_N, weights_N, strict=True):
        if mean.dtype != weights.dtype:
            _lerp_in_blocks(mean, weights, 1 / num_updates)


def _lerp_in_blocks(mean: Tensor, weights: Tensor, share: float) -> None:
    """Widen the weights a block at a time: a widened copy of them all would take longer than the arithmetic."""
    if not (mean.is_contiguous() and weights.is_contiguous()):
        mean.lerp_(weights.to(mean.dtype), share)
        return
    mean_flat, weights_flat = mean.view(-1), weights.view(-1)
    for start in range(0, mean.numel(), BLOCK_NUMEL):
        block = slice(start, start + BLOCK_NUMEL)
        mean_flat[block].lerp_(weights_flat[block].to(mean.dtype), share)


@torch.no_grad()
def pool_means(older: Tensor, newer: Tensor, share_of_newer: float) -> Tensor:
    """Return the mean of two means, as a new tensor: ``older + share_of_newer (newer - older)``.

    >>> pool_means(torch.tensor([0.0]), torch.tensor([4.0]), 0.25)
    tensor([1.])
    """
    return torch.lerp(older, newer, share_of_newer)
