"""A module's predictions on one of its batches, whatever module it is.

Letters: N samples (of a language model: tokens); C classes or values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.search.averaging import IGNORED, is_classes

Predict = Callable[[Any, Any], tuple[Tensor, Tensor]]
REMEDY = (
    "Pass `predict`, a function of module and batch that returns outputs and targets, such as "
    "`lambda module, batch: (module.net(batch[0]), batch[1])`."
)


@dataclass(frozen=True)
class Prediction:
    """What a model says of one batch, and what is right.

    Args:
        outputs: ``(N, C)`` logits, or values.
        targets: ``(N,)`` classes, or ``(N, C)`` values.
    """

    outputs: Tensor
    targets: Tensor


def predict_by_convention(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of a batch that is a pair of inputs and targets.

    Outputs are those of the module's ``forward``; of its own ``predict_step``, which takes the whole batch, where it
    has no ``forward``. Of an output with ``logits``, as transformers' models have it, those are taken.

    Raises:
        ConfigError: The batch is no pair, or the module does not say how it predicts.
    """
    if not (isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch) == 2):
        found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise ConfigError(f"a batch must be a pair of inputs and targets, got a {found}. {REMEDY}")
    inputs, targets = batch
    return logits_of(_outputs(module, inputs, batch)), targets


def _outputs(module: Any, inputs: Any, batch: Any) -> Any:
    try:
        return module(inputs)
    except NotImplementedError as error:
        if is_overridden("predict_step", module, LightningModule):
            return module.predict_step(batch, 0)
        raise ConfigError(
            f"an ensemble needs the module's outputs, got {type(module).__name__}, which has neither `forward` nor "
            f"`predict_step`. {REMEDY}"
        ) from error


def logits_of(output: Any) -> Tensor:
    """Return the tensor that a model returned, or the ``logits`` among what it returned.

    Raises:
        ConfigError: There is neither.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"a model must return a tensor, or an object with `logits`, got {type(output).__name__}. {REMEDY}"
        )
    return found


def read_prediction(answer: Any) -> Prediction:
    """Return the answer of ``predict``, checked, one row a sample; targets of -100 are left out.

    >>> import torch
    >>> found = read_prediction((torch.zeros(2, 3, 10), torch.tensor([[1, 2, -100], [4, -100, -100]])))
    >>> found.outputs.shape, found.targets
    (torch.Size([3, 10]), tensor([1, 2, 4]))

    Args:
        answer: Logits ``(..., C)`` with targets ``(...)`` of integers; or values and targets of one shape, where the
            outputs may have a last dimension of 1 more.

    Raises:
        ConfigError: It is neither.
    """
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(t, Tensor) for t in answer)):
        raise ConfigError(f"`predict` must return two tensors, outputs and targets, got {_told(answer)}.")
    outputs, targets = answer
    if is_classes(targets):
        if outputs.shape[:-1] != targets.shape or outputs.ndim == 0 or outputs.shape[-1] < 2:
            raise ConfigError(
                "`predict` must return logits with the classes, two or more, in the last dimension, and a class for "
                f"each, got shapes {tuple(outputs.shape)} and {tuple(targets.shape)}. `movedim(1, -1)` moves the "
                "classes of an image; of one logit z, `torch.stack([torch.zeros_like(z), z], -1)` makes two."
            )
        flat, wanted = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1).long()
        counts = wanted != IGNORED
        return Prediction(flat, wanted) if bool(counts.all()) else Prediction(flat[counts], wanted[counts])
    if outputs.shape == (*targets.shape, 1):
        outputs = outputs.squeeze(-1)
    if outputs.shape != targets.shape or targets.ndim == 0:
        raise ConfigError(
            "`predict` must return values and targets of one shape, or logits and integers, got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)} of {targets.dtype}. Reshape one, or convert targets."
        )
    num = len(targets)
    return Prediction(outputs.reshape(num, -1), targets.reshape(num, -1))


def name_of(predict: Predict | None) -> str | None:
    """Return what ``predict`` is called; ``None`` where the convention holds."""
    return None if predict is None else str(getattr(predict, "__qualname__", type(predict).__qualname__))


def _told(answer: Any) -> str:
    if isinstance(answer, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in answer) or 'nothing'}"
    return type(answer).__name__
