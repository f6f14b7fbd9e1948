"""Which tensors this rank keeps, merges and writes."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_ckmerge.core.layout import OwnedTensor, Role


class Ownership:
    """The floating parameters and persistent buffers of a module that lives on this rank alone, tied ones once.

    Integer and boolean entries are not among them: a merge leaves them as the latest weights have them. Places are kept
    instead of tensors, since a module may put a new tensor in a buffer's place.

    Args:
        module: The LightningModule; names are those of its ``state_dict``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[str, Role, dict[str, Tensor | None], str]] = []
        seen: set[int] = set()
        for prefix, submodule in module.named_modules():
            dot = f"{prefix}." if prefix else ""
            persistent = {n: b for n, b in submodule._buffers.items() if n not in submodule._non_persistent_buffers_set}
            self._add(dot, "parameter", submodule._parameters, list(submodule._parameters), seen)
            self._add(dot, "buffer", submodule._buffers, list(persistent), seen)

    def owned(self) -> list[OwnedTensor]:
        """Return the tensors as they are now."""
        tensors = [(name, role, holder[key]) for name, role, holder, key in self._places]
        return [OwnedTensor(name=name, role=role, tensor=t) for name, role, t in tensors if t is not None]

    def _add(self, prefix: str, role: Role, holder: dict[str, Tensor | None], keys: list[str], seen: set[int]) -> None:
        for key in keys:
            tensor = holder[key]
            if tensor is None or id(tensor) in seen or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            seen.add(id(tensor))
            self._places.append((f"{prefix}{key}", role, holder, key))
