"""Ideas for the default that were tried, and left: other kernels, other kinds' steps, gradients without a search first.

python -m benchmarks.quality.tried RUN ...        writes benchmarks/quality/tried.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.quality import RUNS
from benchmarks.quality.case import Case, search
from benchmarks.quality.report import TRIED
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.core.spaces import Decay, Grouped

RATIOS = ((2.0, 72.0, 1.2), (2.0, 110.0, 1.2), (2.5, 90.0, 1.2), (3.0, 80.0, 0.9), (1.5, 100.0, 3.0))
LARGEST = 9.0


def shares(case: Case, found: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return the share of the decay's gain in percent, on both halves."""
    halves = ("search", "confirm")
    latest, branch = ({s: case.score(w_P, s).value for s in halves} for w_P in (case.latest_P, case.branch_P))
    return {
        name: {s: round(100 * (latest[s] - case.score(w_P, s).value) / (latest[s] - branch[s]), 2) for s in halves}
        for name, w_P in found.items()
    }


def fixed_places(case: Case) -> dict[str, torch.Tensor]:
    """Return merges at given places, by what they are."""
    names = [name for name, _ in case.model.named_parameters()]
    weights_KP, segments_K = case.buffer.weights_KP, case.buffer.segments_K
    found = {}

    def place(name: str, z_D: Mapping[str, float], space: Decay | None = None, **options: Any) -> Coefficients:
        grouped = Grouped(space=space or Decay(), **options).bind(names)
        by_group = grouped.by_group(z_D, segments_K) or grouped.coefficients(z_D, segments_K)
        found[name] = case.mix(weights_KP, by_group, grouped.group_of)
        return by_group

    (start,) = Grouped().initial(segments_K)
    by_group = place("where the default begins", start)
    place("the same, one length for all tensors", start, factors={})
    for ratio, tau, beta in RATIOS:
        space = Decay(ratio=ratio, max_extrapolation=LARGEST)
        place(f"ratio {ratio:g}, tau {tau:g}, beta {beta:g}", {"tau": tau, "beta": beta}, space)
    assert isinstance(by_group, Mapping)
    norms_K = Decay().coefficients({**start, "beta": 2.0}, segments_K)
    further = {**by_group, "norms": norms_K}
    found["norms alone with beta 2"] = case.mix(weights_KP, further, Grouped().bind(names).group_of)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of benchmarks/quality/runs")
    parser.add_argument("--no-searches", action="store_true", help="leave out the searches")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(TRIED.read_text()) if TRIED.exists() else {}
    for name in args.runs:
        case = Case(RUNS / name)
        results.setdefault(name, {}).update(shares(case, fixed_places(case)))
        if not args.no_searches:
            options = {
                "the default": {},
                "refined": {"refined": True},
                "refined after 1 trial": {"refined": True, "n_trials": 1},
            }
            for label, chosen in options.items():
                found = search(case, Grouped(), **chosen)  # type: ignore[arg-type]
                (about,) = shares(case, {label: found.weights_P}).values()
                results[name][label] = {**about, "evaluations": round(found.evaluations, 1)}
        TRIED.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
