"""The way back from whole tensors to a module whose tensors are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ckmerge.distributed.flat_shards import flat_shards
from lightning_ckmerge.distributed.gather import entries
from lightning_ckmerge.distributed.ownership import shard_box


@torch.no_grad()
def scatter(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of ``whole``, the tensors of the module's ``state_dict``, into place. No collective.

    Args:
        module: Changed in place; its shards are in place.
        whole: Read a tensor at a time. What it lacks, such as the frozen base of adapters, stays as it is.
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
