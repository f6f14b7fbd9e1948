"""The report as one HTML page, which asks nothing of any network."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template

from lightning_ckmerge.report import charts
from lightning_ckmerge.report.view import Manifest, build_view


def render_html(manifest: Manifest) -> str:
    """Return the report of a search as a page: escaped, self-contained, for light, dark, paper and small screens.

    Args:
        manifest: Its manifest; ``files`` may still be missing.
    """
    return _template().render(
        view=build_view(manifest),
        monitor=manifest["monitor"],
        num_trials=len(manifest["trials"]),
        num_anchors=len(manifest["anchors"]),
        coefficients=charts.coefficient_chart(manifest),
        history=charts.history_chart(manifest),
        frame=charts,
    )


@cache
def _template() -> Template:
    source = resources.files("lightning_ckmerge.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
