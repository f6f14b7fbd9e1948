"""Score every method on every trained run, offline: a merge is made of stored segment means and points.

python -m benchmarks.quality.measure [RUN ...] [--methods NAME ...] [--again] [--jobs 2]

Each run's scores go to ``scores.json`` beside its trail, after each method; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import RUNS
from benchmarks.quality.case import Case, Found
from benchmarks.quality.data import BATCH_SIZE, NUM_EVAL_BATCHES
from benchmarks.quality.methods import METHODS

# Every fifth segment of the steps that follow.
FURTHER_STRIDE = 5
DATA = {**NUM_EVAL_BATCHES, "batch_size": BATCH_SIZE}


def measure(directory: Path, methods: Sequence[str], again: bool, shift: int) -> None:
    """Score the methods on one run.

    Args:
        directory: The run's.
        methods: Their names.
        again: Whether to measure also what has been measured.
        shift: Turns the order round, so that no method always meets the same moment of the machine.
    """
    torch.set_num_threads(1)
    path = directory / "scores.json"
    scores: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if scores.get("data") != DATA:
        scores = {}
    shift %= len(methods)
    todo = [m for m in (*methods[shift:], *methods[:shift]) if again or m not in scores.get("methods", {})]
    if not todo:
        return
    case = Case(directory)
    scores = scores or references(case)
    for name in todo:
        scores["methods"][name] = record(case, METHODS[name].find(case))
        # Another process may read it at any time.
        path.with_suffix(".tmp").write_text(json.dumps(scores, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
        print(directory.name, name, flush=True)


def references(case: Case) -> dict[str, Any]:
    """Return what the methods are compared with."""
    steps, points_MP = case.about["segment_steps"], case.further["points_MP"]
    return {
        "run": case.about,
        "data": DATA,
        "latest": case.losses(case.latest_P),
        "decay_branch": case.losses(case.branch_P),
        "further": [
            {
                "step": case.about["num_steps"] + (m + 1) * steps,
                "confirm": case.score(points_MP[m], "confirm").value,
            }
            for m in range(FURTHER_STRIDE - 1, len(points_MP), FURTHER_STRIDE)
        ],
        "methods": {},
    }


def record(case: Case, found: Found) -> dict[str, Any]:
    """Return what is kept of a method's result."""
    return {
        "about": found.about,
        "losses": {split: round(loss, 6) for split, loss in case.losses(found.weights_P).items()},
        "evaluations": found.evaluations,
        "evaluations_to_99": found.evaluations_to_99,
        "evaluations_unstaged": found.evaluations_unstaged,
        "seconds": round(found.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of benchmarks/quality/runs; all of them by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs to measure side by side")
    args = parser.parse_args()
    directories = [RUNS / name for name in args.runs or sorted(p.parent.name for p in RUNS.glob("*/run.json"))]
    stride = max(1, len(args.methods) // max(1, len(directories)))
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(measure, directory, args.methods, args.again, i * stride)
            for i, directory in enumerate(directories)
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
