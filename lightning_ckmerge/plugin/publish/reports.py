"""Writes the reports of a search and of the run, and sums the run up in a few lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.accounts import PAGE_NAME
from lightning_ckmerge.artifact.history import history_of
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.report.account import render_account_html
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.markdown import render_markdown
from lightning_ckmerge.report.run import summarize, write_run_report
from lightning_ckmerge.report.text import ReportPlace
from lightning_ckmerge.tensorfiles.durable import replace_text


def write_search_report(path: Path, manifest: dict[str, Any], place: ReportPlace) -> None:
    """Write the report of a search into its artifact, which lies at ``path`` now and at ``place`` later."""
    (path / "report.md").write_text(render_markdown(manifest, place), encoding="utf-8")
    (path / "report.html").write_text(render_html(manifest, place), encoding="utf-8")


def write_account_page(artifact: Path, manifest: dict[str, Any], account: dict[str, Any]) -> None:
    """Write the page of an account beside its artifact's files, and link it from the run's page."""
    page = render_account_html(account, manifest, ReportPlace(path=artifact, up="report.html"))
    replace_text(artifact / PAGE_NAME, page)
    if read_timeline(artifact.parent):
        write_run_report(artifact.parent, history_of(artifact.parent))


def summarize_run(dirpath: Path) -> str:
    """Return the searches so far in a few lines, with the code that loads the best merge; none: an empty text.

    Raises:
        ArtifactError: A file is damaged.
    """
    if not read_timeline(dirpath):
        return ""
    return summarize(replace(history_of(dirpath), dirpath=dirpath))
