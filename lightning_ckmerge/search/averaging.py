"""Averages of several models' outputs, and their losses. Letters: M models; N samples; C classes or values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Averaging = Literal["probabilities", "logits", "outputs"]
IGNORED = -100  # the target that `torch.nn.functional.cross_entropy` leaves out


def average_outputs(outputs_M: Iterable[Tensor], w_M: Sequence[float], averaging: Averaging) -> Tensor:
    """Return the average of M outputs, in float32 or wider; one of them is in memory at a time, beside the sum.

    >>> logits_M = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3)])]
    >>> average_outputs(logits_M, [0.5, 0.5], "probabilities").exp()
    tensor([0.3750, 0.6250])
    >>> average_outputs(logits_M, [0.5, 0.5], "logits").softmax(0)
    tensor([0.3660, 0.6340])

    Args:
        outputs_M: M tensors of one shape ``(..., C)``; for probabilities and logits, logits with C classes last.
        w_M: M weights, at least 0, that sum to 1.
        averaging: ``probabilities``: the result holds log-probabilities, which are logits as good as any other, summed
            in log space so that none underflows. ``logits`` and ``outputs``: the weighted mean.

    Source:
        Means of probabilities: Lakshminarayanan et al. 2017, arXiv:1612.01474. Means of logits are geometric means of
        probabilities, normalised.
    """
    total: Tensor | None = None
    for output, w in zip(outputs_M, w_M, strict=True):
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        if averaging == "probabilities":
            term = wide.log_softmax(-1) + (math.log(w) if w > 0 else -math.inf)
            total = term if total is None else torch.logaddexp(total, term)
        else:
            total = wide * w if total is None else total.add_(wide, alpha=w)
    assert total is not None
    return total


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's loss: cross-entropy where targets are classes, else the mean squared error.

    Args:
        outputs: ``(N, C)`` logits, or values.
        targets: ``(N,)`` classes, or ``(N, C)`` values.
    """
    if is_classes(targets):
        return F.cross_entropy(outputs.float(), targets, reduction="none")
    return (outputs.float() - targets.float()).square().mean(-1)


def is_classes(targets: Tensor) -> bool:
    """Whether targets name classes, rather than values to come near to."""
    return not (targets.is_floating_point() or targets.is_complex())
