"""The derivatives of the monitored metric by the live weights: a backward pass a batch, added up in fp32.

``torch.autograd.grad`` accumulates nothing: it touches no ``.grad``, and none of DDP's reducers, which wait for that.
Gradients are switched on inside ``validation_step`` alone, so DDP's own forward pass is that of any validation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.plugin.evaluate.batch_values import BatchRecorder

# A loss of bfloat16 has 8 bits, and may have been logged by way of another precision.
MAX_DIFFERENCE = 2e-3
REMEDY = "Name the metric in `monitor` that logs this loss, or leave `search.refine` out."


class GradientRecorder(BatchRecorder):
    """Adds up each batch's derivatives as the metric adds up its values.

    Beside the model it holds two gradients: the batch's, and the sum, in float32 or wider.

    Args:
        monitor: The metric.
        padding: As for ``BatchRecorder``.
        comm: The ranks, which score their shares of the batches together.
        parameters: By which to differentiate; all of them need gradients.
    """

    def __init__(
        self, monitor: str, padding: Sequence[Collection[int]], comm: Comm, parameters: Sequence[nn.Parameter]
    ) -> None:
        super().__init__([monitor], padding, None, comm)
        self._parameters = parameters
        self._sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        self._total_size = 0.0
        self._output: Any = None

    def watching(self, validation_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``validation_step`` with gradients; what it returns is kept until its batch has been logged."""

        @functools.wraps(validation_step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                self._output = validation_step(*args, **kwargs)
            return tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, self._output)

        return watched

    def gradients(self) -> list[Tensor]:
        """Return the derivatives, one tensor a parameter, over all ranks. A collective, after ``finish``.

        Raises:
            SearchError: The metric is no mean over batches.
        """
        total_size = math.fsum(self._comm.exchange(self._total_size))
        if not total_size:
            (monitor,) = self.of
            raise SearchError(
                "`search.refine` needs `monitor` to be the mean over batches of the loss that `validation_step` "
                f"returns, got {monitor!r}, which has no value by batch. {REMEDY}"
            )
        for summed in self._sums:
            if self._comm.world_size > 1:
                dist.all_reduce(summed)
            summed.div_(total_size)
        return self._sums

    def _keep(self, monitor: str, total: float, size: float) -> None:
        super()._keep(monitor, total, size)
        loss, self._output = loss_of(self._output), None
        if size == 0:  # padding
            return
        sign = _sign(loss, total / size, monitor)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for summed, gradient in zip(self._sums, gradients, strict=True):
            if gradient is not None:
                summed.add_(gradient, alpha=sign * size)
        self._total_size += size


def loss_of(output: Any) -> Tensor:
    """Return the loss in what ``validation_step`` returned.

    Raises:
        SearchError: There is none that can be differentiated.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise SearchError(
            "`search.refine` needs `validation_step` to return the loss, a tensor of one number or a dict with it as "
            f'"loss", got {got}. Return it, or leave `search.refine` out.'
        )
    return loss


def _sign(loss: Tensor, value: float, monitor: str) -> int:
    """Return 1 where the metric is the loss, and -1 where it is its negative."""
    if not loss.requires_grad:
        raise SearchError(
            "`search.refine` needs a loss that depends on the weights, got one without gradients from "
            "`validation_step`. Take it out of `torch.no_grad()` and leave out `detach()`."
        )
    for sign in (1, -1):
        if math.isclose(sign * float(loss.detach()), value, rel_tol=MAX_DIFFERENCE, abs_tol=1e-12):
            return sign
    raise SearchError(
        "`search.refine` needs `monitor` to be the mean over batches of the loss that `validation_step` returns, got "
        f"{monitor} {value:.6g} where the loss is {float(loss.detach()):.6g}. {REMEDY}"
    )
