"""How an artifact shows itself where people look at objects: in one line, and as a card in a notebook."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lightning_ckmerge.artifact.manifest import Manifest

COLOURS = {"accepted": "#17713f", "rejected": "#b3261e"}
OPEN = "#8a5a00"
# It takes the notebook's own letters and background, dark or light.
CARD = """\
<div style="border:1px solid #8886;border-radius:8px;padding:.6em 1em;max-width:46em">
<span style="background:{colour};color:#fff;border-radius:999px;padding:.1em .7em">{status}</span>
<b>Merge at step {step}</b>
<div style="margin:.5em 0">{sentence}</div>
<code>{use}</code>
</div>"""


def describe(path: Path, manifest: Manifest) -> str:
    """Return an artifact in one line: place, verdict and value."""
    verdict = manifest["verdict"]
    value = "no value" if verdict["value"] is None else f"{verdict['value']:.5g}"
    return f"Artifact({str(path)!r}, {verdict['status']}, {manifest['monitor']} {value})"


def render_card(path: Path, manifest: Manifest, *, has_weights: bool) -> str:
    """Return an artifact as a card: its verdict, and how to load its weights. It is HTML, escaped."""
    verdict = manifest["verdict"]
    use = f'load_merged("{path}", model)' if has_weights else f"{path} is a record, without weights."
    return CARD.format(
        colour=COLOURS.get(verdict["status"], OPEN),
        status=escape(verdict["status"]),
        step=manifest["step"],
        sentence=escape(verdict["sentence"]),
        use=escape(use),
    )
