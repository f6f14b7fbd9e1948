"""Print the table of docs/multi-gpu.md: python -m benchmarks.multi_gpu_table"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_ckmerge import BufferConfig
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.report.text import size

BILLIONS = (7, 70, 405)
GPUS = (8, 64, 512)
HEADER = (
    "model | GPUs | a snapshot, all ranks | buffer, a rank | with `storage: cpu` | DDP: search, a rank "
    "| DDP: received a trial | sharded: search, a rank | sharded: received a trial"
)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Bytes a rank, unless stated otherwise.

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
    """Return the bytes that a model takes if it is split evenly.

    Args:
        num_parameters: Of the whole model.
        world_size: Number of ranks.
        config: What to keep.
        is_sharded: Whether each rank holds a shard of the model (FSDP, tensor parallelism) or all of it (DDP).
        dtype: The weights' own.

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


def table() -> str:
    """Return the table in Markdown."""
    lines = [f"| {HEADER} |", f"|{'---|' * (HEADER.count('|') + 1)}"]
    for billions in BILLIONS:
        for num_gpus in GPUS:
            num_parameters = billions * 10**9
            whole = plan_rank(num_parameters, num_gpus, BufferConfig(), is_sharded=False)
            shard = plan_rank(num_parameters, num_gpus, BufferConfig(), is_sharded=True)
            in_memory = plan_rank(num_parameters, num_gpus, BufferConfig(storage="cpu"), is_sharded=True)
            sizes = (
                whole.snapshot,
                whole.buffer_memory,
                in_memory.buffer_memory,
                whole.search_memory,
                whole.received,
                shard.search_memory,
                shard.received,
            )
            lines.append(f"| {billions} B | {num_gpus} | {' | '.join(map(size, sizes))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
