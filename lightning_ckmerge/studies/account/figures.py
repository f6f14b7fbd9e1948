"""The figures of an account: what to score for each, and what its values mean, in one sentence.

Letters: K snapshots, oldest first, the last one being the latest weights; T places on the line; N by M on the plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.wording import value_told
from lightning_ckmerge.search.interval import score_gain
from lightning_ckmerge.studies.account.agreement import Agreement
from lightning_ckmerge.studies.account.curvature import Curvature
from lightning_ckmerge.studies.account.places import Cell, Geometry, Places, Plane, Rows, make_plane, mixed

Figure = dict[str, Any]
Scores = Mapping[str, Score]
# Beyond the merge as far again, and before the latest weights half as far.
LINE = tuple(i / 4 for i in range(-2, 9))
GRID = 7
# How far a group goes from the latest weights to the merge.
SHARES = (0.5, 1.0)
LATEST, MERGE = "latest", "merge"


@dataclass(frozen=True, kw_only=True)
class Section:
    """What one figure needs to be scored.

    Args:
        key: The figure's.
        places: Name -> mixture; the latest weights and the merge are scored in any case.
        left_out: Why there is nothing to score; ``None`` if there is.
    """

    key: str
    places: dict[str, Rows]
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """On what was measured, for the sentences.

    Args:
        monitor: The metric.
        mode: Its direction.
        half: The half of the validation batches.
        num_batches: How many of them.
    """

    monitor: str
    mode: Literal["min", "max"]
    half: Literal["search", "confirm"]
    num_batches: int

    @property
    def where(self) -> str:
        """On which batches, in words."""
        name = "search" if self.half == "search" else "confirmation"
        return f"on {self.num_batches} batches of the {name} half"

    def gain(self, ours: Score, theirs: Score, num_intervals: int = 1) -> tuple[float, list[float] | None]:
        """Return how much better ``ours`` is, above 0 for better, with an interval where there are enough batches."""
        gain, interval = score_gain(ours, theirs, sign_of(self.mode), num_intervals=num_intervals)
        return gain, list(interval) if interval is not None else None

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is better than another."""
        return sign_of(self.mode) * (other - value) > 0


def snapshots_section(places: Places) -> Section:
    """Return the merge without each kept snapshot that counts."""
    found = {f"without-{k}": places.without(k) for k in places.kept if places.counts(k)}
    scored = {name: rows for name, rows in found.items() if rows is not None}
    reason = None
    if not scored:
        reason = (
            "The merge is one snapshot alone: without it nothing is left."
            if found
            else "None of the snapshots that count is kept any longer."
        )
    return Section(key="snapshots", places=scored, left_out=reason)


def parts_section(places: Places, key: Literal["groups", "layers"]) -> Section:
    """Return the latest weights with each group or layer from the merge, and the merge with each from the latest."""
    found: dict[str, Rows] = {}
    names = part_names(places, key)
    if len(names) < 2:
        told = "kind, so that groups" if key == "groups" else "layer, so that layers"
        return Section(key=key, places={}, left_out=f"The tensors are all of one {told} cannot be told apart.")
    for name in names:
        chosen = _chooser(key, name)
        for share in SHARES:
            found[f"{key}-{name}-{share:g}"] = places.swapped(places.latest(), places.merge(), chosen, share)
        found[f"{key}-{name}-without"] = places.swapped(places.merge(), places.latest(), chosen)
    return Section(key=key, places=found)


def part_names(places: Places, key: Literal["groups", "layers"]) -> list[str]:
    """Return the groups or layers that the model has, in the order of its tensors."""
    return list(dict.fromkeys(_part(cell, key) for cell in places.cells.values()))


def line_section(places: Places) -> Section:
    """Return places on the line through the latest weights and the merge."""
    latest, merge = places.latest(), places.merge()
    rows = {f"line-{t:g}": mixed([(1 - t, latest), (t, merge)]) for t in LINE if t not in (0, 1)}
    return Section(key="line", places=rows)


def plane_section(places: Places, geometry: Geometry, size: int = GRID) -> tuple[Section, Plane | None]:
    """Return a grid on the plane through the latest weights, the merge and the mean of the kept snapshots."""
    plane = make_plane(places.latest(), places.merge(), places.mean(), geometry)
    if plane is None:
        reason = "Fewer than two snapshots are kept, so that their mean is no third point."
        if len(places.kept) > 1:
            reason = "The latest weights, the mean of the kept snapshots and the merge lie on one line: see the line."
        return Section(key="plane", places={}, left_out=reason), None
    xs, ys = plane.grid(size)
    found = {f"plane-{i}-{j}": plane.at(x, y) for j, y in enumerate(ys) for i, x in enumerate(xs)}
    return Section(key="plane", places={**found, "mean": places.mean()}), plane


def fit_budget(sections: Sequence[Section], max_evaluations: int | None) -> tuple[list[Section], int]:
    """Return the sections, those left out that do not fit, and the number of evaluations, two of which always are.

    Args:
        sections: The most telling first: it gets its evaluations before the next one.
        max_evaluations: Most evaluations; ``None``: no limit.
    """
    used = 2
    fitted = []
    for section in sections:
        needed = len(section.places)
        if max_evaluations is not None and needed and used + needed > max_evaluations:
            left = max(0, max_evaluations - used)
            reason = f"It takes {needed} evaluations, and `max_evaluations` of {max_evaluations} leaves {left}."
            section = Section(key=section.key, places={}, left_out=reason)
        used += len(section.places)
        fitted.append(section)
    return fitted, used


def snapshots_figure(
    places: Places, scores: Scores, measured: Measured, snapshots: Sequence[Mapping[str, Any]]
) -> Figure:
    """Return the contribution of each snapshot: how much worse the merge is without it.

    Args:
        places: The mixtures.
        scores: Of the merge, and of ``without-K`` for those that were scored.
        measured: On what.
        snapshots: The manifest's, K of them.
    """
    scored = [k for k in range(len(snapshots)) if f"without-{k}" in scores]
    rows = []
    for k, snapshot in enumerate(snapshots):
        cs = [cell.c_K[k] for cell in places.cells.values()]
        row: dict[str, Any] = {
            "first_step": snapshot["first_step"],
            "last_step": snapshot["last_step"],
            "kind": snapshot["kind"],
            "is_latest": k == len(snapshots) - 1,
            "coefficients": [min(cs), max(cs)],
            "kept": k in places.kept,
            "value": None,
            "gain": None if any(cs) else 0.0,
            "interval": None,
        }
        if k in scored:
            score = scores[f"without-{k}"]
            gain, interval = measured.gain(scores[MERGE], score, len(scored))
            row |= {"value": score.value, "gain": gain, "interval": interval}
        rows.append(row)
    known = [row for row in rows if row["value"] is not None]
    worst = max(known, key=lambda row: row["gain"])
    certain = [row for row in known if row["interval"] and row["interval"][0] > 0]
    harmful = [row for row in known if row["interval"] and row["interval"][1] < 0]
    sentence = (
        f"Without {_named(worst)} the merge's {measured.monitor} is {_worse_by(worst['gain'])}{_interval(worst)} "
        f"{measured.where}, its share dealt out to the other snapshots in proportion; "
        f"{_certainty(known, certain, harmful)}."
    )
    if gone := [row for row in rows if not row["kept"] and any(row["coefficients"])]:
        sentence += f" {_counted(len(gone), 'snapshot')} of the merge had rotated out of the buffer and could not be"
        sentence += " left out."
    return {"sentence": sentence, "rows": rows}


def parts_figure(
    places: Places, scores: Scores, measured: Measured, key: Literal["groups", "layers"], geometry: Geometry
) -> Figure:
    """Return the contribution of each group or layer, alone and as what is lacking.

    Args:
        places: The mixtures.
        scores: Of all that ``parts_section`` names.
        measured: On what.
        key: Which parts.
        geometry: For the share of the way from the latest weights to the merge that lies within a part.
    """
    latest, merge = places.latest(), places.merge()
    total, whole = measured.gain(scores[MERGE], scores[LATEST])[0], geometry.distance(merge, latest) ** 2
    names = part_names(places, key)
    rows: list[dict[str, Any]] = []
    for name in names:
        chosen = _chooser(key, name)
        keys = [k for k, cell in places.cells.items() if chosen(cell)]
        gains = [measured.gain(scores[f"{key}-{name}-{share:g}"], scores[LATEST], len(names)) for share in SHARES]
        without, without_interval = measured.gain(scores[MERGE], scores[f"{key}-{name}-without"], len(names))
        rows.append(
            {
                "name": name,
                "num_tensors": sum(cell.num_tensors for cell in places.cells.values() if chosen(cell)),
                "way": geometry.distance(merge, latest, keys) ** 2 / whole if whole else 0.0,
                "half_way": gains[0][0],
                "alone": gains[1][0],
                "alone_interval": gains[1][1],
                "without": without,
                "without_interval": without_interval,
            }
        )
    best = max(rows, key=lambda row: row["alone"])
    dearest = max(rows, key=lambda row: row["without"])
    summed = sum(row["alone"] for row in rows)
    noun = key[:-1]
    of_all = f", of {_amount(total)} by all together" if total > 0 else f"; all together {_changed_by(total)}"
    sentence = (
        f"Taken from the merge alone, the {noun} that helps most is {_part_told(best['name'])}: "
        f"{measured.monitor} is {_better_by(best['alone'])} {measured.where}{of_all}; put back to latest alone, the "
        f"one that costs most is {_part_told(dearest['name'])}, by {_amount(dearest['without'])}."
    )
    if total > 0:
        sentence += f" The {key} alone add up to {100 * summed / total:.0f} % of the whole gain: "
        sentence += "they would add up to 100 % if they did not act on each other."
    return {"sentence": sentence, "rows": rows, "gain": total, "sum": summed}


def line_figure(places: Places, scores: Scores, measured: Measured, geometry: Geometry) -> Figure:
    """Return the metric along the line from the latest weights (0) to the merge (1) and beyond, and its barrier.

    Source:
        Frankle et al. 2020, arXiv:1912.05671: the barrier is how far the loss rises above the straight line between
        its ends.
    """
    ends = {0: scores[LATEST], 1: scores[MERGE]}
    values = [(ends[int(t)] if t in ends else scores[f"line-{t:g}"]).value for t in LINE]
    latest, merge = scores[LATEST].value, scores[MERGE].value
    sign = sign_of(measured.mode)
    inner = [(t, sign * (v - ((1 - t) * latest + t * merge))) for t, v in zip(LINE, values, strict=True) if 0 < t < 1]
    at, barrier = max(inner, key=lambda pair: pair[1])
    finite = [(t, v) for t, v in zip(LINE, values, strict=True) if math.isfinite(v)]
    best_t, best = min(finite, key=lambda pair: sign * pair[1])
    told = (
        f"there is no barrier: at none of the {len(inner)} places between them is {measured.monitor} worse than on the "
        "straight line between its ends"
        if barrier <= 0
        else f"there is a barrier of {_amount(barrier)} at {at:g}, above the straight line between the ends"
    )
    where = "the merge" if best_t == 1 else f"{best_t:g}"
    against = "" if best_t == 1 else f" against {value_told(merge)} at the merge"
    sentence = (
        f"On the line from the latest weights (0) to the merge (1) {told}; the best of {len(LINE)} places is {where}, "
        f"with {value_told(best)}{against}, {measured.where}."
    )
    return {
        "sentence": sentence,
        "places": list(LINE),
        "values": [v if math.isfinite(v) else None for v in values],
        "barrier": max(0.0, barrier),
        "best": best_t,
        "distance": geometry.distance(places.merge(), places.latest()),
    }


def plane_figure(
    plane: Plane, places: Places, scores: Scores, measured: Measured, num_snapshots: int, size: int = GRID
) -> Figure:
    """Return the metric on the plane, row by row from below, with the three corners' places and values."""
    xs, ys = plane.grid(size)
    rows = [[scores[f"plane-{i}-{j}"].value for i in range(size)] for j in range(size)]
    sign = sign_of(measured.mode)
    found = [(v, x, y) for y, row in zip(ys, rows, strict=True) for x, v in zip(xs, row, strict=True)]
    best, x, y = min((f for f in found if math.isfinite(f[0])), key=lambda f: sign * f[0])
    corners = dict(zip(("latest", "merge", "mean"), plane.corners, strict=True))
    values = {"latest": scores[LATEST].value, "merge": scores[MERGE].value, "mean": scores["mean"].value}
    away, whole = math.dist((x, y), corners["merge"]), corners["merge"][0]
    of_grid = "no better than the merge" if not measured.is_better(best, values["merge"]) else "better than the merge"
    kept = len(places.kept)
    mean = f"all {kept} snapshots" if kept == num_snapshots else f"the {kept} of {num_snapshots} snapshots still kept"
    sentence = (
        f"On the plane through the latest weights, the merge and the mean of {mean}, the best of {size} by {size} "
        f"places has {measured.monitor} {value_told(best)}, {of_grid} ({value_told(values['merge'])}), and lies "
        f"{away / whole:.2g} times the distance between latest and merge away from it, {measured.where}."
    )
    return {
        "sentence": sentence,
        "x": xs,
        "y": ys,
        "values": [[v if math.isfinite(v) else None for v in row] for row in rows],
        "corners": {name: {"x": px, "y": py, "value": values[name]} for name, (px, py) in corners.items()},
        "mean_of": kept,
    }


def curvature_figure(latest: Curvature, merge: Curvature, measured: Measured, num_batches: int) -> Figure:
    """Return the loss's curvature at the latest weights and at the merge."""
    trace = f"the Hessian's trace goes from {_estimate(latest)} to {_estimate(merge)}"
    if latest.top is not None and merge.top is not None:
        factor = merge.top / latest.top if latest.top > 0 and merge.top > 0 else None
        times = f", {factor:.2g} times as much" if factor is not None else ""
        told = f"the Hessian's largest eigenvalue goes from {latest.top:.3g} to {merge.top:.3g}{times}, and its "
        told += trace.removeprefix("the Hessian's ")
    else:
        told = f"{trace}, and Lanczos' method came to no largest eigenvalue"
    batches = "the first batch" if num_batches == 1 else f"the first {num_batches} batches"
    half = measured.where.partition(" of ")[2]
    sentence = (
        f"From the latest weights to the merge {told}, of {measured.monitor} on {batches} of {half}; smaller is a "
        "flatter place in these coordinates, which alone is no proof that it generalises better."
    )
    return {
        "sentence": sentence,
        "num_batches": num_batches,
        **{name: dict(vars(c)) for name, c in (("latest", latest), ("merge", merge))},
    }


def agreement_figure(found: Agreement, measured: Measured) -> Figure:
    """Return how the predictions of the latest weights and of the merge compare."""
    told = f"Latest weights and merge predict the same for {100 * found.same:.1f} % of {found.num} predictions"
    if found.won is None or found.lost is None:
        sentence = f"{told} {measured.where}; which of the others are right is not known without labels."
    else:
        net = found.won - found.lost
        share = 100 * abs(net) / found.num
        change = f"{share:.2g} % {'more' if net > 0 else 'fewer'} are right" if net else "as many are right"
        sentence = (
            f"{told} {measured.where}; the merge puts {found.won} right that latest has wrong, and {found.lost} the "
            f"other way, so that {change} (sign test, predictions taken for independent: p = {found.p_value:.2g})."
        )
    return {"sentence": sentence, **vars(found)}


def importances_figure(shares: Mapping[str, float], num_scored: int, num_estimates: int) -> Figure:
    """Return the coordinates' importances."""
    first = next(iter(shares))
    early = f", {num_estimates} of them dropped early and known by an estimate" if num_estimates else ""
    sentence = (
        f"Of the coordinates, {first} explains {100 * shares[first]:.0f} % of the differences between the "
        f"{num_scored} candidates that the search scored in its space{early}: a random forest's account of the search "
        "half (fANOVA), of the region that was tried, which few candidates make a rough one."
    )
    return {"sentence": sentence, "shares": dict(shares), "num_candidates": num_scored}


def stability_figure(rows: Sequence[Mapping[str, Any]], num_gone: int) -> Figure:
    """Return how the coefficients changed from search to search.

    Args:
        rows: A search each, oldest first; at least two.
        num_gone: Searches whose artifact is gone.
    """
    shifts = [row["shift"] for row in rows if row["shift"] is not None]
    shares = [row["age_share"] for row in rows]
    sentence = (
        f"Over {len(rows)} searches the merge's mean age lay between {_percent(min(shares))} and "
        f"{_percent(max(shares))} of the steps trained by then, and from one search to the next its coefficients moved "
        f"by {_percent(sum(shifts) / len(shifts))} of the run on average, at most {_percent(max(shifts))}"
    )
    sentence += f"; {_counted(num_gone, 'further search')} left no manifest." if num_gone else "."
    return {"sentence": sentence, "rows": [dict(row) for row in rows]}


def _chooser(key: str, name: str) -> Callable[[Cell], bool]:
    return lambda cell: _part(cell, key) == name


def _part(cell: Cell, key: str) -> str:
    return cell.group if key == "groups" else cell.layer


def _part_told(name: str) -> str:
    return "what lies outside layers" if name.startswith("outside") else name


def _named(row: Mapping[str, Any]) -> str:
    if row["is_latest"]:
        name = "the latest weights"
    elif row["first_step"] == row["last_step"] or row["kind"] == "point":
        name = f"the snapshot of step {row['last_step']}"
    else:
        name = f"the snapshot of steps {row['first_step']}-{row['last_step']}"
    low, high = row["coefficients"]
    c = f"coefficient {low:.3g}" if low == high else f"coefficients {low:.3g} to {high:.3g} by group"
    return f"{name} ({c})"


def _interval(row: Mapping[str, Any]) -> str:
    return " ({:.2g} to {:.2g})".format(*row["interval"]) if row["interval"] else ""


def _certainty(known: Sequence[Mapping[str, Any]], certain: Sequence[Any], harmful: Sequence[Mapping[str, Any]]) -> str:
    if not any(row["interval"] for row in known):
        return "there are too few batches for intervals"
    told = f"{len(certain)} of {len(known)} snapshots that count are certain to help (95 %, for all together)"
    return told + (f", {len(harmful)} to harm" if harmful else "")


def _amount(value: float) -> str:
    return f"{abs(value):.2g}"


def _worse_by(gain: float) -> str:
    return f"worse by {_amount(gain)}" if gain > 0 else f"better by {_amount(gain)}" if gain < 0 else "the same"


def _better_by(gain: float) -> str:
    return _worse_by(-gain)


def _changed_by(gain: float) -> str:
    return f"make it {_worse_by(-gain)}" if gain else "leave it as it is"


def _estimate(c: Curvature) -> str:
    return f"{c.trace:.3g}" + (f" (standard error {c.trace_error:.2g})" if c.trace_error else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _counted(num: int, noun: str) -> str:
    return f"{num} {noun}" + ("" if num == 1 else "es" if noun.endswith("ch") else "s")
