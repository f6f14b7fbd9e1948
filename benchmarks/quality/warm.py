"""What a search may take over from the run's previous one: nothing, its optimum, or its trials too.

python -m benchmarks.quality.warm [RUN ...]

One search after three quarters of a run, and four at its end. The first takes over nothing; the others have the optimum
as an anchor, as the package does; of these the last two tell the sampler all earlier trials too, before it proposes.
Values have changed since: they are shifted by as much as the latest weights' has changed, or the optimum's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from optuna.trial import create_trial

from benchmarks.quality import RUNS
from benchmarks.quality.case import NUM_TRIALS, Case, Snapshots, batches_until, run_search
from benchmarks.quality.report import spread, table
from lightning_ckmerge.core.outcome import Score, Scored
from lightning_ckmerge.core.spaces import Grouped
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.stopping import NEVER
from lightning_ckmerge.search.study import SearchStudy

SHARE_BEFORE = 0.75
FEW_TRIALS = 8
HEADER = (
    "taken over",
    "evaluations to 99 % of the best gain",
    f"share after {FEW_TRIALS} trials",
    f"share after {NUM_TRIALS} trials",
    "evaluations",
)
Ran = tuple[Search, list[Scored]]


class Told(SearchStudy):
    """A study that knows trials of another search.

    Args:
        known: Those trials; what lies outside this search's ranges is left out.
        shift: Is added to their values.
    """

    def __init__(self, *args: Any, known: Sequence[Scored], shift: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ranges = kwargs["intervals"]
        for trial in known:
            z_D, score = trial.candidate.coordinates, Score(value=trial.search.value + shift)
            if z_D is None or not all(ranges[n].low <= z <= ranges[n].high for n, z in z_D.items()):
                continue
            attributes = {"name": f"known-{trial.candidate.name}", "score": asdict(score)}
            told = create_trial(params=z_D, distributions=self._distributions, value=score.value, user_attrs=attributes)
            self._study.add_trial(told)


def variants(case: Case) -> dict[str, Ran]:
    """Return the four searches at the end of the run, by what they take over."""
    space = Grouped().bind([name for name, _ in case.model.named_parameters()])

    def search(snapshots: Snapshots, **options: Any) -> Ran:
        def merge(c: Any) -> torch.Tensor:
            return case.mix(snapshots.weights_KP, c, space.group_of)

        # All trials, so that the searches can be compared after as many.
        return run_search(case, space, snapshots.segments_K, merge, stopping=NEVER, n_trials=NUM_TRIALS, **options)

    before, earlier = search(case.buffer_after(round(SHARE_BEFORE * case.num_segments)))
    optimum = before.winner
    at_end = partial(search, case.buffer)
    found = {"nothing": at_end()}
    at_end = partial(at_end, previous=optimum.candidate.coordinates)
    found["its optimum"] = at_end()
    known = [trial for trial in earlier if trial is not optimum]
    changes = {
        "latest weights": found["nothing"][0].latest.search.value - before.latest.search.value,
        "optimum": next(t for t in found["its optimum"][1] if t.candidate.name == "previous").search.value
        - optimum.search.value,
    }
    for whose, shift in changes.items():
        found[f"and its trials, shifted by the {whose}"] = at_end(make_study=partial(Told, known=known, shift=shift))
    return found


def figures(case: Case, found: Mapping[str, Ran]) -> dict[str, list[float]]:
    """Return a row of the table for each search."""
    full = len(case.batches["search"])
    best = min(run.winner.search.value for run, _ in found.values())
    latest, branch = (case.score(weights_P, "confirm").value for weights_P in (case.latest_P, case.branch_P))
    space = Grouped().bind([name for name, _ in case.model.named_parameters()])

    def share(winner: Scored) -> float:
        merged_P = case.mix(case.buffer.weights_KP, winner.candidate.coefficients, space.group_of)
        return 100 * (latest - case.score(merged_P, "confirm").value) / (latest - branch)

    rows = {}
    for name, (run, scored) in found.items():
        few = [t for t in scored[: len(run.anchors) + FEW_TRIALS] if t.search.complete]
        enough = run.latest.search.value + 0.99 * (best - run.latest.search.value)
        rows[name] = [
            batches_until(enough, run, scored) / full,
            share(min(few, key=lambda t: t.search.value)),
            share(run.winner),
            run.num_batches / full,
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of benchmarks/quality/runs; all of them by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows_of: dict[str, list[list[float]]] = {}
    for name in args.runs or sorted(p.parent.name for p in RUNS.glob("*/run.json")):
        case = Case(RUNS / name)
        for taken_over, row in figures(case, variants(case)).items():
            rows_of.setdefault(taken_over, []).append(row)
            print(name, taken_over, *(f"{figure:.1f}" for figure in row), flush=True)
    print(table(HEADER, [[name, *(spread(c, 1) for c in zip(*rows, strict=True))] for name, rows in rows_of.items()]))


if __name__ == "__main__":
    main()
