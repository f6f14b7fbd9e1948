"""What a run costs a file system and rank 0 as ranks are added: python -m benchmarks.scale [RANKS ...]

Trains a tiny model under DDP on so many gloo ranks of this machine, counts what each rank does to files, and writes
docs/scale.json and the table of docs/multi-gpu.md. Counts are exact; seconds are those of ranks that share two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, SearchConfig
from tests.support.rank_runs import BATCH, Classifier, make_rank_merge, points
from tests.support.ranks import RankPool
from tests.support.trainers import train

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "multi-gpu.md"
BEGIN, END = "<!-- scale -->", "<!-- end of scale -->"
RANKS = (1, 2, 4, 8, 16, 32, 64)
FAR = (512, 4096)
CAPACITY = 4
NUM_STEPS = 12
TIMEOUT_S = 1200.0
# Of Python's audit hooks: a call of each asks the server of a file system for something.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.link", "os.symlink"}
COUNTS = {
    "files": "files, at the end",
    "buffer_files": "of these, snapshots",
    "rank_0": "file operations of rank 0",
    "other": "file operations of another rank, at most",
    "operations": "file operations of all ranks",
    "index_bytes": "bytes of the index in a checkpoint",
}


class FileWatch:
    """Counts what this process does to the files below a directory. An audit hook stays, so it is made once."""

    def __init__(self) -> None:
        self.root = ""
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        is_named = bool(args) and isinstance(args[0], (str, bytes, os.PathLike))
        if self.root and event in EVENTS and is_named and os.fsdecode(args[0]).startswith(self.root):
            self.counts[event] += 1


_WATCH: list[FileWatch] = []


def run_rank(root: str) -> dict[str, Any]:
    """Train on one rank, with two searches, and return what it did."""
    if not _WATCH:
        _WATCH.append(FileWatch())
    watch = _WATCH[0]
    watch.root, watch.counts = root, Counter()
    world_size = dist.get_world_size()
    merge = make_rank_merge(
        root,
        search=SearchConfig(n_trials=2, anchors=["uniform"], max_fraction_of_training=None),
        buffer=BufferConfig(capacity=CAPACITY, every_n_train_steps=2, update_every_n_steps=1),
        search_on_train_end=False,
    )
    start = time.perf_counter()
    # As many steps, and validation batches a rank, whatever the number of ranks.
    options: dict[str, Any] = {"devices": world_size, "strategy": "ddp" if world_size > 1 else "auto"}
    val = DataLoader(points(8 * BATCH * world_size), batch_size=2 * BATCH)
    train_data = DataLoader(points(NUM_STEPS * BATCH * world_size), batch_size=BATCH, shuffle=True)
    trainer = train(Classifier, train_data, val, root=root, callbacks=[merge], max_epochs=1, **options)
    watch.root = ""
    assert trainer.global_step == NUM_STEPS
    return {
        "operations": sum(watch.counts.values()),
        "seconds": time.perf_counter() - start,
        "index_bytes": len(pickle.dumps(merge.state_dict())),
    }


def measure(world_size: int) -> dict[str, float]:
    """Return the counts of a run on so many ranks."""
    pool = RankPool(world_size)
    try:
        with tempfile.TemporaryDirectory() as root:
            found = pool.run(run_rank, root, timeout_s=TIMEOUT_S)
            merges = Path(root, "merges")
            cost = [json.loads(p.read_text())["cost"]["seconds"] for p in merges.glob("step=*/manifest.json")]
            names = [p for p in merges.rglob("*") if p.is_file()]
    finally:
        pool.stop()
    operations = [each["operations"] for each in found]
    return {
        "ranks": world_size,
        "files": len(names),
        "buffer_files": sum("buffer" in p.parts for p in names),
        "rank_0": operations[0],
        "other": max(operations[1:], default=0),
        "operations": sum(operations),
        "index_bytes": found[0]["index_bytes"],
        "search_s": max(sum(c.values()) for c in cost),
    }


def far(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    """Return the straight line through the counts on several ranks, at numbers that no one machine holds. R: rows."""
    many = [row for row in rows if row["ranks"] > 1]
    ranks_R, counts_R = ([row[key] for row in many] for key in ("ranks", name))
    slope = max(float(np.polyfit(ranks_R, counts_R, 1)[0]), 0.0)  # a count that does not grow stays
    start = float(np.mean(counts_R)) - slope * float(np.mean(ranks_R))
    return [start + slope * ranks for ranks in FAR]


def table(rows: Sequence[dict[str, float]]) -> str:
    """Return counts by ranks, in Markdown; those of ``FAR`` are extrapolated."""
    ranks = [f"{int(row['ranks'])}" for row in rows] + [f"*{n:,}*" for n in FAR]
    lines = [f"| ranks | {' | '.join(ranks)} |", f"|---|{'---|' * len(ranks)}"]
    for name, title in COUNTS.items():
        cells = [f"{row[name]:,.0f}" for row in rows]
        cells += [f"*{value:,.0f}*" for value in far(rows, name)] if len(rows) > 3 else ["-"] * len(FAR)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, keep, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("ranks", nargs="*", type=int, help="Numbers of ranks.")
    known = {row["ranks"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for world_size in parser.parse_args().ranks or RANKS:
        known[world_size] = measure(world_size)
        print(known[world_size], flush=True)
        RESULTS.write_text(json.dumps([known[n] for n in sorted(known)], indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    rows = [known[n] for n in sorted(known)]
    PAGE.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
