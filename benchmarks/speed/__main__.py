"""``python -m benchmarks.speed [GROUP ...]``."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.speed import PAGE, RESULTS, gpu, merging, offline, searching, standing, starting, training, uploading
from benchmarks.speed.rounds import Row

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "merge": merging.measure,
    "growth": merging.measure_growth,
    "gpu": gpu.measure,
    "means": training.measure_means,
    "writing": training.measure_writing,
    "search": searching.measure,
    "standstill": standing.measure,
    "offline": offline.measure,
    "upload": uploading.measure,
    "import": starting.measure,
}
BEGIN, END = "<!-- measured -->", "<!-- end -->"


def main() -> None:
    """Measure, keep, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    groups = parser.parse_args().groups or list(GROUPS)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for group in groups:
        rows = []
        for row in GROUPS[group]():
            print(" | ".join((row.what, row.target, row.measured, mark(row.met))), flush=True)
            rows.append(asdict(row))
        results[group] = {"software": software(), "rows": rows}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(results)}{END}{rest.partition(END)[2]}")


def table(results: dict[str, Any]) -> str:
    """Return the measured rows in Markdown."""
    lines = []
    for group in (g for g in GROUPS if g in results):
        lines += [
            f"\n### `python -m benchmarks.speed {group}`\n",
            "| what | target | measured | |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['what']} | {r['target']} | {r['measured']} | {mark(r['met'])} |" for r in results[group]["rows"]
        ]
    return "\n".join(lines) + "\n\n"


def mark(met: bool | None) -> str:
    """Return whether a target is met, in a word."""
    return "" if met is None else "met" if met else "**missed**"


def software() -> dict[str, str]:
    """Return versions and processor."""
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": processor()}


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
