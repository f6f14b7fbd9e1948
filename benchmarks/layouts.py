"""Ways to lay the snapshots of a node's ranks out in files: python -m benchmarks.layouts

A prototype, to choose by: threads stand for ranks. Prints files, metadata operations and the speed of writing, medians
of rounds in which the layouts take turns. Each write is flushed to the disk, as snapshots are.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NUM_ROUNDS = 5
NUM_RANKS, CAPACITY, NUM_SNAPSHOTS, NUM_BYTES = 8, 10, 16, 4_000_000


class Node:
    """A node's ranks, which write below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = os.urandom(NUM_BYTES)
        self.barrier = threading.Barrier(NUM_RANKS)
        self.operations: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, *operations: str) -> None:
        """Count operations that ask the file system's metadata server."""
        with self._lock:
            self.operations.update(operations)


def file_a_snapshot(node: Node, rank: int) -> None:
    """Write a file a snapshot and rank, let it appear by a rename, and remove the oldest: the present layout."""
    for i in range(NUM_SNAPSHOTS):
        staged = node.root / f"{rank}-{i}.tmp"
        _write(staged, node.data)
        staged.rename(node.root / f"{rank}-{i}")
        node.note("open", "rename")
        if i >= CAPACITY:
            (node.root / f"{rank}-{i - CAPACITY}").unlink()
            node.note("remove")


def file_a_rank(node: Node, rank: int) -> None:
    """Overwrite the oldest place of a rank's one file, and replace its index."""
    ring = os.open(node.root / f"{rank}-ring", os.O_RDWR | os.O_CREAT)
    node.note("open")
    for i in range(NUM_SNAPSHOTS):
        os.pwrite(ring, node.data, i % (CAPACITY + 1) * NUM_BYTES)
        os.fsync(ring)
        staged = node.root / f"{rank}-index.tmp"
        _write(staged, b"{}")
        staged.rename(node.root / f"{rank}-index")
        node.note("open", "rename")
    os.close(ring)


def file_a_node(node: Node, rank: int) -> None:
    """Write a rank's range of a node's file, which appears when all ranks have: they have to wait for one another."""
    for i in range(NUM_SNAPSHOTS):
        staged = node.root / f"{i}.tmp"
        file = os.open(staged, os.O_RDWR | os.O_CREAT)
        node.note("open")
        os.pwrite(file, node.data, rank * NUM_BYTES)
        os.fsync(file)
        os.close(file)
        if node.barrier.wait() == 0:
            staged.rename(node.root / str(i))
            node.note("rename")
            if i >= CAPACITY:
                (node.root / str(i - CAPACITY)).unlink()
                node.note("remove")
        node.barrier.wait()


LAYOUTS: tuple[Callable[[Node, int], None], ...] = (file_a_snapshot, file_a_rank, file_a_node)


def main() -> None:
    """Measure, and print a table in Markdown."""
    speeds: dict[str, list[float]] = {}
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(NUM_ROUNDS):
        for layout in LAYOUTS:
            with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(NUM_RANKS) as pool:
                node, start = Node(Path(root)), time.perf_counter()
                list(pool.map(layout, [node] * NUM_RANKS, range(NUM_RANKS)))
                seconds = time.perf_counter() - start
                speeds.setdefault(layout.__name__, []).append(NUM_RANKS * NUM_SNAPSHOTS * NUM_BYTES / seconds / 1e6)
                counts[layout.__name__] = len(list(Path(root).iterdir())), node.operations.total()
    print("| layout | files | metadata operations | MB/s, median (range) |\n|---|---|---|---|")
    for name, found in speeds.items():
        span = f"{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})"
        print(f"| {name.replace('_', ' ')} | {counts[name][0]} | {counts[name][1]} | {span} |")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
