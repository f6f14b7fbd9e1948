"""Where checkpoints lie in weight space, from the inner products of their differences.

Letters: K checkpoints, oldest first; N tensors of one checkpoint; U = K - 1 updates, from each checkpoint to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ckmerge.core.merge import BLOCK_NUMEL


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Distances and directions.

    Args:
        distances_KK: Euclidean distance of each pair.
        cosines_UU: Cosine of the angle between each two updates; 0 where one of them did not move.
        norm: Of the newest checkpoint.
    """

    distances_KK: list[list[float]]
    cosines_UU: list[list[float]]
    norm: float


@torch.no_grad()
def measure_geometry(tensors_KN: Sequence[Sequence[Tensor]]) -> Geometry:
    """Return where K checkpoints lie, all their tensors taken as one vector each.

    Args:
        tensors_KN: K times N floating tensors. They are read in blocks, summed in float64.

    >>> places = [torch.tensor([0.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])]
    >>> found = measure_geometry([[place] for place in places])
    >>> found.distances_KK[0], found.cosines_UU[0], found.norm
    ([0.0, 3.0, 5.0], [1.0, 0.0], 5.0)
    """
    num = len(tensors_KN)
    # Differences from the newest: checkpoints lie close together and far from the origin, and their own inner products
    # would leave no digits for the distances.
    gram_KK = torch.zeros(num, num, dtype=torch.float64)
    square = torch.zeros((), dtype=torch.float64)
    for tensors_K in zip(*tensors_KN, strict=True):
        flat_K = [t.detach().reshape(-1) for t in tensors_K]
        for start in range(0, flat_K[0].numel(), BLOCK_NUMEL):
            blocks = torch.stack([t[start : start + BLOCK_NUMEL].double().cpu() for t in flat_K])
            square += blocks[-1] @ blocks[-1]
            blocks -= blocks[-1].clone()
            gram_KK += blocks @ blocks.T
    diagonal_K = gram_KK.diagonal()
    squares_KK = (diagonal_K[:, None] + diagonal_K[None, :] - 2 * gram_KK).clamp_min(0)
    updates_UU = (gram_KK[1:, 1:] - gram_KK[:-1, 1:] - gram_KK[1:, :-1] + gram_KK[:-1, :-1]).contiguous()
    lengths_U = updates_UU.diagonal().clamp_min(0).sqrt()
    scale_UU = lengths_U[:, None] * lengths_U[None, :]
    cosines_UU = torch.where(scale_UU > 0, updates_UU / scale_UU.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return Geometry(
        distances_KK=squares_KK.sqrt().tolist(),
        cosines_UU=cosines_UU.clamp(-1, 1).tolist(),
        norm=float(square.sqrt()),
    )
