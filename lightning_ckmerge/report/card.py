"""Model cards: the description of merged weights in a Hugging Face repository."""

from __future__ import annotations

from typing import Any

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report.markdown import escape, table
from lightning_ckmerge.report.text import MISSING, number
from lightning_ckmerge.report.view import SHORT_HASH, build_view

FRONT_MATTER = """\
---
library_name: {library}
tags:
- merge
- checkpoint-merging
- lightning-ckmerge
---
"""
NOT_ACCEPTED = "> Note: these weights are **not shown to be better** than the latest weights of the run at that step."
MODEL = FRONT_MATTER.format(library="transformers")
ADAPTER = FRONT_MATTER.format(library="peft")


def render_card(manifest: Manifest) -> str:
    """Return the card of an artifact's weights: verdict, metrics, recipe and sources.

    Args:
        manifest: Its manifest; ``files`` may still be missing.
    """
    view = build_view(manifest)
    winner = _winner(manifest)
    halves = [half for half in ("confirm", "search") if winner[half]]
    names = sorted({name for half in halves for name in winner[half]["metrics"]})
    snapshots = [(s.steps, s.kind, *s.coefficients, s.sha256) for s in view.snapshots]
    sections = [
        f"{ADAPTER if 'adapters' in manifest else MODEL}\n# {escape(view.title)}",
        f"**{view.badge}.** {escape(view.sentence)}",
        *(() if view.status == "accepted" else (NOT_ACCEPTED,)),
        *(f"> Note: {escape(warning)}" for warning in view.warnings),
        "The weights are a linear combination of snapshots of one training run, found by `lightning-ckmerge`.",
        "## Metrics",
        table(
            ("metric", *("confirmation half" if half == "confirm" else "search half" for half in halves)),
            ((name, *(number(winner[half]["metrics"].get(name)) for half in halves)) for name in names),
        ),
        table(("", ""), view.facts),
        "## Recipe",
        table(("steps", "kind", *view.coefficient_names, "sha256 of the snapshot"), snapshots),
        "## Provenance",
        table(("software", "version"), view.software),
        f"Validation data and metric: fingerprint `{manifest['evaluation']['fingerprint'][:SHORT_HASH]}`.",
    ]
    return "\n\n".join(sections) + "\n"


def render_merge_card(recipe: dict[str, Any]) -> str:
    """Return the card of checkpoints that were merged without a search.

    Args:
        recipe: As written by ``ckmerge merge``.
    """
    rows = [
        (
            source["path"].rpartition("/")[2],
            MISSING if source["step"] is None else str(source["step"]),
            number(c, "+.4f"),
            ", ".join(record["sha256"][:SHORT_HASH] for record in source["files"].values()),
        )
        for source, c in zip(recipe["inputs"], recipe["coefficients"], strict=True)
    ]
    how = f"{recipe['method']} ({recipe['schedule']})" if recipe["schedule"] else recipe["method"]
    sections = [
        f"{MODEL}\n# Merge of {len(rows)} checkpoints",
        f"Merged by `ckmerge merge`, {escape(how)}. No validation data was used: nothing is claimed about its quality.",
        "## Recipe",
        table(("checkpoint", "step", "coefficient", "sha256"), rows),
        "## Provenance",
        table(("software", "version"), [(n, v or MISSING) for n, v in recipe["software"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


def render_source_card(name: str, step: int | None) -> str:
    """Return the card of a checkpoint that was exported as it is."""
    at = "" if step is None else f", step {step}"
    return f"{MODEL}\n# {escape(name)}\n\nExported by `ckmerge export` from the checkpoint {escape(name)}{at}.\n"


def _winner(manifest: Manifest) -> dict[str, Any]:
    name = manifest["verdict"]["winner"]
    found: dict[str, Any] = next(c for c in [*manifest["anchors"], *manifest["trials"]] if c["name"] == name)
    return found
