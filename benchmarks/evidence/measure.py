"""Score the merges of a trained run, and keep what they reached.

A run's scores lie beside its trail, by part, and are gathered into the part's committed results after each run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lightning_ckmerge
from benchmarks.evidence import RESULTS
from benchmarks.evidence.protocol import Run, runs
from benchmarks.evidence.referees import REFEREES
from benchmarks.evidence.train import Trained
from benchmarks.quality.case import Case, Found, Snapshots, search
from benchmarks.quality.measure import record
from benchmarks.quality.methods import DEFAULT, METHODS
from lightning_ckmerge.config import TAIL_TRIALS
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Grouped, Tail
from lightning_ckmerge.search.interval import score_gain

MINIMA = "the default over the points at the minima"
ORDINARY = "the ordinary search"
REFINED = "grouped, refined by gradients"
# The five rows of the short table first.
LADDER_METHODS = (
    DEFAULT,
    "uniform soup",
    "pair (GP-Hedge)",
    "EMA",
    REFINED,
    "decay",
    "EMA length searched",
)
METHODS_OF_PART = {
    "ladder": LADDER_METHODS,
    "regimes": (DEFAULT, "uniform soup", "EMA", REFINED, "decay", "EMA length searched"),
    "architectures": (DEFAULT, "uniform soup", "EMA", REFINED, "decay", "EMA length searched"),
    "referees": (DEFAULT, REFINED),
}
# What a default's result depends on.
SOURCES = ("config.py", "buffer/retention.py", "core/spaces", "search")
Find = Callable[[Case], Found]


def measure(part: str, run: Run, *, again: bool = False, only: Collection[str] = ()) -> None:
    """Score the part's methods on a run that has been trained, and gather the part's results.

    Args:
        part: ``ladder``, ``regimes``, ``architectures`` or ``referees``.
        run: The run.
        again: Whether to score also what has been scored.
        only: Methods to score; empty: all.
    """
    path = run.directory / f"{part}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    methods = {name: find for name, find in finders(part, run).items() if not only or name in only}
    todo = [name for name in methods if again or name not in kept.get("methods", {})]
    if todo:
        case = Trained(run)
        kept = kept or references(case)
        latest = case.score(case.latest_P, "confirm")
        for name in todo:
            found = methods[name](case)
            gain, interval = score_gain(case.score(found.weights_P, "confirm"), latest, 1)
            kept["methods"][name] = {
                **record(case, found),
                "gain": gain,
                "interval": interval,
                "fingerprint": fingerprint(),
            }
            write_json(path, kept)
            print(part, run.cell, run.seed, name, f"{share_told(kept, name)}", flush=True)
    gather(part)


def finders(part: str, run: Run) -> dict[str, Find]:
    """Return what finds each method's merge."""
    found: dict[str, Find] = {name: METHODS[name].find for name in METHODS_OF_PART[part]}
    if run.regime == "cosine to 0" or run.cell == "wsd":
        # Where the rate has decayed, the default is a short search near the latest weights.
        found = found | {DEFAULT: tail_search, ORDINARY: found[DEFAULT]}
        del found[REFINED]
    if run.regime == "cyclic":
        found[MINIMA] = lambda case: search(case, Grouped(), snapshots=minima(case))
    if part == "referees":
        found |= {name: referee.find for name, referee in REFEREES.items()}
    return found


def tail_search(case: Case) -> Found:
    """Return what the package finds where the learning rate has decayed."""
    return search(case, Tail(), anchors=(), n_trials=TAIL_TRIALS)


def references(case: Trained) -> dict[str, Any]:
    """Return what the methods of a run are compared with."""
    names = [name for name, _ in case.model.named_parameters()]
    about = {name: value for name, value in case.about.items() if name != "train_losses"}
    found = {
        "run": {"cell": case.run.cell, **about},
        "groups": sorted(set(Grouped().bind(names).group_of.values())),
        "latest": case.losses(case.latest_P),
        "methods": {},
    }
    if case.has_twin:
        found["twin"] = case.losses(case.branch_P)
        scores = (case.score(weights_P, "confirm") for weights_P in (case.branch_P, case.latest_P))
        found["twin_gain"], found["twin_interval"] = score_gain(*scores, 1)
    return found


def minima(case: Case) -> Snapshots:
    """Return the last ten points at which a cyclic rate was lowest, one each twentieth of the run."""
    cycle = case.num_segments // 20
    points_MP, steps = case.points_MP[cycle - 1 :: cycle][-10:], case.about["num_steps"] // 20
    last = case.about["num_steps"]
    segments = [
        Segment(kind="point", first_step=end, last_step=end) for end in range(last - 9 * steps, last + 1, steps)
    ]
    return Snapshots(segments_K=tuple(segments), weights_KP=points_MP)


def gather(part: str) -> None:
    """Write the part's results: those kept beside the trails, and earlier ones of runs that are not there."""
    path = RESULTS / f"{part}.json"
    kept = {key(r): r for r in (json.loads(path.read_text()) if path.exists() else [])}
    for run in runs(part):
        beside = run.directory / f"{part}.json"
        if beside.exists():
            scores = json.loads(beside.read_text())
            kept[key(scores)] = scores
    order = [(run.cell, run.seed) for run in runs(part)]
    write_json(path, [kept[k] for k in order if k in kept])


def key(scores: Mapping[str, Any]) -> tuple[str, int]:
    """Return a run's cell and seed."""
    return scores["run"]["cell"], scores["run"]["seed"]


def share_told(scores: Mapping[str, Any], name: str) -> str:
    """Return a method's share of the twin's gain, or its gain where there is no twin."""
    gain = scores["methods"][name]["gain"]
    return f"{100 * gain / scores['twin_gain']:.1f} %" if "twin_gain" in scores else f"{gain:.4f}"


@cache
def fingerprint() -> str:
    """Return a digest of the package's search code."""
    root = Path(lightning_ckmerge.__file__).parent
    digest = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((root / source).rglob("*.py")) if (root / source).is_dir() else [root / source]:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def write_json(path: Path, value: Any) -> None:
    """Write a file that another process may read at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
