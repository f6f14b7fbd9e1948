"""Derivatives of the monitored metric at a merge: by its coefficients, and the Hessian's products with vectors.

The first are the derivatives by the weights, times the snapshots.

Letters: K snapshots, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.distributed.comm import together
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.rank.peft_adapters import Load
from lightning_ckmerge.plugin.restore.standstill import Standstill
from lightning_ckmerge.search.problem import Half


class Validation(Protocol):
    """Differentiates the monitored metric by the live weights."""

    def differentiate(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the derivatives, over all ranks."""

    def hessian_product(
        self, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], half: Half, num_batches: int
    ) -> list[Tensor]:
        """Return the Hessian's product with a vector."""


class Derivatives:
    """A function from coefficients to what ``search.refine`` asks for. All ranks call it together.

    What is frozen now, and buffers such as BatchNorm's statistics, count as if they did not move.

    Args:
        model: Each rank holds it whole.
        merger: Holds the snapshots.
        load: Writes a merge into the module.
        standstill: Brings all else to where the search began.
        validation: Differentiates.
    """

    def __init__(
        self,
        model: RankModel,
        merger: Merger,
        load: Load,
        standstill: Standstill,
        validation: Validation,
    ) -> None:
        self._model = model
        self._merger = merger
        self._load = load
        self._standstill = standstill
        self._validation = validation

    def __call__(self, c: Coefficients) -> dict[str, Any]:
        """Return each group's inner products ``(K, K)``, over all ranks.

        Raises:
            SearchError: The metric is not the mean of the loss that ``validation_step`` returns.
            PeerError: A rank has failed.
        """
        with together(self._model.comm):
            own = {group: products.numpy() for group, products in self._own(c).items()}
        everywhere = self._model.comm.exchange(own)
        groups = sorted({group for products in everywhere for group in products})
        return {g: np.sum([products[g] for products in everywhere if g in products], axis=0) for g in groups}

    def bend(self, c: Coefficients, half: Half, num_batches: int) -> tuple[int, Callable[[Any], Any]]:
        """Return the number of trained parameters, and a function that multiplies the Hessian at a merge with a vector.

        On one device. The function raises ``SearchError`` where the metric is not the mean of the loss that
        ``validation_step`` returns.
        """
        self._standstill.begin()
        self._load(c)
        trained = [o.tensor for o in self._model.ownership.local() if isinstance(o.tensor, nn.Parameter)]
        parameters = [p for p in trained if p.requires_grad]
        sizes = [p.numel() for p in parameters]

        def product(vector: Any) -> Any:
            self._standstill.begin()
            self._load(c)
            whole = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
            pieces = torch.split(whole, sizes)
            direction = [v.view(p.shape).to(p.device, p.dtype) for v, p in zip(pieces, parameters, strict=True)]
            found = self._validation.hessian_product(parameters, direction, half, num_batches)
            return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in found]).numpy()

        return sum(sizes), product

    def _own(self, c: Coefficients) -> dict[str, Tensor]:
        self._standstill.begin()
        self._load(c)
        local = self._model.ownership.local()
        trained = {o.name: o.tensor for o in local if isinstance(o.tensor, nn.Parameter) and o.tensor.requires_grad}
        gradients = dict(zip(trained, self._validation.differentiate([*trained.values()]), strict=True))
        # Nothing of the rest's size is allocated.
        whole = {o.name: gradients.get(o.name, o.tensor.new_zeros(()).expand(o.tensor.shape)) for o in local}
        return self._merger.inner_products(self._model.select(whole))
