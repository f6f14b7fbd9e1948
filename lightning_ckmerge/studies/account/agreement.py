"""Whether two models predict the same, and which flips were won and lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest  # type: ignore[import-untyped]
from torch import Tensor

from lightning_ckmerge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How predictions compare.

    Args:
        num: Predictions, those without a label left out where there are labels.
        same: Share of equal ones.
        won: Where only the second model is right; ``None`` without labels.
        lost: Where only the first one is.
        both: Where both are.
        p_value: Of a sign test on won and lost, which takes the predictions for independent; ``None`` without labels.

    Source:
        McNemar 1947, in its exact form.
    """

    num: int
    same: float
    won: int | None = None
    lost: int | None = None
    both: int | None = None
    p_value: float | None = None


def labels_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return predicted and true labels, flat, of what a user's ``predict`` returned for a batch.

    Args:
        output: Predictions, or a pair with labels. Floating predictions are logits or probabilities whose last
            dimension is the classes; integers and booleans are labels.

    Raises:
        ConfigError: It is something else.

    >>> labels_of((torch.tensor([[0.1, 0.9], [2.0, 1.0]]), torch.tensor([1, 1])))
    (tensor([1, 0]), tensor([1, 1]))
    """
    predictions, labels = output if isinstance(output, (tuple, list)) and len(output) == 2 else (output, None)
    if not isinstance(predictions, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        raise ConfigError(
            f"`predict` must return a tensor, or a pair of predictions and labels, got {type(output).__name__}. Return "
            "logits with the classes last, or labels as integers."
        )
    if predictions.is_floating_point():
        predictions = predictions.argmax(-1)
    flat = predictions.detach().reshape(-1).cpu()
    if labels is not None and labels.numel() != flat.numel():
        raise ConfigError(
            f"`predict` must return a label for each prediction, got {labels.numel()} for {flat.numel()}. Return "
            "logits with the classes last."
        )
    return flat, None if labels is None else labels.detach().reshape(-1).cpu()


def compare(before: Sequence[Tensor], after: Sequence[Tensor], labels: Sequence[Tensor | None]) -> Agreement:
    """Return how two models' predictions compare, batch by batch.

    Labels below 0 do not count, as cross-entropy's ``ignore_index`` does not.
    """
    first, second = torch.cat(list(before)), torch.cat(list(after))
    known = [t for t in labels if t is not None]
    if len(known) != len(labels):
        return Agreement(num=len(first), same=float((first == second).double().mean()))
    truth = torch.cat(known)
    counted = truth >= 0
    first, second, truth = first[counted], second[counted], truth[counted]
    was_right, is_right = first == truth, second == truth
    won, lost = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    return Agreement(
        num=len(truth),
        same=float((first == second).double().mean()),
        won=won,
        lost=lost,
        both=int((was_right & is_right).sum()),
        p_value=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )
