"""A model's ``state_dict`` whose tensors are spread over ranks: made whole a tensor at a time, and dealt out again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ckmerge.core.adapters import frozen_base, left_out
from lightning_ckmerge.core.holders import persistent_buffers_of
from lightning_ckmerge.core.layout import find_aliases, is_dense, tensor_spec
from lightning_ckmerge.core.specs import TensorSpec
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.flat_shards import clean_name, flat_shards
from lightning_ckmerge.distributed.ownership import local_part, shard_box


class GatheredWeights:
    """The dense tensors of a module's ``state_dict`` but the frozen base of adapters; other entries are left out.

    Args:
        module: The LightningModule, its shards in place.
        comm: The ranks.
    """

    def __init__(self, module: nn.Module, comm: Comm) -> None:
        self._comm = comm
        self._flat = {s.name: s for s in flat_shards(module)}
        self._parameters = {clean_name(n) for n, _ in module.named_parameters(remove_duplicate=False)}
        self._tensors = entries(module, has_flat=bool(self._flat))
        buffers = {clean_name(n) for n, _ in module.named_buffers(remove_duplicate=False)}
        base = {clean_name(n) for n in frozen_base(module)}
        self.left_out = left_out(self._tensors, self._parameters | buffers, base)
        for name in [*self.left_out, *(n for n, t in self._tensors.items() if not is_dense(local_part(t)))]:
            self._tensors.pop(name, None)
        self.specs = {n: self._spec(n, t) for n, t in self._tensors.items()}
        # By rank 0's addresses: elsewhere a shard may be empty.
        self.aliases = comm.exchange(find_aliases({n: local_part(t) for n, t in self._tensors.items()}))[0]

    def gather(self, name: str) -> Tensor:
        """Return a whole tensor. A collective: all ranks ask for the same names in the same order."""
        tensor = self._tensors[name].detach()
        if name in self._flat:
            return self._flat[name].gather(tensor)
        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
        if name in self._parameters or self._comm.world_size == 1:
            return tensor
        # Ranks need not agree on buffers: rank 0's count, as they do in a checkpoint.
        whole = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
        return whole

    def _spec(self, name: str, tensor: Tensor) -> TensorSpec:
        return tensor_spec(self._flat[name].shape if name in self._flat else tensor.shape, tensor.dtype)


def entries(module: nn.Module, *, has_flat: bool) -> dict[str, Tensor]:
    """Return the tensors of a module's ``state_dict``, as they are spread over ranks."""
    if not has_flat:
        return {n: t for n, t in module.state_dict().items() if isinstance(t, Tensor)}
    # FSDP1's `state_dict` gathers the whole model at once.
    entries: dict[str, Tensor] = {clean_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
    for path, submodule in module.named_modules(remove_duplicate=False):
        for name, buffer in persistent_buffers_of(submodule):
            entries[clean_name(f"{path}.{name}" if path else name)] = buffer
    return entries


@torch.no_grad()
def scatter(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of ``whole``, the tensors of the module's ``state_dict``, into place. No collective.

    Args:
        module: Changed in place; its shards are in place.
        whole: Read a tensor at a time. Missing tensors, such as the frozen base of adapters, stay as they are.
    """
    flat = {s.name: s for s in flat_shards(module)}
    for name, tensor in entries(module, has_flat=bool(flat)).items():
        if name not in whole:
            continue
        source = whole[name]
        if name in flat:
            tensor.copy_(source.reshape(-1)[flat[name].start : flat[name].stop].view(tensor.shape))
        elif isinstance(tensor, DTensor):
            box = shard_box(name, tensor)
            tensor.to_local().copy_(source[tuple(slice(*r) for r in box.ranges_D)])
        else:
            tensor.copy_(source)
