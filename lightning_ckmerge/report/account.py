"""The account of a merge as a page and as Markdown: each figure with the sentence that says what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report import account_charts
from lightning_ckmerge.report.html import render_page
from lightning_ckmerge.report.markdown import escape, table
from lightning_ckmerge.report.text import (
    MISSING,
    ReportPlace,
    count,
    date,
    gain_text,
    number,
    run_name,
    steps,
)
from lightning_ckmerge.report.view import STATUS_TITLES

Account = dict[str, Any]
TITLES = {
    "snapshots": "What each snapshot contributes",
    "groups": "What each group of tensors contributes",
    "layers": "What each layer contributes",
    "line": "Along the line from latest to merge",
    "plane": "On the plane through latest, merge and mean",
    "curvature": "Curvature before and after",
    "agreement": "Agreement of predictions",
    "importances": "Which coordinates mattered",
    "stability": "From search to search",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One figure: its title and sentence, and the rows of its table, unescaped."""

    key: str
    title: str
    sentence: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AccountView:
    """Everything that the page of an account shows but its charts; texts, unescaped."""

    title: str
    status: str
    badge: str
    sentence: str
    facts: list[tuple[str, str]]
    parts: list[Part]
    left_out: list[tuple[str, str]]
    warnings: list[str]
    run: str
    date: str
    up: str


def render_account_html(account: Account, manifest: Manifest, place: ReportPlace) -> str:
    """Return an account as a page: escaped, self-contained, for light, dark, paper and small screens.

    Args:
        account: What ``explain.json`` holds.
        manifest: Of its artifact.
        place: Where the artifact lies; ``up`` leads to its report.
    """
    found = account["figures"]
    return render_page(
        "explain.html.j2",
        view=build_account_view(account, manifest, place),
        up_text="The search's report",
        no_code="",
        monitor=account["monitor"],
        forests=account_charts.forests(found),
        line=account_charts.line_chart(found["line"], account) if "line" in found else None,
        plane=account_charts.plane_chart(found["plane"], account) if "plane" in found else None,
    )


def render_account_markdown(account: Account) -> str:
    """Return an account as sections of a report in GitHub's Markdown."""
    sections = ["## Why it works or not", escape(_basis(account)), *(f"> Note: {escape(n)}" for n in account["notes"])]
    for part in _parts(account):
        sections += [f"### {part.title}", escape(part.sentence)]
        sections += [table(part.header, part.rows)] if part.rows else []
    if left_out := _left_out(account):
        sections += ["### Left out", "\n".join(f"- {escape(title)}: {escape(why)}" for title, why in left_out)]
    return "\n\n".join(sections) + "\n"


def build_account_view(account: Account, manifest: Manifest, place: ReportPlace) -> AccountView:
    """Return what the page of an account says; the arguments are those of ``render_account_html``."""
    status = manifest["verdict"]["status"]
    values = account["values"]
    return AccountView(
        title=f"Why the merge of step {count(account['step'])} works or not",
        status=status,
        badge=STATUS_TITLES.get(status, status.capitalize()),
        sentence=_basis(account),
        facts=[
            (f"Latest weights, {account['monitor']} ({account['mode']})", number(values["latest"])),
            ("Merge", number(values["merge"])),
            ("Gain, 95 % interval", gain_text(account["gain"], account["interval"])),
            *(
                [("Distance from latest to merge", number(account["figures"]["line"]["distance"], ".4g"))]
                if "line" in account["figures"]
                else []
            ),
            ("Evaluations", count(len(account["points"]))),
        ],
        parts=_parts(account),
        left_out=_left_out(account),
        warnings=list(account["notes"]) + ([] if account["complete"] else ["The account is not complete."]),
        run=run_name(place.path.parent),
        date=date(account.get("created")),
        up=place.up,
    )


def _basis(account: Account) -> str:
    half = {"search": "search half, on which the merge was chosen", "confirm": "confirmation half"}[account["half"]]
    unseen = ", which the search did not see" if account["half"] == "confirm" else ""
    samples = f", {count(account['num_samples'])} samples," if account.get("num_samples") else ""
    return (
        f"All values of {account['monitor']} are on {account['num_batches']} batches{samples} of the {half}{unseen}; "
        "what is told of the curvature, the coordinates and the searches says itself on what it rests."
    )


def _parts(account: Account) -> list[Part]:
    found = account["figures"]
    return [
        Part(key=key, title=title, sentence=found[key]["sentence"], **_table(key, found[key]))
        for key, title in TITLES.items()
        if key in found
    ]


def _left_out(account: Account) -> list[tuple[str, str]]:
    return [(TITLES[key], account["left_out"][key]) for key in TITLES if key in account["left_out"]]


def _table(key: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    made = TABLES[key](figure)
    return {} if made is None else {"header": made[0], "rows": made[1]}


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _snapshots(figure: Mapping[str, Any]) -> Table:
    def name(row: Mapping[str, Any]) -> str:
        return f"{steps(dict(row))}, latest" if row["is_latest"] else f"{steps(dict(row))}, {row['kind']}"

    def loss(row: Mapping[str, Any]) -> str:
        if row["value"] is not None:
            return gain_text(row["gain"], row["interval"])
        if not any(row["coefficients"]):
            return "none: coefficient 0"
        return "no longer kept" if not row["kept"] else MISSING

    header = ("Snapshot, steps", "Coefficient", "Value without it", "The merge's gain by it")
    rows: list[tuple[str, ...]] = [
        (name(r), _range(r["coefficients"]), number(r["value"]), loss(r)) for r in figure["rows"]
    ]
    return header, rows


def _range(ends: Sequence[float]) -> str:
    low, high = ends
    return number(low, ".4f") if low == high else f"{number(low, '.4f')} to {number(high, '.4f')}"


def _tensors(figure: Mapping[str, Any]) -> Table:
    header = ("Part", "Tensors", "Of the squared way", "Gain half way", "Gain from the merge alone", "Loss if put back")
    return header, [
        (
            r["name"],
            count(r["num_tensors"]),
            f"{100 * r['way']:.0f} %",
            gain_text(r["half_way"], None),
            gain_text(r["alone"], r["alone_interval"]),
            gain_text(r["without"], r["without_interval"]),
        )
        for r in figure["rows"]
    ]


def _line(figure: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = [
        (f"{t:g}", number(v)) for t, v in zip(figure["places"], figure["values"], strict=True)
    ]
    return ("Place", "Value"), rows


def _plane(figure: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = [
        (name, number(c["x"], ".3g"), number(c["y"], ".3g"), number(c["value"]))
        for name, c in figure["corners"].items()
    ]
    return ("Corner", "Along", "Across", "Value"), rows


def _curvature(figure: Mapping[str, Any]) -> Table:
    def row(name: str, c: Mapping[str, Any]) -> tuple[str, ...]:
        error = number(c["trace_error"], ".2g") if c["trace_error"] else "exact"
        return name, number(c["top"], ".4g"), number(c["trace"], ".4g"), error, count(c["num_products"])

    header = ("Weights", "Largest eigenvalue", "Trace", "Standard error", "Hessian products")
    return header, [row("latest", figure["latest"]), row("merge", figure["merge"])]


def _agreement(figure: Mapping[str, Any]) -> Table | None:
    if figure["won"] is None:
        return None
    wrong = figure["num"] - figure["both"] - figure["won"] - figure["lost"]
    counts = {"Both right": "both", "Won by the merge": "won", "Lost by the merge": "lost"}
    rows = [(label, count(figure[key])) for label, key in counts.items()]
    return ("Predictions", "Number"), [*rows, ("Both wrong", count(wrong))]


def _importances(figure: Mapping[str, Any]) -> Table:
    return ("Coordinate", "Importance"), [(n, f"{100 * s:.0f} %") for n, s in figure["shares"].items()]


def _stability(figure: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(n for r in figure["rows"] for n in (r["coordinates"] or {})))
    header = ("Step", "Winner", "Mean age, steps", "Of the run", "Latest's coefficient", "Moved by", *names)
    rows = [
        (
            count(r["step"]),
            r["winner"],
            number(r["mean_age"], ".1f"),
            f"{100 * r['age_share']:.1f} %",
            number(r["latest"], ".3f"),
            MISSING if r["shift"] is None else f"{100 * r['shift']:.1f} %",
            *(number((r["coordinates"] or {}).get(n), ".4g") for n in names),
        )
        for r in figure["rows"]
    ]
    return header, rows


TABLES: dict[str, Callable[[Mapping[str, Any]], Table | None]] = {
    "snapshots": _snapshots,
    "groups": _tensors,
    "layers": _tensors,
    "line": _line,
    "plane": _plane,
    "curvature": _curvature,
    "agreement": _agreement,
    "importances": _importances,
    "stability": _stability,
}
