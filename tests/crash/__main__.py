"""``make crash``: kills runs at many points, and writes the figures to a file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.crash.driver import Matrix, RankMatrix, Result, scratch


def main() -> int:
    """Return 0 if everything held at each point."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--points", type=int, default=240, help="processes that die")
    parser.add_argument("--rank-points", type=int, default=24, help="runs of two ranks in which one dies")
    parser.add_argument("--stops", type=int, default=2, help="runs of two ranks in which one stops for good")
    parser.add_argument("--again", type=float, default=0.5, help="how often a run that goes on dies once more")
    parser.add_argument("--seed", type=int, default=0, help="chooses the points")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads do not survive a fork
    rounds: list[dict[str, Any]] = []
    if arguments.points:
        found = one_process(arguments.seed, arguments.points, arguments.again)
        rounds.append({"seed": arguments.seed, "of": "one process", **found})
    if arguments.rank_points or arguments.stops:
        found = two_ranks(arguments.seed, arguments.rank_points, arguments.stops)
        rounds.append({"seed": arguments.seed, "of": "two ranks", **found})
    machine = f"{os.cpu_count()} {platform.machine()} cores"
    text = json.dumps({"machine": machine, "rounds": rounds}, indent=2) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return any(round_["failures"] for round_ in rounds)


def one_process(seed: int, num_points: int, again: float) -> dict[str, Any]:
    """Kill single processes."""
    begin = time.monotonic()
    with scratch() as directory:
        runs = Matrix(seed, directory, again)
        result = runs.run(num_points)
    missed = sorted(runs.stages - result.stages.keys())
    return {**figures_of(result), "stages missed": missed, "seconds": round(time.monotonic() - begin)}


def two_ranks(seed: int, num_points: int, num_stops: int) -> dict[str, Any]:
    """Kill one of two ranks."""
    begin = time.monotonic()
    with scratch() as directory:
        runs = RankMatrix(seed, directory)
        result = runs.run(num_points, num_stops)
    others = {f"the other rank {how}": number for how, number in sorted(runs.ends.items())}
    return {**figures_of(result), **others, "seconds": round(time.monotonic() - begin)}


def figures_of(result: Result) -> dict[str, Any]:
    """Return counts and failures."""
    return {
        "points": result.num_deaths,
        "by kind": dict(sorted(result.kinds.items())),
        "runs brought to their end": result.num_runs,
        "by stage": dict(sorted(result.stages.items())),
        "failures": result.failures,
    }


if __name__ == "__main__":
    sys.exit(main())
