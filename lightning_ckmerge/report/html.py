"""The report as one HTML page, which asks nothing of any network."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report import axes, charts
from lightning_ckmerge.report.landscape import draw_landscape
from lightning_ckmerge.report.text import ReportPlace
from lightning_ckmerge.report.view import build_view

DISC = "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0"
SHAPES: dict[charts.Shape, str] = {
    "dot": DISC,
    "ring": DISC,
    "cross": "M-4 -4L4 4M-4 4L4 -4",
    "diamond": "M0 -4.5L4.5 0L0 4.5L-4.5 0Z",
    "up": "M0 0L4 8H-4Z",
    "down": "M0 0L4 -8H-4Z",
}


def render_html(manifest: Manifest, place: ReportPlace | None = None) -> str:
    """Return the report of a search as a page: escaped, self-contained, for light, dark, paper and small screens.

    Args:
        manifest: Its manifest; ``files`` may still be missing.
        place: Where its artifact will lie, for the code to load it and the link to the run's page.
    """
    return render_page(
        "search.html.j2",
        view=build_view(manifest, place),
        up_text="The search it belongs to" if place and place.up.startswith("../..") else "All searches of the run",
        no_code="This artifact is a record: it holds no weights.",
        monitor=manifest["monitor"],
        num_trials=len(manifest["trials"]),
        num_anchors=len(manifest["anchors"]),
        coefficients=charts.coefficient_chart(manifest),
        history=charts.history_chart(manifest),
        landscape=draw_landscape(manifest),
    )


def render_page(name: str, **values: Any) -> str:
    """Return a template, filled in."""
    return _template(name).render(axes=axes, shapes=SHAPES, **values)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("lightning_ckmerge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["names"] = _with_names
    return environment.get_template(name)


def _with_names(text: str) -> Markup:
    """Return a text, escaped, with words in backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
