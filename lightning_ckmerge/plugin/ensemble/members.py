"""Several weights of one model, with which the model computes in turn.

The model itself is not copied and not changed: for a call it lends its structure (``torch.func.functional_call``). So M
members cost M sets of weights, less what is equal in all of them, such as a frozen base; and each member has module
buffers of its own, such as BatchNorm's statistics.

Letters: M members.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ckmerge.core.averaging import Averaging, average_outputs
from lightning_ckmerge.core.layout import find_aliases, is_dense

State = Mapping[str, Tensor]


class Members:
    """M members and their weights in the average.

    Args:
        module: Lends its structure; its own weights stay as they are.
        states_M: M sets of weights, by ``state_dict`` names; a tied tensor has one name.
        w_M: M weights that sum to 1.
        averaging: How their outputs are averaged.
    """

    def __init__(
        self, module: nn.Module, states_M: Sequence[State], w_M: Sequence[float], averaging: Averaging
    ) -> None:
        self._call = _Call(module)
        self._states_M = states_M
        self._w_M = w_M
        self._averaging: Averaging = averaging

    def average(self, function: Callable[[Any], Tensor]) -> Tensor:
        """Return the average of what a function of the module returns, over the members."""
        with _evaluating(self._call.module):
            return average_outputs(self.each(function), self._w_M, self._averaging)

    def each(self, function: Callable[[Any], Any]) -> Iterator[Any]:
        """Yield what the function returns for each member in turn."""
        for state in self._states_M:
            own = {f"module.{name}": tensor for name, tensor in state.items()}
            yield functional_call(self._call, own, (function,))


class _Call(nn.Module):
    """Calls a function with a module, so that any of its methods may compute with borrowed weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.module)


def state_of(module: nn.Module, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a copy of a module's weights, a tied tensor under one name. Extra state stays the module's own."""
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and is_dense(t)}
    aliases = find_aliases(state)
    return {
        name: tensor.detach().to(device, copy=True)
        for name, tensor in state.items()
        if name not in aliases and not name.endswith("_extra_state")
    }


def split_shared(states_M: Sequence[State]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return what is equal in all members, bit for bit, and what is each one's own.

    >>> a, b = torch.zeros(1), torch.ones(1)
    >>> shared, own = split_shared([{"a": a, "b": a}, {"a": a, "b": b}])
    >>> list(shared), [list(state) for state in own]
    (['a'], [['b'], ['b']])
    """
    first, *others = states_M
    equal = {n for n, t in first.items() if others and all(torch.equal(t, other[n]) for other in others)}
    return {n: first[n] for n in equal}, [{n: t for n, t in s.items() if n not in equal} for s in states_M]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Compute without dropout, and with BatchNorm's statistics, whatever mode the module was left in."""
    training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        yield
    finally:
        for each in training:
            each.training = True
