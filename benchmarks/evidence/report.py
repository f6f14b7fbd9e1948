"""Write docs/evidence.md from the committed results.

python -m benchmarks.evidence report
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.evidence import RESULTS
from benchmarks.evidence.measure import REFINED
from benchmarks.evidence.protocol import ARCHITECTURES, LADDER_STEPS, PARTS, SEEDS, runs
from benchmarks.evidence.referees import REFEREES
from benchmarks.evidence.statistics import Trend, mean_interval, proportion_interval, trend
from benchmarks.evidence.verdicts import NOISES_A_RUN, SPLITS_A_RUN, TAIL_NOISE, covers, decided
from benchmarks.quality import ROOT
from benchmarks.quality.methods import DEFAULT
from benchmarks.quality.report import folded, spread, table

PAGE = ROOT / "docs" / "evidence.md"

SHORT = {
    "uniform soup": "uniform mean of the whole buffer",
    "pair (GP-Hedge)": "the paper's pair, searched",
    "EMA": "the best of three EMA lengths",
    DEFAULT: "**the default**",
    REFINED: "the default, refined by gradients",
}
NOT_YET = "*not yet run*"
# A plane through fewer tells next to nothing.
MIN_TREND_RUNS = 10
TARGET_SHARE, TARGET_SLOPE, TARGET_EVALUATIONS = 95.0, -3.0, 6.0

Result = Mapping[str, Any]


def main() -> None:
    PAGE.write_text(page({part: results(part) for part in PARTS}))


def results(part: str) -> list[Any]:
    """Return a part's committed results."""
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else []


def share(result: Result, name: str, split: str = "confirm") -> float:
    """Return the share of the twin's gain that a method recovers, in percent."""
    latest = result["latest"][split]
    return 100 * (latest - result["methods"][name]["losses"][split]) / (latest - result["twin"][split])


def has_share(result: Result) -> bool:
    """Whether a run has a decayed twin that gains for certain, of whose gain a merge can have a share."""
    return "twin" in result and result["twin_interval"][0] > 0


def shares(found: Sequence[Result], name: str, split: str = "confirm") -> list[float]:
    """Return a method's shares, one a run that it has been measured on."""
    return [share(r, name, split) for r in found if name in r["methods"] and has_share(r)]


def of_method(found: Sequence[Result], name: str, key: str) -> list[float]:
    """Return a figure of a method, one a run."""
    return [r["methods"][name][key] for r in found if name in r["methods"]]


def comparable(found: Sequence[Result]) -> list[Result]:
    """Return the runs on which all methods of the short table have been measured that have been on any.

    Medians over different runs would compare runs, not methods.
    """
    begun = {name for name in SHORT if any(name in r["methods"] for r in found)}
    return [r for r in found if begun <= r["methods"].keys()]


def against(found: Sequence[Result], name: str, other: str = DEFAULT) -> list[float]:
    """Return by how many points of the share a method beats another, run by run."""
    both = [r for r in found if {name, other} <= r["methods"].keys() and has_share(r)]
    return [share(r, name) - share(r, other) for r in both]


def told(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, the range in brackets, or that there is nothing yet."""
    if not values:
        return NOT_YET
    if len(values) == 1:
        return f"{values[0] + 0.0:.{digits}f}"
    return spread(values, digits)


def with_interval(values: Sequence[float], digits: int = 1) -> str:
    """Return the median and range, and the mean's interval."""
    interval = mean_interval(values)
    if interval is None:
        return told(values, digits)
    return f"{told(values, digits)}; mean in [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def page(found: Mapping[str, Sequence[Result]]) -> str:
    """Return the page."""
    ladder = found["ladder"]
    compared = comparable(ladder)
    prints = sorted({m["fingerprint"] for part in found if part != "verdicts" for r in found[part] for m in
                     r["methods"].values()} | {r["fingerprint"] for r in found["verdicts"]})  # fmt: skip
    lines = [
        "# Evidence",
        "",
        "How much of a learning-rate decay's gain the default recovers on runs that had no part in making it. Runs, "
        "statistics and what counts as success were fixed [beforehand](protocol.md). Medians over runs, the "
        "range in brackets; two shared x86 cores, no GPU. Written by `python -m benchmarks.evidence report`.",
        "",
        "## The short of it",
        "",
        f"Share of the decay's gain over those {len(compared)} of the ladder's {len(runs('ladder'))} runs on which all "
        "of these have been measured, in percent, and passes over the search half:",
        "",
        table(
            ["merge", "unseen validation batches", "test files", "evaluations"],
            [
                [
                    said,
                    told(shares(compared, name)),
                    told(shares(compared, name, "test")),
                    told(of_method(compared, name, "evaluations"), 1),
                ]
                for name, said in SHORT.items()
            ],
        ),
        "",
        "## What holds",
        "",
        table(["claim", "state"], [list(row) for row in claims(found)]),
        "",
        "## How far it has run",
        "",
        table(
            ["part", "runs measured", "of", "seeds"],
            [
                [part, str(len(found[part])) if found[part] else NOT_YET, str(len(runs(part))), seeds_told(found[part])]
                for part in PARTS
            ],
        ),
        "",
        f"Fingerprints of the search code that was measured: {', '.join(f'`{p}`' for p in prints) or NOT_YET}.",
        "",
        *ladder_section(ladder),
        *regimes_section(found["regimes"]),
        *architectures_section(found["architectures"]),
        *referees_section(found["referees"]),
        *verdicts_section(found["verdicts"]),
    ]
    return "\n".join(lines)


def seeds_told(found: Sequence[Result]) -> str:
    """Return the seeds that have been measured."""
    return ", ".join(map(str, sorted({r["run"]["seed"] for r in found}))) or "none"


def ladder_section(found: Sequence[Result]) -> list[str]:
    """Return the ladder's tables and its trend."""
    names = list(dict.fromkeys(name for r in found for name in r["methods"]))
    return [
        "## Sizes and lengths",
        "",
        "*Twin's gain*: of the decayed copy over the latest weights, in nats a byte. *Best tau*: the length of the "
        "average that won, as a share of the run. A share above 100 % says that the merge beats the twin, and no more: "
        "while a run still learns fast, a falling rate costs the twin some of that, and its gain is a low mark. Shares "
        "of short runs are high for this reason; those of the longest count most.",
        "",
        table(
            [
                *("GPT, steps", "parameters", "runs", "twin's gain", "share, %", "share on test files, %"),
                *("gain", "evaluations", "best tau, %"),
            ],
            [ladder_row(cell, [r for r in found if r["run"]["cell"] == cell]) for cell in cells("ladder")],
        ),
        "",
        *trend_told(fitted(found)),
        "",
        *folded(
            "Other merges on the same runs, in points of the share against the default, run by run",
            table(
                ["merge", "share, %", "against the default", "evaluations"],
                [
                    [
                        name,
                        told(shares(found, name)),
                        with_interval(against(found, name)) if name != DEFAULT else "",
                        told(of_method(found, name, "evaluations"), 1),
                    ]
                    for name in names
                ],
            ),
        ),
    ]


def cells(part: str) -> list[str]:
    """Return a part's cells in the order of the protocol."""
    found = list(dict.fromkeys(run.cell for run in runs(part)))
    if part == "ladder":
        return [f"{size}, {steps:,} steps" for size, lengths in LADDER_STEPS.items() for steps in lengths]
    return found


def ladder_row(cell: str, found: Sequence[Result]) -> list[str]:
    """Return a cell's row."""
    parameters = f"{found[0]['run']['num_parameters'] / 1e6:.2f} M" if found else ""
    return [
        cell,
        parameters,
        f"{len(found)} of {len(SEEDS)}",
        told([r["twin_gain"] for r in found], 3),
        told(shares(found, DEFAULT), 1),
        told(shares(found, DEFAULT, "test"), 1),
        told(of_method(found, DEFAULT, "gain"), 3),
        told(of_method(found, DEFAULT, "evaluations"), 1),
        told(taus(found), 1),
    ]


def taus(found: Sequence[Result]) -> list[float]:
    """Return the winner's ``tau`` in percent of the run, where the winner has one."""
    coordinates = [(r["methods"][DEFAULT]["about"].get("coordinates") or {}, r["run"]["num_steps"]) for r in found]
    return [100 * z_D["tau"] / steps for z_D, steps in coordinates if "tau" in z_D]


def fitted(found: Sequence[Result]) -> Trend | None:
    """Return the share's plane over the logarithms of parameters (by a million) and steps (by a thousand)."""
    places = [(math.log10(r["run"]["num_parameters"] / 1e6), math.log10(r["run"]["num_steps"] / 1e3)) for r in found]
    return trend(places, shares(found, DEFAULT)) if len(found) >= MIN_TREND_RUNS else None


def trend_told(found: Trend | None) -> list[str]:
    """Return what the trend says, and what it cannot."""
    if found is None:
        return [f"**Trend**: {NOT_YET}: it needs {MIN_TREND_RUNS} runs or more, of several sizes and lengths."]
    (size, steps), level = found.slopes_D, found.level
    return [
        f"**Trend** over {found.num_runs} runs: {level.value:.1f} % (95 % interval {level.interval[0]:.1f} to "
        f"{level.interval[1]:.1f}) at a million parameters and a thousand steps; {size.value:+.1f} points "
        f"({size.interval[0]:+.1f} to {size.interval[1]:+.1f}) for ten times the parameters, {steps.value:+.1f} "
        f"({steps.interval[0]:+.1f} to {steps.interval[1]:+.1f}) for ten times the steps. Runs scatter around it by "
        f"{found.residual:.1f} points.",
        "",
        "**What it promises for large runs**: nothing beyond the sizes and lengths in the table. A run of "
        "a billion parameters lies two factors of ten beyond the ladder, and one of a hundred "
        f"thousand steps one and a half: taken that far, the interval of the parameters' slope alone spans "
        f"{2 * (size.interval[1] - size.interval[0]):.0f} points. So the trend rules a steep decline out or it does "
        "not, by its interval; it does not give a large run's figure.",
        "",
        "**What nobody knows**: whether the line stays one. These runs read 0.05 to 6 bytes a parameter, a large run "
        "twenty and more; their batches are small, so that their noise, and what averaging removes, is large; none has "
        "entered the long slow part of training. A large run has to be measured: `ckmerge study` does it on the "
        "run's own checkpoints.",
    ]


def regimes_section(found: Sequence[Result]) -> list[str]:
    """Return the regimes' table."""
    names = list(dict.fromkeys(name for r in found for name in r["methods"]))
    rows = [regime_row(cell, [r for r in found if r["run"]["cell"] == cell]) for cell in cells("regimes")]
    return [
        "## Regimes",
        "",
        "The 0.3M GPT, 1,000 steps. Without a decayed twin that gains for certain there is no share; the gain's own "
        "95 % interval is then the least favourable run's. Where the rate has decayed at the end (`wsd`, `cosine to "
        "0`), the default is the short search near the latest weights.",
        "",
        table(["regime", "runs", "twin's gain", "share, %", "gain", "interval", "evaluations"], rows),
        "",
        *folded("Other merges", merges_table("regimes", found, names)),
    ]


def regime_row(cell: str, found: Sequence[Result]) -> list[str]:
    """Return a cell's row."""
    intervals = [i for r in found if (i := r["methods"].get(DEFAULT, {}).get("interval"))]
    lowest = min(intervals, key=lambda i: i[0], default=None)
    return [
        cell,
        f"{len(found)} of {len(SEEDS)}",
        told([r["twin_gain"] for r in found if "twin_gain" in r], 3) if any("twin" in r for r in found) else "",
        told(shares(found, DEFAULT), 1) if any(map(has_share, found)) else ("" if found else NOT_YET),
        told(of_method(found, DEFAULT, "gain"), 4) if found else "",
        f"{lowest[0]:.4f} to {lowest[1]:.4f}" if lowest else "",
        told(of_method(found, DEFAULT, "evaluations"), 1) if found else "",
    ]


def merges_table(part: str, found: Sequence[Result], names: Sequence[str]) -> str:
    """Return each method's share in each cell, or its gain where there is no twin."""

    def cell_told(cell: str, name: str) -> str:
        here = [r for r in found if r["run"]["cell"] == cell and name in r["methods"]]
        if any(map(has_share, here)):
            return f"{told(shares(here, name))} %"
        return told(of_method(here, name, "gain"), 4) if here else ""

    return table(["", *names], [[cell, *(cell_told(cell, name) for name in names)] for cell in cells(part)])


def architectures_section(found: Sequence[Result]) -> list[str]:
    """Return the architectures' table."""
    names = list(dict.fromkeys(name for r in found for name in r["methods"]))
    rows = []
    for cell in ARCHITECTURES:
        here = [r for r in found if r["run"]["cell"] == cell]
        groups = ", ".join(here[0]["groups"]) or "none found: merged as by `decay`" if here else ""
        row = regime_row(cell, here)
        rows.append([row[0], groups, *row[1:]])
    return [
        "## Architectures",
        "",
        "Loss in nats, of the U-Net in squared error.",
        "",
        table(["model", "groups", "runs", "twin's gain", "share, %", "gain", "interval", "evaluations"], rows),
        "",
        *folded("Other merges", merges_table("architectures", found, names)),
    ]


def referees_section(found: Sequence[Result]) -> list[str]:
    """Return the referees' table."""
    names = [DEFAULT, REFINED, *REFEREES]
    return [
        "## Referees",
        "",
        f"On the 0.3M GPT's runs of 1,000 steps ({len(found)} of {len(SEEDS)}), in percent of the decay's gain. Below "
        "0, the referee's merge is worse than the latest weights.",
        "",
        table(
            ["average", "share, %", "on test files, %", "the default is ahead by", "evaluations"],
            [
                [
                    "**the default**" if name == DEFAULT else name,
                    told(shares(found, name), 1),
                    told(shares(found, name, "test"), 1),
                    with_interval([-d for d in against(found, name)])
                    if name != DEFAULT and shares(found, name)
                    else "",
                    told(of_method(found, name, "evaluations"), 1) if shares(found, name) else "",
                ]
                for name in names
            ],
        ),
        "",
        *(f"- *{name}*: {referee.source}." for name, referee in REFEREES.items()),
        "",
        "An EMA with a decay of 0.999 averages over a thousand steps, all of such a run: a default made for long runs. "
        "All choices are made on the search half.",
        "",
    ]


def verdicts_section(found: Sequence[Result]) -> list[str]:
    """Return how verdicts erred."""
    total = len(SEEDS)
    rows = []
    for kind, said, wanted in (
        ("latest", "at a constant rate's end", total * SPLITS_A_RUN // 2),
        ("twin", "after the decay", total * SPLITS_A_RUN // 2),
        ("noise", "snapshots that only carry noise", total * NOISES_A_RUN),
        (TAIL_NOISE, "the same, by the search of decayed runs", total * NOISES_A_RUN),
    ):
        here = decided(found, kind)
        accepted = [s for s in here if s["status"] == "accepted"]
        false = [s for s in accepted if s["true_gain"] <= 0]
        bounded = [s for s in here if s["interval"] is not None]
        rows.append(
            [
                said,
                f"{len(here)} of {wanted}" if here else NOT_YET,
                *(str(sum(s["status"] == status for s in here)) for status in ("accepted", "unconfirmed", "rejected")),
                proportion(len(false), len(accepted)),
                proportion(sum(map(covers, bounded)), len(bounded)),
            ]
        )
    redrawn = [
        [kind, str(r["run"]["seed"]), *(f"{100 * a / n:.1f} / {100 * b / n:.1f}" for a, b, n in r[key].values())]
        for r in found
        for kind in ("latest", "twin")
        if (key := f"{kind}, redrawn") in r
    ]
    batches = next((list(r["latest, redrawn"]) for r in found if "latest, redrawn" in r), [])
    return [
        "## Verdicts",
        "",
        "Searches of the default, each on another random split of unseen text; what a merge gains on a rest of eight "
        "confirmation halves is called its true gain. In brackets, Clopper and Pearson's 95 % interval.",
        "",
        table(
            [
                *("searches", "run", "accepted", "unconfirmed", "rejected"),
                *("accepted without a true gain, %", "intervals that hold the true gain, %"),
            ],
            rows,
        ),
        "",
        *(
            [
                "Accepted / rejected of merges *that gain nothing*, in percent of 2,000 draws; 2.5 / 2.5 is what a 95 "
                "% interval promises. The differences are those of a real search's winner, less their mean:",
                "",
                table(["merge", "seed", *(f"{b} batches" for b in batches)], redrawn),
                "",
            ]
            if redrawn
            else []
        ),
    ]


def proportion(num: int, total: int) -> str:
    """Return a share in percent with its interval."""
    if not total:
        return ""
    low, high = proportion_interval(num, total)
    return f"{100 * num / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def claims(found: Mapping[str, Sequence[Result]]) -> list[tuple[str, str]]:
    """Return the protocol's claims, and whether each holds so far."""
    ladder = found["ladder"]
    judge: list[tuple[str, Callable[[], str]]] = [
        (
            "it carries over sizes and lengths: each cell's median share is at least 95 %",
            lambda: cells_told(ladder, "ladder"),
        ),
        ("it does not fade: both slopes' intervals lie above -3 points a factor of ten", lambda: slopes_told(ladder)),
        ("it carries over regimes", lambda: cells_told(found["regimes"], "regimes")),
        ("it carries over architectures", lambda: cells_told(found["architectures"], "architectures")),
        ("it is worth a search: ahead of each referee", lambda: referees_told(found["referees"])),
        ("it is cheap: at most 6 evaluations", lambda: cost_told(ladder)),
        ("a verdict keeps its promise", lambda: promise_told(found["verdicts"])),
        ("it is honest about noise: none of the noise searches accepted", lambda: noise_told(found["verdicts"])),
    ]
    return [(claim, say()) for claim, say in judge]


def judged(holds: bool, num_runs: int, part: str) -> str:
    """Return whether a claim holds; before all its runs are measured, only how it looks."""
    if num_runs < len(runs(part)):
        return f"open, {num_runs} of {len(runs(part))} runs: {'met' if holds else 'not met'} so far"
    return "**holds**" if holds else "**fails**"


def cells_told(found: Sequence[Result], part: str) -> str:
    """Return which cells reach the target."""
    by_cell: dict[str, list[Result]] = {}
    for r in found:
        if DEFAULT in r["methods"]:
            by_cell.setdefault(r["run"]["cell"], []).append(r)
    if not by_cell:
        return NOT_YET
    failed = {cell: said for cell, here in by_cell.items() if (said := shortfall(here))}
    head = f"{len(by_cell) - len(failed)} of {len(by_cell)} cells measured, of {len(cells(part))}"
    missing = "; not " + ", ".join(f"{cell} ({said})" for cell, said in failed.items()) if failed else ""
    return f"{judged(not failed, sum(map(len, by_cell.values())), part)}: {head}{missing}"


def shortfall(here: Sequence[Result]) -> str:
    """Return by what a cell misses the target, if it does."""
    if any(map(has_share, here)):
        middle = median(shares(here, DEFAULT))
        return f"{middle:.1f} %" if middle < TARGET_SHARE else ""
    losing = [r for r in here if (i := r["methods"][DEFAULT]["interval"]) is not None and i[1] < 0]
    return f"{len(losing)} runs lose" if losing else ""


def slopes_told(found: Sequence[Result]) -> str:
    """Return whether the trend rules a decline out."""
    plane = fitted(found)
    if plane is None:
        return NOT_YET
    size, steps = (slope.interval[0] for slope in plane.slopes_D)
    holds = min(size, steps) > TARGET_SLOPE
    return f"{judged(holds, plane.num_runs, 'ladder')}: lower ends {size:+.1f} (parameters) and {steps:+.1f} (steps)"


def referees_told(found: Sequence[Result]) -> str:
    """Return which referees win."""
    ahead = {name: median(d) for name in REFEREES if (d := against(found, name))}
    if not ahead:
        return NOT_YET
    winning = {name: d for name, d in ahead.items() if d >= 0}
    if winning:
        return f"{judged(False, len(found), 'referees')}: behind " + ", ".join(
            f"{name} by {d:.1f} points" for name, d in winning.items()
        )
    nearest = max(ahead, key=ahead.__getitem__)
    whole = len(ahead) == len(REFEREES)
    told_so = judged(True, len(found) if whole else 0, "referees")
    return f"{told_so}: ahead of {len(ahead)}, of the best, {nearest}, by {-ahead[nearest]:.1f} points"


def cost_told(found: Sequence[Result]) -> str:
    """Return whether it is cheap."""
    spent = of_method(found, DEFAULT, "evaluations")
    if not spent:
        return NOT_YET
    return f"{judged(median(spent) <= TARGET_EVALUATIONS, len(spent), 'ladder')}: {told(spent, 1)}"


def promise_told(found: Sequence[Result]) -> str:
    """Return whether verdicts over random splits keep their promise."""
    here = [*decided(found, "latest"), *decided(found, "twin")]
    accepted = [s for s in here if s["status"] == "accepted"]
    with_intervals = [s for s in here if s["interval"] is not None]
    if not here:
        return NOT_YET
    false, held = sum(s["true_gain"] <= 0 for s in accepted), sum(map(covers, with_intervals))
    holds = false <= 0.025 * len(accepted) and proportion_interval(held, len(with_intervals))[1] >= 0.95
    return (
        f"{judged(holds, whole_runs(found, 'latest', 'twin'), 'verdicts')}: {false} of {len(accepted)} accepted "
        f"without a true gain; "
        f"{held} of {len(with_intervals)} intervals hold the true gain"
    )


def noise_told(found: Sequence[Result]) -> str:
    """Return how many noise searches were accepted."""
    here, near = decided(found, "noise"), decided(found, TAIL_NOISE)
    if not here:
        return NOT_YET
    num, num_near = (sum(s["status"] == "accepted" for s in kind) for kind in (here, near))
    state = judged(not num + num_near, whole_runs(found, "noise", TAIL_NOISE), "verdicts")
    return f"{state}: {num} of {len(here)}, and {num_near} of {len(near)} by the search of decayed runs"


def whole_runs(found: Sequence[Result], *kinds: str) -> int:
    """Return on how many runs all searches of these kinds have run."""
    wanted = {"latest": SPLITS_A_RUN // 2, "twin": SPLITS_A_RUN // 2, "noise": NOISES_A_RUN, TAIL_NOISE: NOISES_A_RUN}
    return sum(all(len(r.get(kind, [])) >= wanted[kind] for kind in kinds) for r in found)


if __name__ == "__main__":
    main()
