"""Weighted sums and running means of snapshots, in float32, in place.

Letters: K snapshots, oldest first; N tensors of one snapshot. Fresh memory costs more than arithmetic here, so sums run
in blocks that stay in cache, and no temporary is larger than one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_ckmerge.core.layout import Role
from lightning_ckmerge.errors import SnapshotError

BLOCK_NUMEL = 1 << 19
# On a GPU a small block is done before the next operator is launched; this one and the mean still stay in its cache.
DEVICE_BLOCK_NUMEL = 1 << 22


@torch.no_grad()
def merge_tensor(target: Tensor, sources_K: Sequence[Tensor], c_K: Sequence[float], role: Role = "parameter") -> None:
    """Write ``sum_k c_k source_k`` into ``target``, rounding once.

    The sum is taken as a mean that moves towards one source after another, as ``blending`` says: equal sources come
    out unchanged to the bit (frozen weights), and each costs one pass over a block.

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
    if not target.is_contiguous():
        dense = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        merge_tensor(dense, sources_K, c_K, role)
        target.copy_(dense)
        return
    (first, _), *others = blending(c_K)
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    block_numel = BLOCK_NUMEL if target.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    if target.dtype != dtype:
        block_numel //= 2  # the mean and a widened source lie beside the target
    blocks_K = [cut(source, block_numel) for source in sources_K]
    for i, out in enumerate(cut(target, block_numel)):
        total = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
        mean = _like(total, blocks_K[first][i])
        for k, share in others:
            mean = torch.lerp(mean, _like(total, blocks_K[k][i]), share, out=total)
        if role == "buffer":
            mean = torch.where(mean.isfinite(), mean, _like(total, blocks_K[-1][i]))
        if mean is not out:
            out.copy_(mean)


def blending(c_K: Sequence[float]) -> list[tuple[int, float]]:
    """Return in which order snapshots move a mean, and each one's share: ``mean += share (source - mean)``.

    The largest coefficient comes first: so the running sum never comes near 0, even with negative coefficients.

    >>> blending([0.25, 0.0, 1.0, -0.25])
    [(2, 1.0), (0, 0.2), (3, -0.25)]
    """
    used = sorted((k for k, c in enumerate(c_K) if c != 0), key=lambda k: -c_K[k])
    totals = accumulate(float(c_K[k]) for k in used)
    return [(k, float(c_K[k]) / total) for k, total in zip(used, totals, strict=True)]


def check_shapes(target: Tensor, sources_K: Sequence[Tensor]) -> None:
    """Raise ``SnapshotError`` unless the K sources have the target's shape: broadcasting would be silent."""
    for k, source in enumerate(sources_K):
        if source.shape != target.shape:
            raise SnapshotError(
                f"snapshots must have the model's shapes, got {tuple(source.shape)} in snapshot {k} for "
                f"{tuple(target.shape)}. Clear the buffer after resizing a model."
            )


@torch.no_grad()
def inner_products(gradient: Tensor, sources_K: Sequence[Tensor]) -> Tensor:
    """Return the inner products of K vectors, ``(K, K)`` in float64: K - 1 differences of sources, and the gradient.

    The differences are ``source_k - source_K``. So the last row tells how fast a value changes as a coefficient moves
    from the latest weights to each other snapshot, and the rest how far apart the snapshots lie.

    Args:
        gradient: Derivatives of the value by the merged tensor, shape ``(*S)``.
        sources_K: K floating tensors of shape ``(*S)``, oldest first; the last is the latest weights.

    >>> inner_products(torch.tensor([1.0, 10.0]), [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0])])
    tensor([[  5., -19.],
            [-19., 101.]], dtype=torch.float64)
    """
    total_KK = torch.zeros(len(sources_K), len(sources_K), dtype=torch.float64)
    # S elements of all vectors are one block.
    num = max(1, BLOCK_NUMEL // len(sources_K))
    for gradient_S, *sources_KS in zip(*(cut(t, num) for t in (gradient, *sources_K)), strict=True):
        vectors_KS = torch.stack([source_S.to(gradient_S) for source_S in sources_KS])
        vectors_KS[:-1] -= vectors_KS[-1]
        vectors_KS[-1] = gradient_S
        total_KK += (vectors_KS @ vectors_KS.T).to(total_KK)
    return total_KK


def cut(tensor: Tensor, numel: int = BLOCK_NUMEL) -> tuple[Tensor, ...]:
    """Return the tensor's elements in order, in one-dimensional pieces of at most ``numel``; views where possible."""
    return torch.split(tensor.reshape(-1), numel)


def _like(total: Tensor, source: Tensor) -> Tensor:
    # It crosses to a GPU in its own precision; from pinned memory without waiting: later operations queue behind it.
    return source.to(total.device, non_blocking=total.device.type == "cuda").to(total.dtype)


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
    for mean_S, weights_S in zip(cut(mean), cut(weights), strict=True):
        mean_S.lerp_(weights_S.to(mean.dtype), share)


@torch.no_grad()
def pool_means(older: Tensor, newer: Tensor, share_of_newer: float) -> Tensor:
    """Return the mean of two means, as a new tensor: ``older + share_of_newer (newer - older)``.

    >>> pool_means(torch.tensor([0.0]), torch.tensor([4.0]), 0.25)
    tensor([1.])
    """
    return torch.lerp(older, newer, share_of_newer)
