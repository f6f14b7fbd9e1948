"""Parameters that FSDP1 has flattened and cut, as ``use_orig_params=True`` shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

# Parts that wrappers put into names, and take out of ``state_dict``'s again.
WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class FlatShard:
    """This rank's part of a parameter that FSDP1 flattened: elements ``start`` to ``stop`` of the whole's.

    ``group`` holds each element once: all ranks, or those of one node that share a replica.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole parameter. A collective."""
        numel = math.prod(self.shape)
        # Each element lies on one rank of the group, so a sum over zeros is the element itself, in any precision.
        whole = torch.zeros(numel, dtype=part.dtype, device=part.device)
        whole[self.start : self.stop] = part.reshape(-1)
        dist.all_reduce(whole, group=self.group)
        return whole.view(self.shape)


def flat_shards(module: nn.Module) -> Iterator[FlatShard]:
    """Return this rank's shards of the parameters that FSDP1 flattened, empty ones included."""
    for path, submodule in module.named_modules():
        handle = getattr(submodule, "_handle", None) if isinstance(submodule, FullyShardedDataParallel) else None
        if handle is None or not handle.uses_sharded_strategy:  # NO_SHARD: whole on every rank
            continue
        flat = handle.flat_param
        prefix = f"{path}." if path else ""
        for fqn, shard, shape in zip(flat._fqns, flat._shard_param_infos, flat._shapes, strict=True):
            start = shard.intra_param_start_idx if shard.in_shard else 0
            stop = shard.intra_param_end_idx + 1 if shard.in_shard else 0
            yield FlatShard(clean_name(f"{prefix}{fqn}"), tuple(shape), start, stop, handle.process_group)


def clean_name(name: str) -> str:
    """Return a module path without the parts that wrappers add.

    >>> clean_name("net._fsdp_wrapped_module.0.weight")
    'net.0.weight'
    """
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
