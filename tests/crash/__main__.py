"""``make crash``: kills runs at many points, and writes the figures to a file."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.crash.driver import Matrix, scratch


def main() -> int:
    """Return 0 if everything held at each point."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--points", type=int, default=240, help="processes that die")
    parser.add_argument("--seed", type=int, default=0, help="chooses the points")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads do not survive a fork
    figures = {"seed": arguments.seed, "one process": matrix(arguments.seed, arguments.points)}
    text = json.dumps(figures, indent=2) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return any(part["failures"] for part in figures.values() if isinstance(part, dict))


def matrix(seed: int, num_points: int) -> dict[str, Any]:
    """Kill single processes."""
    start = time.monotonic()
    with scratch() as directory:
        runs = Matrix(seed, directory)
        result = runs.run(num_points)
        return {
            "points": result.num_deaths,
            "by kind": dict(sorted(result.kinds.items())),
            "runs brought to their end": result.num_runs,
            "by stage": dict(sorted(result.stages.items())),
            "stages missed": sorted(runs.stages - result.stages.keys()),
            "failures": result.failures,
            "seconds": round(time.monotonic() - start),
        }


if __name__ == "__main__":
    sys.exit(main())
