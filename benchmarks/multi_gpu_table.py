"""Print the table of docs/multi-gpu.md: python -m benchmarks.multi_gpu_table"""

from __future__ import annotations

from lightning_ckmerge import BufferConfig
from lightning_ckmerge.plugin.planning import plan_rank
from lightning_ckmerge.report.text import size

BILLIONS = (7, 70, 405)
GPUS = (8, 64, 512)
HEADER = (
    "model | GPUs | a snapshot, all ranks | buffer, a rank | with `storage: cpu` | DDP: search, a rank "
    "| DDP: received a trial | sharded: search, a rank | sharded: received a trial"
)


def table() -> str:
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
