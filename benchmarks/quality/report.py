"""Gather the runs' scores into ``results.json``, and write ``docs/quality.md`` and its chart from it.

python -m benchmarks.quality.report
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.quality import ROOT, RUNS
from benchmarks.quality.baselines import FORWARDS_PER_GRADIENT
from benchmarks.quality.case import NUM_TRIALS
from benchmarks.quality.methods import CONTROL, DEFAULT, METHODS, NUM_FREE_TRIALS

RESULTS = RUNS.parent / "results.json"
AFTER_DECAY = RUNS.parent / "after_decay.json"
PAGE = ROOT / "docs" / "quality.md"
CHART = ROOT / "docs" / "quality.svg"
SPLITS = {"search": "search half", "confirm": "confirmation half", "test": "test files", "other": "other corpus"}
COSTS = {
    "evaluations": "evaluations",
    "evaluations_to_99": "to 99 % of its gain",
    "evaluations_unstaged": "without dropping losers early",
    "seconds": "seconds",
}
# The default, the space inside it, and the one around it, whose variants are compared with it.
FAMILY = ("grouped", "decay", "auto")
SIMPLEX = "simplex"
# What most readers want to know, in their words.
SHORT = {
    "uniform soup": "uniform mean of the whole buffer",
    "pair (GP-Hedge)": "the paper's pair, searched",
    "EMA": "the best of three EMA lengths",
    DEFAULT: "**the default**",
    "grouped, refined by gradients": "the default, refined by gradients",
}
# Searches that the kept results hold from before near draws were dropped and searches ended early. Measured again, a
# method leaves this list.
MEASURED_BEFORE = (
    *("decay, ratio searched", "decay, minus-sqrt kernel", "EMA length searched", "window", "affine", "simplex"),
    *("simplex, stick-breaking", "simplex, softmax", "pair (GP-Hedge)", "SLERP", "best single", "greedy soup"),
    *("metrics-weighted", "EMA", "LAWA", "uniform soup"),
)

Run = Mapping[str, Any]


def main() -> None:
    paths = sorted(RUNS.glob("*/scores.json"))
    if paths:
        RESULTS.write_text(json.dumps([json.loads(p.read_text()) for p in paths], indent=1) + "\n")
    runs = json.loads(RESULTS.read_text())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(runs))
    CHART.write_text(chart({name: shares(runs, name, "confirm") for name in methods(runs)}))


def methods(runs: Sequence[Run]) -> list[str]:
    """Return the methods that all runs have been measured with, from the worst to the best, without the control."""
    measured = [name for name in METHODS if name != CONTROL and all(name in run["methods"] for run in runs)]
    return sorted(measured, key=lambda name: median(shares(runs, name, "confirm")))


def gains(runs: Sequence[Run], name: str, split: str) -> list[float]:
    """Return a method's gain over the latest weights in nats a byte, one a run."""
    return [run["latest"][split] - run["methods"][name]["losses"][split] for run in runs]


def shares(runs: Sequence[Run], name: str, split: str) -> list[float]:
    """Return the share of the decay branch's gain that a method recovers in percent, one a run."""
    return [
        100 * gain / (run["latest"][split] - run["decay_branch"][split])
        for run, gain in zip(runs, gains(runs, name, split), strict=True)
    ]


def steps(runs: Sequence[Run], name: str) -> list[float]:
    """Return how many further steps a method's gain is worth, at the slope of a line through the latest and the further
    weights' losses, one a run."""
    worth = []
    for run, gain in zip(runs, gains(runs, name, "confirm"), strict=True):
        points = [(run["run"]["num_steps"], run["latest"]["confirm"])]
        points += [(p["step"], p["confirm"]) for p in run["further"]]
        slope = -np.polyfit(*zip(*points, strict=True), 1)[0]
        worth.append(gain / slope if slope > 0 else np.inf)
    return worth


def costs(runs: Sequence[Run], name: str, kind: str) -> list[float]:
    """Return what a method took, one a run."""
    return [run["methods"][name][kind] for run in runs]


def differences(runs: Sequence[Run], name: str, other: str, split: str) -> list[float]:
    """Return by how many points of the share the first method beats the other, one a run."""
    return [a - b for a, b in zip(shares(runs, name, split), shares(runs, other, split), strict=True)]


def page(runs: Sequence[Run]) -> str:
    """Return the page."""
    names = methods(runs)
    about, data = runs[0]["run"], runs[0]["data"]
    corpora = sorted({run["run"]["corpus"] for run in runs})
    seeds = sorted({run["run"]["seed"] for run in runs})
    confirmed = spread(shares(runs, DEFAULT, "confirm"))
    spent = spread(costs(runs, DEFAULT, "evaluations"), 1)
    lines = [
        "# Quality: what a merge recovers of a decay's gain",
        "",
        "These are the runs by which the default was made: three of them gave it its constants, all were looked at. "
        "Runs that had no part in it, of other sizes, lengths, optimizers and models, are the [evidence](evidence.md). "
        "The figures here are of the default before its step led towards the latest weights too "
        "(`python -m benchmarks.quality.latest_share` has what that is worth), and of a refinement by three gradients "
        "over kinds of tensors, which is now one over single tensors. Today's default is the evidence's.",
        "",
        f"The default recovers a median of **{confirmed} %** of what a learning-rate decay gains, on the confirmation "
        f"half, for {spent} full evaluations of the search half. That is a gain of "
        f"{spread(gains(runs, DEFAULT, 'confirm'), 3)} nats a byte over the latest weights, as much as about "
        f"{spread(steps(runs, DEFAULT))} further steps at the slope of the quarter run that followed. Each figure is "
        "the median over runs, the range in brackets.",
        "",
        f"Runs: {len(runs)} ({len(seeds)} seeds on each of {len(corpora)} corpora, {' and '.join(corpora)}: Python's "
        f"standard library, PyTorch's C++ headers), a byte-level GPT of {about['num_parameters'] / 1e6:.2f} M "
        f"parameters, {about['num_steps']} steps of AdamW at a constant rate after a warm-up. The decay branch goes on "
        "from 80 % of the same steps over the same batches, its rate falling linearly to 0. Trained and measured "
        "on two shared x86 cores, without a GPU. These are "
        "small and short runs: they show directions, not what a large run will gain.",
        "",
        "## The short of it",
        "",
        "Share of the decay branch's gain, in percent, and full evaluations of the search half:",
        "",
        table(
            ["merge", "unseen validation batches", "test files", "evaluations"],
            [
                [
                    said,
                    *(spread(shares(runs, name, split)) for split in ("confirm", "test")),
                    spread(costs(runs, name, "evaluations"), 1),
                ]
                for name, said in SHORT.items()
            ],
        ),
        "",
        "![Share of the decay branch's gain, on the confirmation half](quality.svg)",
        "",
        "## All methods",
        "",
        *folded(
            "Share of the decay branch's gain, in percent",
            table(
                ["method", *SPLITS.values(), "worth further steps"],
                [[name, *(spread(shares(runs, name, s)) for s in SPLITS), spread(steps(runs, name))] for name in names],
            ),
            "",
            "Above 100 % the merge beats the branch, which had to train for it. Further steps: the gain on the "
            "confirmation half over the slope of the loss in the quarter run that followed.",
        ),
        *folded("The methods, with their sources", *(f"- *{name}*: {METHODS[name].source}." for name in names)),
        "## What it costs",
        "",
        *folded(
            "Evaluations and seconds of each method",
            table(
                ["method", *COSTS.values()],
                [[name, *(spread(costs(runs, name, kind), 1) for kind in COSTS)] for name in (*names, CONTROL)],
            ),
        ),
        f"An evaluation is one pass over the search half, {data['val'] // 2} batches of {data['batch_size']} windows, "
        f"or as much of something else: a gradient counts {FORWARDS_PER_GRADIENT}. A search scores its anchors and up "
        f"to {NUM_TRIALS} trials, or {NUM_FREE_TRIALS} of free coefficients. Anchors are counted, the verdict's "
        "passes over the other half are not. Searches have become cheaper since these were measured: "
        f"{', '.join(f'*{name}*' for name in names if name in MEASURED_BEFORE)}. Of the default, dropping losers early "
        f"saves a factor of {spread(staging(runs), 1)}. Seconds include the sampler's; they are of cores that others "
        "used too, several runs side by side, the methods in another order for each.",
        "",
        "## Goals",
        "",
        table(
            ["goal", "median, range", "runs that reach it"],
            [
                [goal, spread(values, digits), f"{sum(map(reached, values))} of {len(runs)}"]
                for goal, values, digits, reached in goals(runs)
            ],
        ),
        "",
        "## Against the default",
        "",
        *folded(
            "Points of the share by which a variant beats the default, run by run",
            compared(runs, [name for name in names if name != DEFAULT and name.partition(",")[0] in FAMILY], DEFAULT),
        ),
        *folded(
            "Coordinates of the simplex, against those of the package (numbers in [0, 1], normalised)",
            compared(runs, [name for name in names if name.startswith(f"{SIMPLEX},")], SIMPLEX),
        ),
        "## After a decay",
        "",
        f"{METHODS[CONTROL].source.capitalize()}. Gain over its last weights, in nats a byte: "
        + ", ".join(f"{SPLITS[s]} {spread(after_decay(runs, s), 4)}" for s in SPLITS)
        + f", for {spread(costs(runs, CONTROL, 'evaluations'), 1)} evaluations. Where these searches ended gave the "
        "space `tail` its beginning.",
        "",
        "`search.at_low_lr: tail`, the default, runs a shorter search there. "
        + after_decay_told(json.loads(AFTER_DECAY.read_text())),
        "",
    ]
    return "\n".join(lines)


def folded(summary: str, *lines: str) -> list[str]:
    """Return lines that unfold when a reader asks for them, on the site and on GitHub."""
    return ['<details markdown="1">', f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def goals(runs: Sequence[Run]) -> list[tuple[str, list[float], int, Callable[[float], bool]]]:
    """Return what the default should reach, what it did in each run, digits to show, and whether a value will do."""
    spent = costs(runs, DEFAULT, "evaluations")
    return [
        ("at least 95 % of the decay's gain, confirmed", shares(runs, DEFAULT, "confirm"), 1, lambda v: v >= 95),
        ("at most 12 evaluations", spent, 1, lambda v: v <= 12),
        ("staging saves a factor of 2.5", staging(runs), 2, lambda v: v >= 2.5),
    ]


def staging(runs: Sequence[Run]) -> list[float]:
    """Return by what factor dropping losers early makes the default cheaper, one a run."""
    unstaged, staged = (costs(runs, DEFAULT, kind) for kind in ("evaluations_unstaged", "evaluations"))
    return [u / s for u, s in zip(unstaged, staged, strict=True)]


def compared(runs: Sequence[Run], names: Sequence[str], other: str) -> str:
    """Return a table of differences of the share."""
    rows = [[name, *(spread(differences(runs, name, other, s), 1) for s in SPLITS)] for name in names]
    return table([f"against {other}", *SPLITS.values()], rows)


def after_decay(runs: Sequence[Run], split: str) -> list[float]:
    """Return what the search over the decay branch's trail gains, one a run."""
    return [run["decay_branch"][split] - run["methods"][CONTROL]["losses"][split] for run in runs]


def after_decay_told(results: Mapping[str, Any]) -> str:
    """Return the account of ``benchmarks.quality.after_decay``."""
    runs: Sequence[Mapping[str, Any]] = list(results["runs"].values())
    splits = {split: SPLITS[split] for split in ("search", "confirm", "test")}
    rows = [
        [
            name,
            *(spread([run[name]["gains"][split] for run in runs], 4) for split in splits),
            spread([run[name]["evaluations"] for run in runs], 1) if "evaluations" in runs[0][name] else "",
        ]
        for name in runs[0]
    ]
    statuses = [run["the short search"]["status"] for run in runs]
    noise = Counter(results.get("noise", {}).values())
    told = (
        f"It was measured on {len(runs)} other runs, of a GPT of 0.37 M parameters in float32 "
        f"({', '.join(results['runs'])}; of python-0 one figure was known before the space was settled). Gain over the "
        f"last weights, in nats a byte; {statuses.count('accepted')} of the short search's verdicts are `accepted`:"
        "\n\n"
        + table(["near the last weights", *splits.values(), "evaluations"], rows)
        + "\n\nThe tail EMA is that of the NanoGPT speed runs: `(1 - lam) last + lam EMA` over 150 of 2,750 steps, the "
        "embeddings left out."
    )
    if noise:
        told += (
            " Over weights that only carry noise (the last ones plus Gaussian noise, each tensor's as large as its "
            f"snapshots' distances; batches of four windows) {sum(noise.values())} short searches ended "
            + ", ".join(f"{count} times {status}" for status, count in sorted(noise.items()))
            + "."
        )
    return told + " (`python -m benchmarks.quality.after_decay`)"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and the range in brackets.

    >>> spread([1.0, 4.0, 2.0])
    '2 (1 to 4)'
    """
    low, middle, high = min(values), median(values), max(values)
    # Not "-0".
    shown = [f"{round(value, digits) + 0.0:.{digits}f}" for value in (middle, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def chart(shares_of: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG: one row a method, one dot a run, a bar at the median; an arrow to what lies below 0."""
    left, width, row = 170, 420, 22
    high = max(110.0, max(map(max, shares_of.values())))

    def x(share: float) -> float:
        return left + share / high * width

    height = row * len(shares_of) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in (0, 25, 50, 75, 100):
        colour = "#888" if tick == 100 else "#ddd"
        parts.append(
            f'<path d="M{x(tick):.1f} 8V{height - 24}" stroke="{colour}"/>'
            f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle" fill="#555">{tick} %</text>'
        )
    for i, (name, values) in enumerate(shares_of.items()):
        y = 20 + i * row
        weight = "bold" if name == DEFAULT else "normal"
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end" font-weight="{weight}">{name}</text>')
        dots = [
            f'<circle cx="{x(v):.1f}" cy="{y}" r="3.5" fill="#2563eb" fill-opacity="0.5"/>' for v in values if v >= 0
        ]
        parts += dots
        if len(dots) < len(values):
            parts.append(f'<path d="M{left - 3} {y}l8 -4v8z" fill="#2563eb"/>')
        if median(values) >= 0:
            parts.append(f'<path d="M{x(median(values)):.1f} {y - 7}v14" stroke="#111" stroke-width="2"/>')
        else:
            parts.append(f'<text x="{left + 10}" y="{y + 4}" fill="#555">{median(values):.0f} %</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
