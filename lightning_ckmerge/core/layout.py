"""Which tensors a snapshot holds, and the place of each in the snapshot's flat memory.

A snapshot is one flat tensor a storage dtype. Names are sorted as safetensors sorts them, so a snapshot's file and its
memory are the same bytes, and a file can be mapped instead of read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_ckmerge.core.specs import TENSOR_TYPES, TensorSpec

Role = Literal["parameter", "buffer"]
Flats = dict[torch.dtype, Tensor]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own_name) for name, (own_name, _) in TENSOR_TYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class OwnedTensor:
    """One floating tensor of the model that this rank keeps and merges.

    Args:
        name: Its name in the LightningModule's ``state_dict``.
        role: Parameters must be finite; buffers may hold masks of ``-inf``, which are copied instead of averaged.
        tensor: The live tensor (or the local shard of it), real or complex, any shape.
    """

    name: str
    role: Role
    tensor: Tensor


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one tensor: ``numel`` elements from ``offset`` in the flat tensor of ``dtype``."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int


class TensorLayout:
    """The plan of a snapshot's memory. Two snapshots of one layout can be merged.

    Args:
        owned: The model's floating tensors, in any order.
        dtype: Storage precision; ``None``: the tensors' own. float64 tensors stay float64 in any case.
    """

    def __init__(self, owned: Sequence[OwnedTensor], dtype: torch.dtype | None = None) -> None:
        stored = [(storage_dtype(o.tensor, dtype), o) for o in owned]
        stored.sort(key=lambda pair: (-pair[0].itemsize, str(pair[0]), pair[1].name))
        self.sizes: dict[torch.dtype, int] = {}
        slots = []
        for stored_dtype, o in stored:
            real = as_real(o.tensor)
            offset = self.sizes.get(stored_dtype, 0)
            self.sizes[stored_dtype] = offset + real.numel()
            slots.append(
                Slot(
                    name=o.name,
                    role=o.role,
                    shape=tuple(real.shape),
                    dtype=stored_dtype,
                    offset=offset,
                    numel=real.numel(),
                )
            )
        self.slots = tuple(slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of one snapshot."""
        return sum(numel * dtype.itemsize for dtype, numel in self.sizes.items())

    def allocate(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> Flats:
        """Return uninitialised memory for one snapshot."""
        return {d: torch.empty(n, dtype=d, device=device, pin_memory=pinned) for d, n in self.sizes.items()}

    def views(self, flats: Flats) -> list[Tensor]:
        """Return one view a slot into ``flats``, in the order of ``slots``, in the tensors' shapes."""
        return [flats[s.dtype][s.offset : s.offset + s.numel].view(s.shape) for s in self.slots]

    def order(self, owned: Sequence[OwnedTensor]) -> list[Tensor]:
        """Return the live tensors in the order of ``slots``, complex ones seen as real."""
        by_name = {o.name: o.tensor for o in owned}
        return [as_real(by_name[s.name]) for s in self.slots]


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read one by one: not so if it is sparse, nested, quantised or lazy.

    >>> is_dense(torch.ones(2)), is_dense(torch.eye(2).to_sparse())
    (True, False)
    """
    return (
        not is_lazy(tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        # A subclass that wraps others keeps its values in a way of its own.
        and not hasattr(tensor, "__tensor_flatten__")
    )


def storage_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the precision in which a snapshot keeps ``tensor``."""
    own = as_real(tensor).dtype
    return own if dtype is None or own == torch.float64 else dtype


def as_real(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or a real view with a last dimension of 2 if it is complex."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def tensor_spec(shape: Sequence[int], dtype: torch.dtype) -> TensorSpec:
    """Return the description of a tensor.

    >>> tensor_spec((2, 3), torch.bfloat16)
    TensorSpec(shape=(2, 3), dtype='BF16', itemsize=2)
    """
    return TensorSpec(tuple(shape), DTYPE_NAMES.get(dtype, str(dtype)), dtype.itemsize)


def find_aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names that can be left out, each with the name, first by alphabet, of the same tensor.

    Two names mean one tensor if memory, dtype, shape and strides are all equal: views of one buffer stay apart.
    """
    kept: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name in sorted(weights):
        tensor = weights[name]
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = kept.setdefault(key, name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
    return aliases


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, whatever its device and strides."""
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data
