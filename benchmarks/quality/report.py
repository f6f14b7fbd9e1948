"""Gather the runs' scores into ``results.json``, and write ``docs/quality.md`` and its chart from it.

python -m benchmarks.quality.report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.quality import ROOT, RUNS
from benchmarks.quality.data import BATCH_SIZE, NUM_EVAL_BATCHES
from benchmarks.quality.measure import NUM_TRIALS

RESULTS = RUNS.parent / "results.json"
PAGE = ROOT / "docs" / "quality.md"
CHART = ROOT / "docs" / "quality.svg"
SPLITS = {"search": "search half", "confirm": "confirmation half", "test": "test files", "other": "other corpus"}
DEFAULT = "decay"
CONTROL = "decay, after a decay"
SOURCES = {
    "best uniform mean": "best of the last 2, 4, 8 and all snapshots (LAWA, arXiv:2209.14981, over segment means)",
    "best of three EMAs": "the EMA-shaped anchors",
    "pair (GP-Hedge)": "the paper's method, arXiv:2403.19390, over two points 3 % of the run apart, which was best "
    "on a shorter run of one of the corpora",
    "decay": "the default",
}

Run = Mapping[str, Any]
Losses = Mapping[str, float]


def main() -> None:
    paths = sorted(RUNS.glob("*/scores.json"))
    if paths:
        RESULTS.write_text(json.dumps([json.loads(p.read_text()) for p in paths], indent=1) + "\n")
    runs = json.loads(RESULTS.read_text())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(runs))
    CHART.write_text(chart({name: shares(runs, pick, "confirm") for name, pick in methods(runs).items()}))


def methods(runs: Sequence[Run]) -> dict[str, Callable[[Run], Losses]]:
    """Return, by name, where a run holds each method's losses."""
    searched = [name for name in runs[0]["methods"] if name != CONTROL]

    def searched_by(name: str) -> Callable[[Run], Losses]:
        return lambda run: run["methods"][name]["losses"]

    def best_anchor(kind: str) -> Callable[[Run], Losses]:
        return lambda run: run["methods"][DEFAULT]["anchors"][kind]

    anchors = {"best uniform mean": best_anchor("uniform"), "best of three EMAs": best_anchor("ema")}
    found = {**anchors, **{name: searched_by(name) for name in searched}}
    return dict(sorted(found.items(), key=lambda item: median(shares(runs, item[1], "confirm"))))


def shares(runs: Sequence[Run], pick: Callable[[Run], Losses], split: str) -> list[float]:
    """Return the recovered share of the decay branch's gain in percent, one a run."""
    return [
        100 * (run["latest"][split] - pick(run)[split]) / (run["latest"][split] - run["decay_branch"][split])
        for run in runs
    ]


def page(runs: Sequence[Run]) -> str:
    """Return the page."""
    about = runs[0]["run"]
    corpora = sorted({run["run"]["corpus"] for run in runs})
    seeds = sorted({run["run"]["seed"] for run in runs})
    default = methods(runs)[DEFAULT]
    confirmed = spread(shares(runs, default, "confirm"))
    spent = [run["methods"][DEFAULT]["evaluations"] for run in runs]
    saved = [run["methods"][DEFAULT]["evaluations_unstaged"] / run["methods"][DEFAULT]["evaluations"] for run in runs]
    gains = [run["latest"]["confirm"] - default(run)["confirm"] for run in runs]
    lines = [
        "# Quality: what a merge recovers of a decay's gain",
        "",
        f"The default recovers a median of **{confirmed} %** of what a learning-rate decay gains, on the "
        f"confirmation half, for {spread(spent, 1)} full evaluations of the search half. That is a gain of "
        f"{spread(gains, 3)} nats a byte over the latest weights{_worth(runs, gains)}. Each figure is the median "
        "over runs, the range in brackets.",
        "",
        f"Runs: {len(runs)} ({len(seeds)} seeds on each of {len(corpora)} corpora, {' and '.join(corpora)}: Python's "
        f"standard library, PyTorch's C++ headers), a byte-level GPT of {about['num_parameters'] / 1e6:.2f} M "
        f"parameters, {about['num_steps']} steps of AdamW at a constant rate after a warm-up. The decay branch goes on "
        "from 80 % of the same steps over the same batches, its rate falling linearly to 0. Trained and measured "
        "on two shared x86 cores, without a GPU. These are "
        "small and short runs: they show directions, not what a large run will gain.",
        "",
        "![Share of the decay branch's gain, on the confirmation half](quality.svg)",
        "",
        "## Share of the decay branch's gain, in percent",
        "",
        table(
            ["method", *SPLITS.values()],
            [[name, *(spread(shares(runs, pick, s)) for s in SPLITS)] for name, pick in methods(runs).items()],
        ),
        "",
        "Above 100 % the merge beats the branch, which had to train for it. "
        + " ".join(f"*{name}*: {text}." for name, text in SOURCES.items()),
        "",
        "## What it costs",
        "",
        table(
            ["search", "evaluations", "without dropping losers early", "seconds"],
            [
                [name, *(spread([run["methods"][name][key] for run in runs], 1) for key in COSTS)]
                for name in runs[0]["methods"]
            ],
        ),
        "",
        f"An evaluation is one pass over the search half, {NUM_EVAL_BATCHES['val'] // 2} batches of {BATCH_SIZE} "
        f"windows. Every search scores its anchors and {NUM_TRIALS} trials. Anchors are counted, the verdict's passes "
        f"over the other half are not. Of the default, dropping losers early saves a factor of {spread(saved, 1)}. "
        "Seconds include the sampler's; two runs were measured side by side.",
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
        "The kernels differ by less than the runs do: per run, the power kernel recovers "
        f"{spread(kernel_difference(runs), 1)} points more than the exponential one on the confirmation half.",
        "",
        "## After a decay",
        "",
        "The honest control: the same search over the branch's own trail, whose rate has fallen to 0. Gain over its "
        "last weights, in nats a byte: "
        + ", ".join(f"{SPLITS[s]} {spread(after_decay(runs, s), 4)}" for s in SPLITS)
        + ".",
        "",
    ]
    return "\n".join(lines)


COSTS = ("evaluations", "evaluations_unstaged", "seconds")


def goals(runs: Sequence[Run]) -> list[tuple[str, list[float], int, Callable[[float], bool]]]:
    """Return what the default should reach, what it did in each run, digits to show, and whether a value will do."""
    searches = [run["methods"][DEFAULT] for run in runs]
    return [
        (
            "at least 95 % of the decay's gain, confirmed",
            shares(runs, methods(runs)[DEFAULT], "confirm"),
            1,
            lambda v: v >= 95,
        ),
        ("at most 12 evaluations", [s["evaluations"] for s in searches], 1, lambda v: v <= 12),
        (
            "staging saves a factor of 2.5",
            [s["evaluations_unstaged"] / s["evaluations"] for s in searches],
            2,
            lambda v: v >= 2.5,
        ),
    ]


def kernel_difference(runs: Sequence[Run]) -> list[float]:
    """Return the points by which the power kernel beats the exponential one, one a run."""
    power, exponential = (shares(runs, methods(runs)[n], "confirm") for n in ("decay, power kernel", DEFAULT))
    return [p - e for p, e in zip(power, exponential, strict=True)]


def after_decay(runs: Sequence[Run], split: str) -> list[float]:
    """Return what the search over the decay branch's trail gains, one a run."""
    return [run["decay_branch"][split] - run["methods"][CONTROL]["losses"][split] for run in runs]


def _worth(runs: Sequence[Run], gains: Sequence[float]) -> str:
    """Further steps, at the slope of a line through the latest and the further weights' losses."""
    steps = []
    for run, gain in zip(runs, gains, strict=True):
        points = [(run["run"]["num_steps"], run["latest"]["confirm"])]
        points += [(p["step"], p["confirm"]) for p in run["further"]]
        slope = -np.polyfit(*zip(*points, strict=True), 1)[0]
        steps.append(gain / slope if slope > 0 else np.inf)
    return f", as much as about {spread(steps)} further steps at the slope of the quarter run that followed"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and the range in brackets.

    >>> spread([1.0, 4.0, 2.0])
    '2 (1 to 4)'
    """
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def chart(shares_of: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG: one row a method, one dot a run, a bar at the median."""
    left, width, row = 170, 420, 24
    low = min(0.0, min(map(min, shares_of.values())))
    high = max(110.0, max(map(max, shares_of.values())))

    def x(share: float) -> float:
        return left + (share - low) / (high - low) * width

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
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3.5" fill="#2563eb" fill-opacity="0.5"/>' for v in values]
        parts.append(f'<path d="M{x(median(values)):.1f} {y - 8}v16" stroke="#111" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
