"""What both reports show, taken from the manifest once: rows and texts, unescaped."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]

MISSING = "–"
SHORT_HASH = 12
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

LOAD_MERGED = """\
from lightning_ckmerge import load_merged

# The directory that holds this report.
load_merged("{path}", model)
"""

STATUS_TITLES = {
    "accepted": "Accepted",
    "rejected": "Rejected",
    "unconfirmed": "Unconfirmed",
}


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """A candidate's line in the table; numbers are texts already."""

    name: str
    role: str
    search: str
    confirm: str
    gain: str


@dataclass(frozen=True, kw_only=True)
class SnapshotRow:
    """A snapshot's line in the table."""

    kind: str
    steps: str
    coefficient: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that a report shows but its charts.

    Args:
        status: ``accepted``, ``rejected`` or ``unconfirmed``.
        facts: Label and text of the run's main figures.
        candidates: The winner first, then the anchors from best to worst on the search half.
        cost: Label and text.
        files: Name, size and short hash.
        code: How to load it; ``None`` for a record without weights.
    """

    title: str
    status: str
    badge: str
    sentence: str
    warnings: list[str]
    facts: list[tuple[str, str]]
    candidates: list[CandidateRow]
    snapshots: list[SnapshotRow]
    cost: list[tuple[str, str]]
    files: list[tuple[str, str, str]]
    software: list[tuple[str, str]]
    code: str | None


def build_view(manifest: Manifest) -> View:
    """Return what a report says about a search."""
    verdict = manifest["verdict"]
    has_weights = any(WEIGHTS_NAME.fullmatch(name) for name in manifest.get("files", {}))
    return View(
        title=f"Merge at step {count(manifest['step'])}",
        status=verdict["status"],
        badge=STATUS_TITLES[verdict["status"]],
        sentence=verdict["sentence"],
        warnings=list(verdict["warnings"]),
        facts=_facts(manifest),
        candidates=_candidates(manifest),
        snapshots=[
            SnapshotRow(
                kind=snapshot["kind"],
                steps=steps(snapshot),
                coefficient=number(c, "+.4f"),
                sha256=(snapshot["sha256"] or MISSING)[:SHORT_HASH],
            )
            for snapshot, c in zip(manifest["snapshots"], manifest["coefficients"], strict=True)
        ],
        cost=_cost(manifest["cost"]),
        files=[
            (name, size(record["bytes"]), record["sha256"][:SHORT_HASH])
            for name, record in manifest.get("files", {}).items()
        ],
        software=[(name, version or MISSING) for name, version in manifest["software"].items()],
        code=LOAD_MERGED.format(path=f"step={manifest['step']:09d}") if has_weights else None,
    )


def number(value: float | None, form: str = "#.5g") -> str:
    """Return a value for people, to 5 significant digits or as ``form`` says; a dash for what is missing.

    >>> number(2.3), number(-0.00012, ".5g"), number(None)
    ('2.3000', '−0.00012', '–')
    """
    return MISSING if value is None else f"{value:{form}}".replace("-", "−")


def gain_text(gain: float | None, interval: list[float] | None) -> str:
    """Return a gain with its 95 % interval, all to one decimal place; the interval does not break over lines.

    >>> gain_text(0.0123456, [0.004, 0.02]).replace("\\xa0", "_")
    '+0.0123 [+0.0040,_+0.0200]'
    """
    largest = max(map(abs, (gain or 0.0, *(interval or ()))))
    form = f"+.{max(0, 2 - math.floor(math.log10(largest)))}f" if largest else "+.0f"
    ends = f" [{number(interval[0], form)},\xa0{number(interval[1], form)}]" if interval else ""
    return number(gain, form) + ends


def count(value: float) -> str:
    """Return a whole number with thousands apart."""
    return f"{value:,.0f}".replace(",", " ")


def size(num_bytes: int) -> str:
    """Return a file's size.

    >>> size(999), size(5_000_000_000)
    ('999 B', '5.0 GB')
    """
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def seconds(value: float) -> str:
    """Return a duration.

    >>> seconds(4.26), seconds(3725)
    ('4.3 s', '62 min 5 s')
    """
    return f"{value:.1f} s" if value < 120 else f"{value // 60:.0f} min {value % 60:.0f} s"


def steps(snapshot: dict[str, Any]) -> str:
    """Return the steps that a snapshot stands for."""
    first, last = snapshot["first_step"], snapshot["last_step"]
    return count(last) if first == last else f"{count(first)}–{count(last)}"


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    verdict, evaluation = manifest["verdict"], manifest["evaluation"]
    coordinates = manifest["coordinates"] or {}
    at = ", ".join(f"{name} {number(value, '.4g')}" for name, value in coordinates.items())
    batches = f"{sum(evaluation['search_batches'])} + {sum(evaluation['confirm_batches'])}"
    return [
        ("Gain over latest", gain_text(verdict["gain"], verdict["interval"])),
        (
            f"Gain over {verdict['best_anchor']}",
            gain_text(verdict["gain_over_best_anchor"], verdict["interval_over_best_anchor"]),
        ),
        (f"{manifest['monitor']} ({manifest['mode']})", number(verdict["value"])),
        ("Space", f"{manifest['space']} ({at})" if at else f"{manifest['space']}, won by an anchor"),
        ("Batches, search + confirmation", batches),
    ]


def _candidates(manifest: Manifest) -> list[CandidateRow]:
    verdict, sign = manifest["verdict"], 1 if manifest["mode"] == "min" else -1
    by_name = {c["name"]: c for c in [*manifest["anchors"], *manifest["trials"]]}
    latest = by_name.get("latest", {})

    def order(candidate: dict[str, Any]) -> tuple[bool, bool, float]:
        value = candidate["search"]["value"]
        return candidate["name"] != verdict["winner"], value is None, sign * (value or 0.0)

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
            confirm=number(value),
            gain=gain,
        )

    shown = {verdict["winner"], *(a["name"] for a in manifest["anchors"])}
    return [row(c) for c in sorted((c for n, c in by_name.items() if n in shown), key=order)]


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
