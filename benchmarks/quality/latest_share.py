"""Measure what share of the latest weights the step of `decay` wants, on runs that are no evidence.

python -m benchmarks.quality.latest_share

Trains the development runs of docs/protocol.md, which read Python's standard library, and searches each with several
values of ``latest_share``; results go to ``latest_share.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.protocol import Run
from benchmarks.evidence.train import Trained, train
from benchmarks.quality.case import search
from lightning_ckmerge.core.spaces import Decay, Grouped

SHARES = (0.0, 0.1, 1 / 6, 0.25)
MODELS = (("0.3M", 1000, 0), ("0.3M", 1000, 1), ("0.3M", 4000, 1), ("1M", 1000, 0), ("lstm", 1000, 0))
RESULTS = Path(__file__).with_name("latest_share.json")


def development_runs() -> list[Run]:
    """Return the runs by which constants may be chosen."""
    return [
        Run(cell="development", model=m, regime="constant", num_steps=n, seed=s, corpus="python") for m, n, s in MODELS
    ]


def measure(run: Run) -> dict[str, Any]:
    """Return, by share, what part of the twin's gain the search reaches on unseen data, in percent, and its cost."""
    case = Trained(run)
    latest, twin = (case.score(w_P, "confirm").value for w_P in (case.latest_P, case.branch_P))
    found = {}
    for share in SHARES:
        merge = search(case, Grouped(space=Decay(latest_share=share)))
        gain = latest - case.score(merge.weights_P, "confirm").value
        found[f"{share:.2f}"] = {
            "share": round(100 * gain / (latest - twin), 1),
            "evaluations": round(merge.evaluations, 1),
        }
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    results = {}
    for run in development_runs():
        train(run)
        results[run.directory.name] = measure(run)
        print(run.directory.name, results[run.directory.name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
