"""The report as Markdown, for terminals, trackers and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report.text import ReportPlace
from lightning_ckmerge.report.view import View, build_view

# Whatever could start markup, end a table's cell, or open an HTML tag. A name may hold any of them.
SPECIAL = re.compile(r"([\\`*_\[\]|~<>&$])")


def render_markdown(manifest: Manifest, place: ReportPlace | None = None) -> str:
    """Return the report of a search in GitHub's Markdown.

    Args:
        manifest: Its manifest; ``files`` may still be missing.
        place: Where its artifact will lie.
    """
    view = build_view(manifest, place)
    sections = [
        f"# {escape(view.title)}",
        f"**{view.badge}.** {escape(view.sentence)}",
        *([escape(" · ".join(filter(None, (view.run, view.date))))] if view.run or view.date else []),
        *(f"> Note: {escape(warning)}" for warning in view.warnings),
        table(("", ""), view.facts),
        "## What to do next",
        view.advice,
        f"```python\n{view.code}```" if view.code else "This artifact is a record: it holds no weights.",
        "## Candidates",
        table(
            ("candidate", "", "confirmation half", "gain over latest there", "search half", "gain over latest there"),
            ((c.name, c.role, c.confirm, c.gain, c.search, c.search_gain) for c in view.candidates),
        ),
        "\n".join(f"- {escape(names)}: {meaning}." for names, meaning in view.meanings),
        f"{len(manifest['trials'])} trials beside {len(manifest['anchors'])} anchors. Intervals hold "
        "95 %; the verdict rests on the confirmation half, which the search did not see.",
        *front_section(view),
        *metrics_section(view),
        "## Snapshots and coefficients",
        table(
            ("steps", "kind", *view.coefficient_names, "sha256"),
            ((s.steps, s.kind, *s.coefficients, s.sha256) for s in view.snapshots),
        ),
        "## Cost",
        table(("", ""), view.cost),
        "## Provenance",
    ]
    if view.files:
        sections.append(table(("file", "size", "sha256"), view.files))
    sections.append(table(("software", "version"), view.software))
    return "\n\n".join(sections) + "\n"


def metrics_section(view: View) -> list[str]:
    """Return the table of all logged metrics; nothing where there is but one."""
    if not view.metrics:
        return []
    rows = [(m.name, m.role, *m.values, m.change) for m in view.metrics]
    return [f"## All metrics, {view.metrics_half} half", table(("metric", "", *view.compared, "change"), rows)]


def front_section(view: View) -> list[str]:
    """Return the table of the Pareto front; nothing where one metric is monitored."""
    if not view.front:
        return []
    rows = [(f.name, f.role, *f.values, f.place) for f in view.front]
    return ["## Pareto front, search half", table(("candidate", "", *view.monitors, "in this artifact"), rows)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, its cells escaped.

    >>> print(table(("name", "value"), [("a|b", "1")]))
    | name | value |
    | --- | --- |
    | a\\|b | 1 |
    """
    lines = [
        [escape(cell) for cell in header],
        ["---"] * len(header),
        *([escape(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Return ``text`` such that Markdown shows it as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
