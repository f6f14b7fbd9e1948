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

from lightning_ckmerge.core.layout import find_aliases, is_dense
from lightning_ckmerge.errors import UnsupportedError
from lightning_ckmerge.search.averaging import Averaging, average_outputs

State = Mapping[str, Tensor]


class Members:
    """M members and their weights in the average.

    Args:
        module: Lends its structure; its own weights stay as they are.
        states_M: M sets of weights, by ``state_dict`` names; a tied tensor has one name.
        w_M: M weights that sum to 1.
        averaging: How their outputs are averaged.
        slots: What ``find_slots`` returned; ``None``: it is called.
    """

    def __init__(
        self,
        module: nn.Module,
        states_M: Sequence[State],
        w_M: Sequence[float],
        averaging: Averaging,
        slots: Mapping[str, str] | None = None,
    ) -> None:
        self._call = _Call(module)
        self._slots = find_slots(module) if slots is None else slots
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
            own = {f"module.{slot}": state[name] for slot, name in self._slots.items()}
            # Ties are in the slots. Told of them, it leaves a module that has two names with borrowed weights.
            yield functional_call(self._call, own, (function,), tie_weights=False)


class _Call(nn.Module):
    """Calls a function with a module, so that any of its methods may compute with borrowed weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.module)


def state_of(module: nn.Module, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a copy of a module's weights, a tied tensor under one name. Extra state stays the module's own."""
    return {name: tensor.detach().to(device, copy=True) for name, tensor in _distinct(module).items()}


def find_slots(module: nn.Module) -> dict[str, str]:
    """Return where the module's weights are used: each place in its modules, with the name in ``state_of``.

    Raises:
        UnsupportedError: Something in the ``state_dict`` is not in a module, so that it cannot be lent.
    """
    by_memory = {_memory(tensor): name for name, tensor in _distinct(module).items() if tensor.numel()}
    slots = {}
    for prefix, each in module.named_modules():
        for key, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None and (name := by_memory.get(_memory(tensor))) is not None:
                slots[f"{prefix}.{key}" if prefix else key] = name
    if missing := set(by_memory.values()) - set(slots.values()):
        raise UnsupportedError(
            f"an ensemble needs each tensor of the `state_dict` in a module, got {min(missing)!r}, which is none's "
            "parameter or buffer. Let `state_dict` return the tensors that the modules compute with."
        )
    return slots


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights themselves, a tied tensor under one name."""
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and is_dense(t)}
    aliases = find_aliases(state)
    return {n: t for n, t in state.items() if n not in aliases and n.rpartition(".")[2] != "_extra_state"}


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


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
