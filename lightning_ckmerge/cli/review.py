"""Commands that look: ``list``, ``show``, ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_ckmerge.cli.console import console, print_json, status_text, table, tell_choice, verdict_text
from lightning_ckmerge.cli.options import ArtifactPath, Json, RunPath, local

LISTED = ("step", "monitor", "mode", "status", "gain", "interval", "winner", "artifact")
SEARCH_HEADER = ("step", "verdict", "gain over latest, 95 % interval", "value", "took", "artifact", "holds")
CANDIDATE_HEADER = ("candidate", "", "search half", "confirmation half", "gain over latest, 95 % interval")


def list_searches(directory: RunPath, as_json: Json = False) -> None:
    """List a run's searches: when, how they ended, their gains, and which artifacts are left.

    Of several runs that share a directory, all are listed. Each is named by its path, the first as `run=1`.

    \b
    Examples:
      ckmerge list runs/gpt/merges
      ckmerge list runs/gpt/merges/run=1
    """
    from lightning_ckmerge.artifact.runs import find_run, list_runs

    newest = find_run(directory)
    runs = list_runs(directory) or {directory: newest}
    listed = {run: _listed(name, run) for name, run in runs.items()}
    if not any(each["searches"] for each in listed.values()):
        raise _nothing_listed(directory)
    if as_json:
        others = [each for run, each in listed.items() if run != newest]
        print_json({**listed[newest], **({"other_runs": others} if others else {})})
        return
    for run, each in listed.items():
        title = f"{each['run']}{', the newest run' if run == newest else ''}" if len(listed) > 1 else None
        _print_searches(each, title)


def show(artifact: ArtifactPath, as_json: Json = False) -> None:
    """Show how an artifact was made: verdict, candidates, coefficients, cost. --json prints its manifest.

    \b
    Examples:
      ckmerge show runs/gpt/merges
      ckmerge show runs/gpt/merges/step=000002000
    """
    from lightning_ckmerge.artifact.load import Artifact
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
    from lightning_ckmerge.artifact.remote import address
    from lightning_ckmerge.artifact.runs import find_run, help_on
    from lightning_ckmerge.errors import ArtifactError
    from lightning_ckmerge.report.text import ReportPlace
    from lightning_ckmerge.report.view import build_view

    if not (artifact / MANIFEST_NAME).is_file() and (hint := help_on(find_run(artifact))):
        raise ArtifactError(
            f"an artifact must be a directory with a {MANIFEST_NAME}, got {address(artifact)!r}. {hint}"
        )
    opened = Artifact.open(artifact, verify=False)
    choice = tell_choice(artifact, as_json=as_json)
    if as_json:
        print_json({**opened.manifest, **choice})
        return
    view = build_view(opened.manifest, ReportPlace(path=opened.path))
    out = console()
    out.print(f"{view.title}, {address(opened.path)}\n", style="bold")
    out.print(verdict_text(opened.manifest["verdict"]))
    for warning in view.warnings:
        out.print(f"note: {warning}")
    out.print(table(("", ""), view.facts))
    candidates = [(c.name, c.role, c.search, c.confirm, c.gain) for c in view.candidates]
    out.print(table(CANDIDATE_HEADER, candidates, title="Candidates"))
    if view.front:
        front = [(f.name, f.role, *f.values, f.place) for f in view.front]
        header = ("candidate", "", *view.monitors, "in this artifact")
        out.print(table(header, front, title="Pareto front, search half"))
    if view.metrics:
        metrics = [(m.name, m.role, *m.values, m.change) for m in view.metrics]
        title = f"All metrics, {view.metrics_half} half"
        out.print(table(("metric", "", *view.compared, "change"), metrics, title=title))
    snapshots = [(s.steps, s.kind, *s.coefficients, s.sha256) for s in view.snapshots]
    out.print(table(("steps", "kind", *view.coefficient_names, "sha256"), snapshots, title="Snapshots"))
    out.print(table(("", ""), view.cost, title="Cost"))
    out.print(table(("file", "size", "sha256"), view.files, title="Files"))
    if view.code:
        out.print("How to load it", style="bold")
        out.print(view.code)


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=local, help="An artifact, or the callback's dirpath, or its URL.")
    ],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Print the report of a search as Markdown and say where its page is; of a run, write both again.

    \b
    Examples:
      ckmerge report runs/gpt/merges --open
      ckmerge report runs/gpt/merges/best > merge.md
    """
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
    from lightning_ckmerge.artifact.runs import is_first, run_of

    is_artifact = (directory / MANIFEST_NAME).is_file() or run_of(directory) != directory or is_first(directory.parent)
    markdown, page = _search_report(directory) if is_artifact else _run_report(directory)
    choice = tell_choice(directory, as_json=as_json)
    if as_json:
        print_json({"html": str(page), "markdown": markdown, **choice})
    else:
        _print_markdown(markdown, page)
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _listed(name: Path, directory: Path) -> dict[str, Any]:
    """Return a run's searches, each with the state of its artifact, even if damaged."""
    from lightning_ckmerge.artifact.load import best_target
    from lightning_ckmerge.artifact.standing import read_standing
    from lightning_ckmerge.artifact.timeline import check_whole, read_timeline
    from lightning_ckmerge.tensorfiles.untrusted import inside

    best, standing = best_target(directory), read_standing(directory)
    timeline = read_timeline(directory) if directory.is_dir() else []
    check_whole(directory, timeline)
    searches = [
        {
            **{key: record[key] for key in LISTED},
            "value": record["values"].get(record["winner"]),
            "seconds": sum(record["cost"]["seconds"].values()),
            "reason": record.get("reason"),
            "holds": _holds(inside(directory, record["artifact"])) if record["artifact"] else "nothing",
        }
        for record in timeline
    ]
    return {
        "run": str(name),
        "dirpath": str(directory),
        "best": best.name if best else None,
        "advice": standing.advice if best is not None and standing is not None else None,
        "searches": searches,
    }


def _print_searches(run: dict[str, Any], title: str | None) -> None:
    from lightning_ckmerge.report.text import MISSING, count, gain_text, number, seconds

    rows = [
        (
            count(s["step"]),
            status_text(s["status"]),
            s["reason"] or gain_text(s["gain"], s["interval"]),
            number(s["value"]),
            seconds(s["seconds"]),
            (s["artifact"] or MISSING) + (" (best)" if run["best"] and run["best"] == s["artifact"] else ""),
            s["holds"],
        )
        for s in run["searches"]
    ]
    out = console()
    if title is not None:
        out.print(title, style="bold")
    out.print(table(SEARCH_HEADER, rows) if rows else "no search yet\n")
    if run["advice"] is not None:
        out.print(run["advice"])


def _nothing_listed(directory: Path) -> Exception:
    from lightning_ckmerge.artifact.runs import help_on
    from lightning_ckmerge.artifact.timeline import no_searches

    remedy = help_on(directory) or "Name the callback's `dirpath`; before the first search there is nothing to list."
    return no_searches(repr(str(directory)), remedy)


def _holds(path: Path) -> str:
    from lightning_ckmerge.artifact.load import Artifact
    from lightning_ckmerge.artifact.manifest import read_manifest
    from lightning_ckmerge.errors import ArtifactError

    try:
        artifact = Artifact(path, read_manifest(path))
        artifact.check_files(verify=False)
    except ArtifactError:
        return "damaged" if path.exists() else "removed"
    return "weights" if artifact.has_weights else "record"


def _search_report(directory: Path) -> tuple[str, Path]:
    """A search's own report is part of its artifact, and listed with its hash: it is left as it is.

    Where there is an account of it, that is added.
    """
    from lightning_ckmerge.artifact.accounts import read_account
    from lightning_ckmerge.artifact.load import Artifact
    from lightning_ckmerge.report.account import render_account_markdown
    from lightning_ckmerge.report.markdown import render_markdown
    from lightning_ckmerge.report.text import ReportPlace

    artifact = Artifact.open(directory, verify=False)
    markdown = render_markdown(artifact.manifest, ReportPlace(path=artifact.path))
    if (account := read_account(artifact.path)) is not None:
        markdown += "\n" + render_account_markdown(account)
    return markdown, artifact.path / "report.html"


def _run_report(directory: Path) -> tuple[str, Path]:
    """Write the report of a run beside its artifacts, which may have changed since it was last written."""
    from lightning_ckmerge.artifact.history import read_history
    from lightning_ckmerge.report.run import write_run_report

    history = read_history(directory)
    return write_run_report(history.dirpath, history), history.dirpath / "report.html"


def _print_markdown(markdown: str, page: Path) -> None:
    out = console()
    if out.is_terminal:
        from rich.markdown import Markdown

        out.print(Markdown(markdown))
        out.print(f"\npage: {page}")
    else:
        typer.echo(markdown, nl=False)
