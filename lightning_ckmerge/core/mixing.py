"""Merges of whole checkpoints as mergekit 0.1.5 defines them, to the bit, in blocks.

Letters: K checkpoints, oldest first; S one tensor's shape. During training ``core.merge`` is used instead, whose sum
takes differences: there snapshots lie close together, and equal ones must come out unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ckmerge.core.layout import DTYPES
from lightning_ckmerge.core.merge import BLOCK_NUMEL
from lightning_ckmerge.core.native.mixing import total_weight
from lightning_ckmerge.errors import SnapshotError

# Norms and dot products are summed over pieces of this length: it decides the last bit of the angle.
SLERP_NUMEL = 1 << 20
MAX_COSINE = 0.9995
MIN_NORM = 1e-8


@torch.no_grad()
def mix_tensors(tensors_K: Sequence[Tensor], w_K: Sequence[float]) -> Tensor:
    """Return ``sum_k w_k tensor_k / sum_k w_k``, taken in float32 (float64 for float64) and rounded once.

    Args:
        tensors_K: K floating tensors of one shape ``(*S)``. Other precisions are promoted to a common one.
        w_K: K weights; their sum must not be 0. A weight of exactly 0 counts as 0.

    Source:
        Wortsman et al. 2022, arXiv:2203.05482.

    >>> mix_tensors([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], [1, 3])
    tensor([2.5000, 5.0000])
    """
    sources_K, out = _prepare(tensors_K)
    dtype = _working_dtype(out)
    coefficients_K = torch.tensor(w_K, dtype=dtype)
    total = coefficients_K.sum() if dtype == torch.float64 else total_weight(w_K)
    for start in range(0, out.numel(), BLOCK_NUMEL):
        block = slice(start, start + BLOCK_NUMEL)
        mixed = torch.zeros(out[block].shape, dtype=dtype)
        for source, coefficient in zip(sources_K, coefficients_K, strict=True):
            mixed.addcmul_(source[block].to(dtype), coefficient)
        out[block] = mixed.div_(total)
    return out.view(tensors_K[0].shape)


def mix_bytes(
    blocks_K: Sequence[memoryview], types_K: Sequence[str], w_K: Sequence[float], target: memoryview, target_type: str
) -> None:
    """Fill ``target`` with the result of ``mix_tensors``; the arguments are those of ``mix_blocks``."""
    tensors_K = [torch.frombuffer(block, dtype=DTYPES[t]) for block, t in zip(blocks_K, types_K, strict=True)]
    torch.frombuffer(target, dtype=DTYPES[target_type]).copy_(mix_tensors(tensors_K, w_K))


@torch.no_grad()
def slerp_tensors(older: Tensor, newer: Tensor, t: float) -> Tensor:
    """Return the point at ``t`` on the great circle from ``older`` (``t = 0``) to ``newer``, each flattened.

    Where they point in nearly the same or opposite directions, the point on the straight line.

    Source:
        Shoemake 1985, "Animating rotation with quaternion curves".

    >>> slerp_tensors(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    (a, b), out = _prepare([older, newer])
    dtype = _working_dtype(out)
    place = torch.tensor(t, dtype=dtype)
    norm_a, norm_b = (_norm(x, dtype) for x in (a, b))
    cosine = _over_pieces(a, lambda piece: (a[piece].to(dtype) / norm_a * (b[piece].to(dtype) / norm_b)).sum())
    cosine = cosine.sum().clamp(-1, 1)
    if cosine.abs() > MAX_COSINE:
        share_a, share_b = 1 - place, place
    else:
        angle = torch.acos(cosine)
        share_a = torch.sin((1 - place) * angle) / torch.sin(angle)
        share_b = torch.sin(place * angle) / torch.sin(angle)
    for start in range(0, out.numel(), SLERP_NUMEL):
        piece = slice(start, start + SLERP_NUMEL)
        out[piece] = share_a * a[piece].to(dtype) + share_b * b[piece].to(dtype)
    return out.view(older.shape)


def _prepare(tensors_K: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the tensors as flat ones of a common precision, and fresh memory for their merge."""
    shapes = [tuple(t.shape) for t in tensors_K]
    if len(set(shapes)) > 1:
        raise SnapshotError(
            f"checkpoints must agree on a tensor's shape, got {' and '.join(map(str, dict.fromkeys(shapes)))}. "
            "Merge checkpoints of one model."
        )
    common = tensors_K[0].dtype
    for tensor in tensors_K[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return [t.reshape(-1) for t in tensors_K], torch.empty(tensors_K[0].numel(), dtype=common)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _norm(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norms = _over_pieces(tensor, lambda piece: torch.linalg.vector_norm(tensor[piece].to(dtype)))
    norm = torch.linalg.vector_norm(norms)
    return norm if norm > MIN_NORM else torch.ones_like(norm)


def _over_pieces(tensor: Tensor, function: Callable[[slice], Tensor]) -> Tensor:
    starts = range(0, max(1, tensor.numel()), SLERP_NUMEL)
    return torch.stack([function(slice(start, start + SLERP_NUMEL)) for start in starts])
