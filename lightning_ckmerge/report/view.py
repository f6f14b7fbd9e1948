"""The contents of both reports, taken from the manifest once: rows and texts, unescaped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.report.text import (
    MISSING,
    ReportPlace,
    count,
    date,
    gain_text,
    number,
    run_name,
    seconds,
    size,
    steps,
    steps_worth,
)
from lightning_ckmerge.tensorfiles.writer import WEIGHTS_NAME

# Groups side by side; the manifest tells the coefficients of more.
MOST_COLUMNS = 8
SHORT_HASH = 12

LOAD_MERGED = """\
from lightning_ckmerge import load_merged

load_merged("{path}", model)
"""
LOAD_CHECKPOINT = """\

# Or, with the module's own hyperparameters, its class does all of it.
model = YourModule.load_from_checkpoint("{path}/model.ckpt")
"""

ADAPTERS = {
    "factors": "averaged, tensor by tensor; the frozen base is not in the artifact",
    "products": "LoRA's products merged exactly; the frozen base is not in the artifact",
}
STATUS_TITLES = {
    "accepted": "Accepted",
    "rejected": "Rejected",
    "unconfirmed": "Unconfirmed",
}


NEXT = {
    "accepted": "Use the merge: to evaluate, to release, to fine-tune. Training itself continues from its own weights.",
    "unconfirmed": (
        "The merge is kept until the run has a newer one, and `best` stays where it was. The verdict says what would "
        "decide. If the merge looks good to you, load it by the name of its own directory."
    ),
    "rejected": (
        "Continue with the latest weights. Merging gains most at a high learning rate; it gains little early in "
        "a run and after a decay."
    ),
    "skipped": "Continue with the latest weights. The table says why no search took place, and what to change.",
}
OUTRANKED = (
    "The weights of this merge are not kept: `save_top_k` keeps better ones, or none. The run's report names the best."
)
# A candidate's name, and its meaning for people.
MEANINGS = {
    r"latest": "the weights as they were trained, at this step",
    r"previous": "the optimum of the search before, tried on today's snapshots; not a known merge",
    r"initial-\d+": "where optima lay in earlier runs, to begin the search with; not a known merge",
    r"ema-.+": "an exponential moving average; the number is its length in steps",
    r"uniform-.+": "the plain mean over the steps of so many of the newest snapshots",
    r"wsm-.+": "weights that stand for a learning-rate decay over the window",
    r"greedy-soup": "snapshots added one by one while that helps",
    r"metrics-weighted.*": "snapshots weighted by their own values",
    r"trial-\d+": "a proposal of the sampler",
    r"refined-\d+": "a merge found by following gradients",
}


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """A candidate's line in the table; numbers are texts already."""

    name: str
    role: str
    search: str
    search_gain: str
    confirm: str
    gain: str


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A metric's line in the table: a value of each candidate, and the change from the first to the last of them."""

    name: str
    role: str
    values: list[str]
    change: str


@dataclass(frozen=True, kw_only=True)
class FrontRow:
    """A line of the Pareto front: a value by each monitored metric, and where in the artifact the merge lies, if so."""

    name: str
    role: str
    values: list[str]
    place: str


@dataclass(frozen=True, kw_only=True)
class SnapshotRow:
    """A snapshot's line in the table; one coefficient, or one a group."""

    kind: str
    steps: str
    coefficients: list[str]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that a report shows but its charts.

    Args:
        status: ``accepted``, ``rejected`` or ``unconfirmed``.
        facts: Label and text of the run's main figures.
        candidates: The winner first, then the anchors from best to worst on the search half.
        metrics: All logged metrics, on every loader: chosen by one, shown on all. The monitored one first; no rows
            where there is no other.
        compared: Names of the candidates that ``metrics`` compares, from the latest weights to the winner.
        coefficient_names: Heads of the snapshots' coefficients: the groups, where they differ.
        metrics_half: The half of the batches that they were compared on.
        monitors: The monitored metrics.
        front: The Pareto front by them on the search half; no rows for one metric.
        cost: Label and text.
        files: Name, size and short hash.
        code: How to load it; ``None`` for a record without weights.
        run: The run's name, empty where that is not known.
        date: Of the search, empty where that is not known.
        up: Link to the page above; ``None``: none is known.
        advice: The next step.
        meanings: Candidates' names and their meanings.
    """

    title: str
    run: str
    date: str
    up: str | None
    advice: str
    meanings: list[tuple[str, str]]
    status: str
    badge: str
    sentence: str
    warnings: list[str]
    facts: list[tuple[str, str]]
    candidates: list[CandidateRow]
    metrics: list[MetricRow]
    compared: list[str]
    metrics_half: str
    monitors: list[str]
    front: list[FrontRow]
    coefficient_names: list[str]
    snapshots: list[SnapshotRow]
    cost: list[tuple[str, str]]
    files: list[tuple[str, str, str]]
    software: list[tuple[str, str]]
    code: str | None


def build_view(manifest: Manifest, place: ReportPlace | None = None) -> View:
    """Return the contents of a search's report; its artifact is at ``place``, if that is known."""
    verdict = manifest["verdict"]
    candidates = _candidates(manifest)
    columns = _coefficient_columns(manifest)
    has_weights = any(WEIGHTS_NAME.fullmatch(name) for name in manifest.get("files", {}))
    return View(
        title=_title(manifest),
        run=run_name(place.path.parent) if place is not None else "",
        date=date(manifest.get("created")),
        up=place.up if place is not None else None,
        advice=NEXT[verdict["status"]] if has_weights or verdict["status"] == "rejected" else OUTRANKED,
        meanings=_meanings(candidates),
        status=verdict["status"],
        badge=STATUS_TITLES[verdict["status"]],
        sentence=verdict["sentence"],
        warnings=list(verdict["warnings"]),
        facts=_facts(manifest),
        candidates=candidates,
        **_metrics(manifest),
        **_front(manifest),
        coefficient_names=list(columns),
        snapshots=[
            SnapshotRow(
                kind=snapshot["kind"],
                steps=steps(snapshot),
                coefficients=[number(c, "+.4f") for c in c_G],
                sha256=_hashes(snapshot),
            )
            for snapshot, *c_G in zip(manifest["snapshots"], *columns.values(), strict=True)
        ],
        cost=_cost(manifest["cost"]),
        files=[
            (name, size(record["bytes"]), record["sha256"][:SHORT_HASH])
            for name, record in manifest.get("files", {}).items()
        ],
        software=[(name, version or MISSING) for name, version in manifest["software"].items()],
        code=_code(manifest, place) if has_weights else None,
    )


def _coefficient_columns(manifest: Manifest) -> dict[str, list[float]]:
    """Return the snapshots' coefficients by head: each group's, or what many groups have in common."""
    groups = {name: group["coefficients"] for name, group in manifest.get("groups", {}).items()}
    if len(groups) <= MOST_COLUMNS:
        return groups or {"coefficient": manifest["coefficients"]}
    by_snapshot = list(zip(*groups.values(), strict=True))
    return {
        f"mean of {len(groups)} groups": manifest["coefficients"],
        "lowest": [min(c_G) for c_G in by_snapshot],
        "highest": [max(c_G) for c_G in by_snapshot],
    }


def _title(manifest: Manifest) -> str:
    """Name the value before and after."""
    title, monitor = f"Merge at step {count(manifest['step'])}", manifest["monitor"]
    before = _confirmed(manifest["anchors"][0])
    after = manifest["verdict"]["value"]
    if before is None or after is None or manifest["verdict"]["winner"] == "latest":
        return title
    return f"{title}: {monitor} {number(before)} → {number(after)}"


def _meanings(candidates: list[CandidateRow]) -> list[tuple[str, str]]:
    """Explain the names that stand in the table, and the sign for estimates."""
    found = [("≈", "an estimate: the candidate was dropped before its last batch")] * any(
        c.search.startswith("≈") for c in candidates
    )
    for pattern, meaning in MEANINGS.items():
        names = [c.name for c in candidates if re.fullmatch(pattern, c.name)]
        found += [(", ".join(names), meaning)] * bool(names)
    return found


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    verdict, evaluation = manifest["verdict"], manifest["evaluation"]
    coordinates, others = manifest["coordinates"] or {}, verdict.get("others", [])
    at = ", ".join(f"{name} {number(value, '.4g')}" for name, value in coordinates.items())
    refined = verdict["winner"] in {t["name"] for t in manifest["trials"]}
    outside = ", left by gradients" if refined else ", won by an anchor"
    batches = f"{sum(evaluation['search_batches'])} + {sum(evaluation['confirm_batches'])}"
    anchor = verdict["best_anchor"]
    over_anchor = gain_text(verdict["gain_over_best_anchor"], verdict["interval_over_best_anchor"])
    return [
        ("Gain over latest", gain_text(verdict["gain"], verdict["interval"])),
        *((f"Gain over latest, {o['monitor']}", gain_text(o["gain"], o["interval"])) for o in others),
        # Over the latest weights, it is the same gain; over itself, none.
        *([(f"Gain over {anchor}", over_anchor)] if anchor not in ("latest", verdict["winner"]) else []),
        *steps_worth(verdict),
        (f"{manifest['monitor']} ({manifest['mode']})", number(verdict["value"])),
        *((f"{o['monitor']} ({o['mode']})", number(o["value"])) for o in others),
        ("Space", f"{manifest['space']}{f' ({at})' if at else outside}"),
        ("Batches, search + confirmation", batches),
        *([("Adapters", ADAPTERS[manifest["adapters"]["merge"]])] if "adapters" in manifest else []),
    ]


def _monitors(manifest: Manifest) -> list[str]:
    return [manifest["monitor"], *(o["monitor"] for o in manifest["verdict"].get("others", []))]


def _front(manifest: Manifest) -> dict[str, Any]:
    """The Pareto front by all monitored metrics, on the half that it was found on."""
    verdict, monitors = manifest["verdict"], _monitors(manifest)
    by_name = {c["name"]: c for c in [*manifest["anchors"], *manifest["trials"]]}
    published = {name.split("/")[1] for name in manifest.get("files", {}) if name.startswith("front/")}

    def row(name: str) -> FrontRow:
        return FrontRow(
            name=name,
            role="winner" if name == verdict["winner"] else "",
            values=[number(by_name[name]["search"]["metrics"].get(m)) for m in monitors],
            place=f"front/{name}" if name in published else "",
        )

    return {"monitors": monitors, "front": [row(name) for name in verdict.get("front", [])]}


def _hashes(snapshot: dict[str, Any]) -> str:
    hashes: list[str] = snapshot.get("files_sha256", [snapshot["sha256"] or MISSING])
    others = f" +{len(hashes) - 1}" if len(hashes) > 1 else ""
    return hashes[0][:SHORT_HASH] + others


def _candidates(manifest: Manifest) -> list[CandidateRow]:
    verdict, sign = manifest["verdict"], sign_of(manifest["mode"])
    by_name = {c["name"]: c for c in [*manifest["anchors"], *manifest["trials"]]}
    latest = by_name.get("latest", {})

    def order(candidate: dict[str, Any]) -> tuple[bool, bool, float]:
        value = candidate["search"]["value"]
        return candidate["name"] != verdict["winner"], value is None, sign * (value or 0.0)

    def search_gain(candidate: dict[str, Any]) -> str:
        gain = candidate.get("search_gain")
        return MISSING if gain is None else gain_text(gain, candidate["search_interval"])

    def row(candidate: dict[str, Any]) -> CandidateRow:
        name, value = candidate["name"], _confirmed(candidate)
        roles = ["winner"] if name == verdict["winner"] else []
        roles += ["best anchor"] if name == verdict["best_anchor"] else []
        roles += [] if candidate["feasible"] else ["breaks a constraint"]
        gain, reference = MISSING, _confirmed(latest)
        if name == verdict["winner"]:
            gain = gain_text(verdict["gain"], verdict["interval"])
        elif name != "latest" and value is not None and reference is not None:
            gain = gain_text(sign * (reference - value), None)
        estimate = "" if candidate["search"]["complete"] else "≈ "
        return CandidateRow(
            name=name,
            role=", ".join(roles),
            search=estimate + number(candidate["search"]["value"]),
            search_gain=search_gain(candidate),
            confirm=number(value),
            gain=gain,
        )

    shown = {verdict["winner"], *(a["name"] for a in manifest["anchors"])}
    return [row(c) for c in sorted((c for n, c in by_name.items() if n in shown), key=order)]


def _metrics(manifest: Manifest) -> dict[str, Any]:
    by_name = {c["name"]: c for c in [*manifest["anchors"], *manifest["trials"]]}
    verdict, monitors = manifest["verdict"], _monitors(manifest)
    compared = [n for n in dict.fromkeys(("latest", verdict["best_anchor"], verdict["winner"])) if n in by_name]
    half = "confirm" if all(by_name[n]["confirm"] for n in compared) else "search"
    logged = [by_name[n][half]["metrics"] for n in compared]
    names = [*monitors, *sorted({name for metrics in logged for name in metrics} - set(monitors))]

    def row(name: str) -> MetricRow:
        values = [metrics.get(name) for metrics in logged]
        first, last = values[0], values[-1]
        return MetricRow(
            name=name,
            role="monitored" if name in monitors else "",
            values=[number(value) for value in values],
            change=MISSING if first is None or last is None else gain_text(last - first, None),
        )

    return {
        "metrics": [row(name) for name in names] if names != [manifest["monitor"]] else [],
        "compared": compared,
        "metrics_half": {"confirm": "confirmation", "search": "search"}[half],
    }


def _code(manifest: Manifest, place: ReportPlace | None) -> str:
    path = f"step={manifest['step']:09d}" if place is None else place.path.as_posix()
    more = LOAD_CHECKPOINT.format(path=path) if "model.ckpt" in manifest["files"] else ""
    return LOAD_MERGED.format(path=path) + more


def _confirmed(candidate: dict[str, Any]) -> float | None:
    score = candidate.get("confirm")
    value: float | None = score["value"] if score else None
    return value


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("Total", seconds(sum(cost["seconds"].values())))]
    rows += [(phase.capitalize(), seconds(value)) for phase, value in cost["seconds"].items()]
    if cost["share_of_training"] is not None:
        rows.append(("Share of training, all searches", f"{100 * cost['share_of_training']:.1f} %"))
    rows.append(("Batches evaluated", count(cost["num_batches"])))
    rows.append(("Batches saved by dropping losers", count(cost["num_batches_saved"])))
    if cost["stopped_early"]:
        rows.append(("Stopped early", cost["stopped_early"]))
    return rows
