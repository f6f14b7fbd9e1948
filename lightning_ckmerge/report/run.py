"""The report of a whole run: did merging help, by how much, at what cost, and how to load the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ckmerge.artifact.history import History
from lightning_ckmerge.artifact.load import ARTIFACT_NAME
from lightning_ckmerge.artifact.timeline import SKIPPED
from lightning_ckmerge.core.wording import change_told
from lightning_ckmerge.report import charts, run_charts
from lightning_ckmerge.report.html import render_page
from lightning_ckmerge.report.markdown import escape, table
from lightning_ckmerge.report.run_charts import Record
from lightning_ckmerge.report.text import (
    MISSING,
    count,
    date,
    gain_text,
    number,
    run_name,
    seconds,
    steps_worth,
)
from lightning_ckmerge.report.view import LOAD_MERGED, NEXT, STATUS_TITLES
from lightning_ckmerge.tensorfiles.durable import replace_text

# Best first.
BADGES = {
    "accepted": "Merging helped",
    "unconfirmed": "Unconfirmed",
    "rejected": "Merging did not help",
    SKIPPED: "No search took place",
}
STALE_BADGE = "Merging helped earlier; newer weights are better now"


@dataclass(frozen=True, kw_only=True)
class SearchRow:
    """One search's line; ``link`` is ``None`` where its artifact is gone, or never was, ``account`` where it has none.

    ``gain`` is the reason of a search that was skipped.
    """

    step: str
    status: str
    verdict: str
    merged: str
    latest: str
    gain: str
    seconds: str
    artifact: str
    link: str | None
    account: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Everything that the report of a run shows but its charts; texts, unescaped."""

    title: str
    status: str
    badge: str
    sentence: str
    facts: list[tuple[str, str]]
    searches: list[SearchRow]
    code: str | None
    advice: str
    run: str
    date: str
    up: None = None


def write_run_report(dirpath: Path, history: History) -> str:
    """Write both forms of the report of a run into ``dirpath``, and return the Markdown."""
    markdown = render_run_markdown(history)
    replace_text(dirpath / "report.md", markdown)
    replace_text(dirpath / "report.html", render_run_html(history))
    return markdown


def render_run_html(history: History) -> str:
    """Return the report of a run as a page, to lie in the run's directory: it links to the searches' own reports."""
    best = history.best
    return render_page(
        "run.html.j2",
        view=build_run_view(history),
        no_code="",
        monitor=history.timeline[-1]["monitor"],
        gains=run_charts.gain_chart(history.timeline),
        validation=run_charts.validation_chart(history.timeline),
        coefficients=charts.coefficient_chart(history.manifests[best]) if best is not None else None,
        best=best,
    )


def render_run_markdown(history: History) -> str:
    """Return the report of a run in GitHub's Markdown."""
    view = build_run_view(history)
    header = ("step", "verdict", "gain over latest, 95 % interval", "merged", "latest", "seconds", "artifact")
    rows = [(s.step, s.verdict, s.gain, s.merged, s.latest, s.seconds, s.artifact) for s in view.searches]
    sections = [
        f"# {escape(view.title)}",
        f"**{view.badge}.** {escape(view.sentence)}",
        *([escape(" · ".join(filter(None, (view.run, view.date))))] if view.run or view.date else []),
        table(("", ""), view.facts),
        "## What to do next",
        view.advice,
        *([f"```python\n{view.code}```"] if view.code else []),
        "## Searches",
        table(header, rows),
    ]
    return "\n\n".join(sections) + "\n"


def summarize(history: History) -> str:
    """Return a run's findings in three lines, for a terminal."""
    dirpath, best, standing = history.dirpath, history.best, history.standing
    is_of_use = not (standing is not None and standing.is_stale)
    # By its own name: `best` moves on when another run begins in the same directory.
    load = f'load_merged("{dirpath / best}", model)' if best is not None and is_of_use else "the final weights"
    return "\n".join(
        [
            f"lightning-ckmerge: {_tally(history.timeline)}",
            f"  {standing.advice if standing is not None else _finding(_leader(history))}",
            f"  Use: {load}. Report: {dirpath / 'report.html'}",
        ]
    )


def build_run_view(history: History) -> RunView:
    """Return the contents of a run's report."""
    timeline, manifests, best, standing = history.timeline, history.manifests, history.best, history.standing
    leader = _leader(history)
    is_stale = standing is not None and standing.is_stale
    return RunView(
        title=_title(timeline, leader),
        run=run_name(history.dirpath),
        date=date(max((m["created"] for m in manifests.values() if "created" in m), default=None)),
        advice=standing.advice if standing is not None and is_stale else NEXT[leader["status"]],
        status=leader["status"],
        badge=STALE_BADGE if is_stale else BADGES[leader["status"]],
        sentence=f"{standing.advice if standing is not None else _finding(leader)} {_tally(timeline)}",
        facts=_facts(timeline, leader),
        searches=[_row(record, history) for record in timeline],
        code=LOAD_MERGED.format(path=(history.dirpath / best).as_posix())
        if best is not None and not is_stale
        else None,
    )


def _title(timeline: Sequence[Record], leader: Record) -> str:
    """Name the value before and after."""
    title = f"Merges of a run of {count(max(r['step'] for r in timeline))} steps"
    before, after = leader["values"].get("latest"), leader["values"].get(leader["winner"])
    if before is None or after is None or leader["winner"] == "latest":
        return title
    return f"{title}: {leader['monitor']} {number(before)} → {number(after)} at step {count(leader['step'])}"


def _leader(history: History) -> Record:
    """The search that represents the run: that of the best artifact, else the last of the best status."""
    named = [r for r in history.timeline if history.best is not None and r["artifact"] == history.best]
    if named:
        return named[-1]
    return max(history.timeline, key=lambda r: (-tuple(BADGES).index(r["status"]), r["step"]))


def _finding(leader: Record) -> str:
    step = count(leader["step"])
    if leader["status"] == SKIPPED:
        return f"The last search was due at step {step}: {leader['reason']}"
    change = _change(leader)
    if leader["status"] == "accepted":
        return f"The best merge, of step {step}, {change}."
    if leader["status"] == "unconfirmed":
        return f"No gain is certain yet: the merge of step {step} {change}."
    if leader["winner"] == "latest":
        return f"No merge beats the latest weights; at step {step} they won the search half."
    return f"No merge beats the latest weights; that of step {step} {change}."


def _change(record: Record) -> str:
    """The change that the merge makes, in the words of the verdict's sentence."""
    before, after = (record["values"].get(name) for name in ("latest", record["winner"]))
    if before is None or after is None:
        return "could not be measured on unseen batches"
    change, interval = change_told(record["monitor"], record["mode"], before, after, record["interval"])
    return change + (f"; 95 % interval {interval}" if interval else "") + ", on unseen batches"


def _tally(timeline: Sequence[Record]) -> str:
    counts = Counter(r["status"] for r in timeline)
    parts = ", ".join(f"{counts[status]} {status}" for status in BADGES if counts[status])
    searches = "search" if len(timeline) == 1 else "searches"
    shares = [r["cost"]["share_of_training"] for r in timeline]
    share = next((s for s in reversed(shares) if s is not None), None)
    cost = f", in {100 * share:.1f} % of the training time" if share is not None else ""
    return f"{len(timeline)} {searches}: {parts}{cost}."


def _facts(timeline: Sequence[Record], leader: Record) -> list[tuple[str, str]]:
    total = sum(sum(r["cost"]["seconds"].values()) for r in timeline)
    if leader["status"] == SKIPPED:
        return [("Searches", f"{len(timeline)}, all skipped"), ("Time of all searches", seconds(total))]
    return [
        (f"Merged {leader['monitor']} ({leader['mode']})", number(leader["values"].get(leader["winner"]))),
        ("Latest weights, same step and batches", number(leader["values"].get("latest"))),
        ("Gain, 95 % interval", gain_text(leader["gain"], leader["interval"])),
        *steps_worth(leader),
        *_best_validation(timeline),
        ("Searches", str(len(timeline))),
        ("Time of all searches", seconds(total)),
    ]


def _best_validation(timeline: Sequence[Record]) -> list[tuple[str, str]]:
    """The best of the run's own validations, which are on all batches."""
    better = min if timeline[-1]["mode"] == "min" else max
    points = [(value, step) for record in timeline for step, value in record["validation"]]
    if not points:
        return []
    value, step = better(points)
    return [("Best of the run's own validations, all batches", f"{number(value)} at step {count(step)}")]


def _row(record: Record, history: History) -> SearchRow:
    name = record["artifact"] or MISSING
    gain = gain_text(record["gain"], record["interval"]) if record["gain"] is not None else MISSING
    # The timeline is a file that others may have written: not every name may become a link.
    is_there = name in history.manifests and ARTIFACT_NAME.fullmatch(name) is not None
    return SearchRow(
        step=count(record["step"]),
        status=record["status"],
        verdict=STATUS_TITLES.get(record["status"], record["status"].capitalize()),
        merged=number(record["values"].get(record["winner"])),
        latest=number(record["values"].get("latest")),
        gain=record.get("reason", gain),
        seconds=f"{sum(record['cost']['seconds'].values()):.1f}",
        artifact=name,
        link=f"{name}/report.html" if is_there else None,
        account=f"{name}/explain.html" if is_there and name in history.explained else None,
    )
