"""What a rank spends, from a model's size and the number of ranks alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Bytes, for one of the ranks but where it says all.

    Args:
        buffer_memory: What the buffer holds at most, on the weights' device or, with ``storage="cpu"``, beside it.
        search_memory: Host memory that a search holds beside that: all that the rank holds of the latest weights.
        snapshot: One snapshot, over all ranks.
        received: What a rank receives from others for one trial, on top of what validation itself sends.
    """

    buffer_memory: int
    search_memory: int
    snapshot: int
    received: int


def plan_rank(
    num_parameters: int,
    world_size: int,
    config: BufferConfig,
    *,
    is_sharded: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> RankPlan:
    """Return the plan of a model that is split evenly.

    Args:
        num_parameters: Of the whole model.
        world_size: Number of ranks.
        config: What to keep.
        is_sharded: Whether each rank holds a shard of the model (FSDP, tensor parallelism) or all of it (DDP).
        dtype: The weights' own.

    >>> plan_rank(8_000_000, 4, BufferConfig(), is_sharded=False)
    RankPlan(buffer_memory=16000000, search_memory=16000000, snapshot=32000000, received=12000000)
    """
    share = -(-num_parameters // world_size)
    # On `meta` and before its first update, the buffer takes no memory.
    weights = torch.empty(share, dtype=dtype, device="meta")
    buffer = RollingBuffer(
        config,
        TensorLayout([OwnedTensor(name="weights", role="parameter", tensor=weights)]),
        DiskStorage("unused") if config.storage == "disk" else MemoryStorage(),
        device="cpu",
        run_id="0" * 8,
        segment_steps=1,
        double_segments=False,
    )
    return RankPlan(
        buffer_memory=buffer.num_bytes_in_memory,
        search_memory=weights.nbytes if is_sharded else num_parameters * dtype.itemsize,
        snapshot=buffer.stored_layout.num_bytes * world_size,
        received=0 if is_sharded else (num_parameters - share) * dtype.itemsize,
    )
