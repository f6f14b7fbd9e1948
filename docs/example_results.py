"""The figures of docs/examples.md, from the examples' own runs.

python -m docs.example_results runs    gathers what each example left in ``runs``: docs/examples.json and docs/pictures/
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
EXAMPLES = DOCS / "examples.json"
GENERALISATION = DOCS / "generalisation.json"
PICTURES = DOCS / "pictures"
# Beside the GPT, whose figures are those of docs/quality.md.
TASKS = {
    "classify-digits": "digits, BatchNorm",
    "diffuse-digits": "diffusion",
    "gan-digits": "GAN",
    "masked-encoder": "masked encoder",
    "spoken-words": "spoken words",
}
KINDS = ("best uniform mean", "best EMA shape", "the paper's pair", "ours")
CHOSEN_ON_ALL = "all"
ANEW = ", statistics anew"


def gather(runs: Path) -> None:
    """Copy the comparisons and pictures of the examples that have run in ``runs``; keep the others' figures."""
    results = json.loads(EXAMPLES.read_text(encoding="utf-8")) if EXAMPLES.exists() else {}
    for task in TASKS:
        if (record := runs / task / "comparison.json").exists():
            results[task] = json.loads(record.read_text(encoding="utf-8"))
        for picture in ("before", "after"):
            if (drawn := runs / task / f"{picture}.png").exists():
                PICTURES.mkdir(exist_ok=True)
                shutil.copy(drawn, PICTURES / f"{task}-{picture}.png")
    EXAMPLES.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def overview() -> str:
    """Return, for each example, the share of the latest weights' value on the test data that each merge saves."""
    lines = [f"| example | {' | '.join(KINDS)} | verdict |", "|---" * (len(KINDS) + 2) + "|"]
    for task, record in _read(EXAMPLES).items():
        found = record["contenders"]
        latest = found["latest weights"]["test"]["value"]
        # The weights that a user would take: where there are two forms, that with BatchNorm's statistics anew.
        suffix = ANEW if f"ours{ANEW}" in found else ""
        cells = []
        for kind in KINDS:
            own = next(v for n, v in found.items() if n.startswith(kind) and n.endswith(suffix))
            cells.append(_share(own["test"], latest))
        lines.append(f"| {TASKS[task]}{suffix} | {' | '.join(cells)} | {record['status']} |")
    return "\n".join(lines)


def comparison(task: str) -> str:
    """Return one example's table."""
    record = _read(EXAMPLES)[task]
    extras = [*record["contenders"]["latest weights"]["extras"]]
    ours = [name for name in record["contenders"] if name.startswith("ours")][-1]
    # Records of runs before this was measured do not hold it.
    over = ["ours over it"] if all("ours_over_it" in own for own in record["contenders"].values()) else []
    heads = ["", "unseen batches", "gain", "test data", "gain", *over, *extras]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, own in record["contenders"].items():
        confirm, test = own["confirm"], own["test"]
        is_latest = name == "latest weights"
        cells = [
            name,
            f"{confirm['value']:.4f}",
            "" if is_latest else f"{confirm['gain']:.4f}",
            f"{test['value']:.4f}",
            "" if is_latest else _gain(test["gain"], test["interval"]),
            *("" if name == ours else _gain(**own["ours_over_it"]) for _ in over),
            *(f"{own['extras'][extra]:.4g}" for extra in extras),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def generalisation(case: str) -> str:
    """Return the gains of one run's merges: a row for the domain that chose, a column for the one that judges."""
    record = _read(GENERALISATION)[case]
    domains = record["domains"]
    lines = [f"| chosen on | {' | '.join(domains)} | verdict |", "|---" * (len(domains) + 2) + "|"]
    lines.append("| latest weights, loss | {} | |".format(" | ".join(f"{record['latest'][d]:.4f}" for d in domains)))
    for chosen, row in record["chosen_on"].items():
        name = "all of them" if chosen == CHOSEN_ON_ALL else chosen
        cells = [_gain(*row["gains"][d]) if "gains" in row else "0" for d in domains]
        cells = [f"**{c}**" if d == chosen else c for d, c in zip(domains, cells, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['status']} |")
    return "\n".join(lines)


def _share(test: Mapping[str, Any], latest: float) -> str:
    text = f"{100 * test['gain'] / latest:.1f}"
    if test["interval"] is None:
        return text
    low, high = (100 * end / latest for end in test["interval"])
    return f"{text} {_unbroken(f'({low:.1f} to {high:.1f})')}"


def _gain(gain: float, interval: tuple[float, float] | None) -> str:
    ends = "" if interval is None else _unbroken("({:.4f} to {:.4f})".format(*interval))
    return f"{gain:.4f} {ends}".rstrip()


def _unbroken(text: str) -> str:
    """Return text that stays on one line."""
    return text.replace(" ", "&nbsp;")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
