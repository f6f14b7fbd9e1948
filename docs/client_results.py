"""The figures of docs/clients.md, from what ``make clients`` and ``make lightning-suite`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CLIENTS = DOCS / "clients.json"
SUITE = DOCS / "lightning_suite.json"
OUTCOMES = ("passed", "failed", "skipped")
COMMON = ("Python", "torch", "lightning", "pytorch-lightning")


def clients() -> str:
    """Return the versions that all have in common, and a table with a row for each client."""
    records = json.loads(CLIENTS.read_text(encoding="utf-8")).values()
    found = [{"Python": r["python"], **r["versions"]} for r in records if "fault" not in r]
    shared = [f"{n} {v}" for n, v in found[0].items() if n in COMMON and all(f.get(n) == v for f in found)]
    rows = [
        "| client | run | steps, searches | last verdict | reported, and predicted by the client |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([f"With {', '.join(shared)}:", "", *rows, *map(_row, records)])


def lightning_suite() -> str:
    """Return what came out of Lightning's tests, in sentences."""
    found = json.loads(SUITE.read_text(encoding="utf-8"))
    outcomes = found["outcomes"]
    kinds = {"plain": "as they are", "bystander": "a callback that does nothing", "merging": "ours"}
    cells = [[name, *(outcomes[kind].get(how, 0) for how in OUTCOMES)] for kind, name in kinds.items()]
    counts = [f"| {' | '.join(map(str, row))} |" for row in cells]
    table = "\n".join([f"| callback | {' | '.join(OUTCOMES)} |", "|---" * 4 + "|", *counts])
    ended = sum(n for status, n in found["searches"].items() if status in ("accepted", "unconfirmed", "rejected"))
    parts = ", ".join(f"`{part}`" for part in found["parts"])
    text = (
        f"The tests of tag {found['tag']}, with Lightning {found['lightning']} and torch {found['torch']}, of {parts}; "
        f"{ended} searches ended in them:"
    )
    reasons = [f"- `{test}`: {why}" for test, why in found["fail with ours alone"].items()]
    alone = ["Failed with ours alone:", "\n".join(reasons)] if reasons else ["None failed with ours alone."]
    return "\n\n".join([text, table, *alone])


def _row(record: dict[str, Any]) -> str:
    if "fault" in record:
        return f"| | | | | failed: {record['fault']} |"
    versions = record["versions"]
    own = [name for name in versions if name not in COMMON]
    client = ", ".join(f"{name} {versions[name]}" for name in own)
    return (
        f"| {client} | {record['does']} | {record['steps']}, {record['searches']} | {record['verdict']} | "
        f"`{record['monitor']}` {record['reported']:.6g}, {record['predicted']:.6g}: {record['predicts']} |"
    )
