"""Where a module keeps its own tensors: a dict, or for TorchScript something that is written as attributes are."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


class ScriptTensors(MutableMapping[str, Any]):
    """The parameters or buffers of a scripted or traced module, whose own mapping has few of a dict's methods.

    Args:
        module: The module.
        kind: ``_parameters`` or ``_buffers``.
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        self._module, self._kind = module, kind

    def __getitem__(self, key: str) -> Any:
        return dict(getattr(self._module, self._kind).items())[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self._module, key, value)

    def __delitem__(self, key: str) -> None:
        delattr(self._module, key)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in getattr(self._module, self._kind).items()])

    def __len__(self) -> int:
        return len(list(self))


def is_script(module: nn.Module) -> bool:
    """Whether a module is scripted or traced."""
    return issubclass(type(module), torch.jit.ScriptModule)


def parameters_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Return where a module keeps its own parameters, by their names in it.

    >>> list(parameters_of(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    return ScriptTensors(module, "_parameters") if is_script(module) else module._parameters


def buffers_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Return where a module keeps its own buffers, by their names in it."""
    return ScriptTensors(module, "_buffers") if is_script(module) else module._buffers


def persistent_buffers_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own buffers, with their names, that its ``state_dict`` holds."""
    left_out = module._non_persistent_buffers_set
    return [(n, b) for n, b in buffers_of(module).items() if b is not None and n not in left_out]
