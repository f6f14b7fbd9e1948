"""The page of an ensemble."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ckmerge.report.account_charts import draw_forest
from lightning_ckmerge.report.html import render_page
from lightning_ckmerge.report.text import MISSING, count, date, gain_text, number, seconds, size

BADGES = {
    "accepted": "Ensemble helps",
    "unconfirmed": "Unconfirmed",
    "rejected": "One model is enough",
}
NAMES = {
    "latest": "Latest weights",
    "merge": "Single merge",
    "snapshots": "Ensemble of checkpoints",
    "ensemble": "Ensemble",
}
AVERAGED = {
    "probabilities": "Probabilities, summed in log space",
    "logits": "Logits",
    "outputs": "Outputs",
}
# Scores beside the loss, where targets are classes.
OTHERS = {"accuracy": "Accuracy", "calibration_error": "Calibration error", "brier": "Brier score"}
MOST_NAMED = 6
LOAD = """\
from lightning_ckmerge import load_ensemble

ensemble = load_ensemble({directory}, module)  # the LightningModule that was trained
trainer.validate(ensemble, val_loader)"""

Ensemble = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of the comparison."""

    name: str
    members: str
    passes: str
    loss: str
    over_merge: str
    over_latest: str
    others: list[str]
    weights: str
    time: str
    is_ours: bool


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model that predicts."""

    name: str
    recipe: str
    weight: str
    loss: str
    disagreement: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The steps of one greedy choice: place, model, loss so far, and the share by which the model lowers it."""

    title: str
    steps: list[tuple[str, str, str, str]]
    ending: str


@dataclass(frozen=True, kw_only=True)
class EnsembleView:
    """Everything that the page shows but its chart; texts, unescaped."""

    title: str
    status: str
    badge: str
    sentence: str
    facts: list[tuple[str, str]]
    advice: str
    code: str
    date: str
    run: str
    notes: list[str]
    contenders: list[Contender]
    scores: list[str]
    members: list[Member]
    choices: list[Choice]
    pool: list[tuple[str, str, str, bool]]
    evaluation: list[tuple[str, str]]
    software: list[tuple[str, str]]
    up: None = None


def render_ensemble_html(manifest: Ensemble, directory: str) -> str:
    """Return an ensemble's page: escaped, self-contained, for light, dark, paper and small screens.

    Args:
        manifest: The content of ``ensemble.json``; ``files`` may still lack the page.
        directory: Where the ensemble will lie, for the code to load it.
    """
    others = [c for c in manifest["comparison"] if c["name"] != "latest" and "gain_over_latest" in c]
    gains = {
        c["name"]: (gain, ends) for c in others for gain, ends in [_gain_of(c, "gain_over_latest")] if gain is not None
    }
    return render_page(
        "ensemble.html.j2",
        view=build_ensemble_view(manifest, directory),
        no_code="",
        up_text="",
        disagreement=_disagreement_told(manifest["averaging"]),
        gains=draw_forest(list(gains), [[found] for found in gains.values()]) if gains else None,
    )


def build_ensemble_view(manifest: Ensemble, directory: str) -> EnsembleView:
    """Return what the page of an ensemble says; the arguments are those of ``render_ensemble_html``."""
    verdict, comparison = manifest["verdict"], {c["name"]: c for c in manifest["comparison"]}
    selection = manifest.get("selection", {})
    members = manifest["members"]
    names = {m["name"] for m in members}
    kind = f"An ensemble of {len(members)} models" if len(members) > 1 else "An ensemble of one model"
    step = manifest.get("step")
    return EnsembleView(
        title=kind if step is None else f"{kind} at step {count(step)}",
        status=verdict["status"],
        badge=BADGES[verdict["status"]],
        sentence=verdict["sentence"],
        facts=_facts(manifest, comparison),
        advice=_advice(manifest, comparison),
        code=LOAD.format(directory=json.dumps(directory, ensure_ascii=False)),
        date=date(manifest.get("created")),
        run="",
        notes=list(verdict.get("notes", ())),
        contenders=[_contender(c) for c in manifest["comparison"]],
        scores=[title for key, title in OTHERS.items() if any(key in c for c in manifest["comparison"])],
        members=[
            Member(
                name=m["name"],
                recipe=_recipe(m, manifest.get("snapshots", ())),
                weight=number(m["weight"], ".3f"),
                loss=number(m.get("loss")),
                disagreement=_disagreement(m.get("disagreement_with_merge")),
            )
            for m in members
        ],
        choices=[
            _choice(title, selection[key])
            for key, title in (("ensemble", "the ensemble"), ("snapshots", "checkpoints alone"))
            if key in selection
        ],
        pool=[
            (
                p["name"],
                number(p["loss"]),
                _disagreement(p["disagreement_with_merge"]),
                p["name"] in names,
            )
            for p in sorted(selection.get("pool", ()), key=lambda p: (p["loss"] is None, p["loss"]))
        ],
        evaluation=_evaluation(manifest),
        software=[(name, version or MISSING) for name, version in manifest["software"].items()],
    )


def _facts(manifest: Ensemble, comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    verdict = manifest["verdict"]
    shown = ("latest", "merge", "ensemble")
    losses = [(f"{NAMES[n]}, loss", number(comparison[n]["loss"])) for n in shown if n in comparison]
    gain = MISSING if len(manifest["members"]) == 1 else gain_text(verdict["gain"], verdict["interval"])
    return [
        *losses,
        ("Gain over the merge, 95 % interval", gain),
        ("Forward passes for a prediction", count(len(manifest["members"]))),
    ]


def _advice(manifest: Ensemble, comparison: Mapping[str, Any]) -> str:
    """Return when the ensemble is worth its passes, by what was measured and no more."""
    status, passes = manifest["verdict"]["status"], len(manifest["members"])
    if passes == 1:
        return (
            "Use the one model, at one forward pass. More snapshots, or ones further apart, may differ enough for an "
            "ensemble; `min_gain=0` builds one of the least gain."
        )
    told = {
        "accepted": f"Worth its {passes} forward passes where this gain is worth {passes} times the cost of a "
        "prediction: the interval of the gain over the single merge lies above 0.",
        "unconfirmed": f"Not shown to be worth its {passes} forward passes: the gain over the single merge may be "
        "chance. Use the merge, or judge both on more batches.",
        "rejected": f"Not worth its {passes} forward passes: the single merge, at one, is as good or better.",
    }[status]
    told += _calibration_told(comparison)
    snapshots = comparison.get("snapshots")
    ours = comparison.get("ensemble")
    if snapshots and ours and _is_lower(snapshots["loss"], ours["loss"]) and snapshots["forward_passes"] > 1:
        told += (
            f" An ensemble of {snapshots['forward_passes']} checkpoints has a loss lower by "
            f"{number(ours['loss'] - snapshots['loss'], '.2g')} on these batches, of which no interval was taken; "
            "`pool_size=1` builds an ensemble of fewer merges."
        )
    return told


def _calibration_told(comparison: Mapping[str, Any]) -> str:
    found = comparison.get("ensemble", {})
    merge, ours = (c.get("calibration_error") for c in (comparison.get("merge", {}), found))
    if merge is None or ours is None:
        return ""
    ends = f"from {number(merge, '.4f')} to {number(ours, '.4f')}"
    told = f" The calibration error {'falls' if ours < merge else 'rises'} {ends}" if ours != merge else ""
    brier = found.get("gain_over_merge", {}).get("brier")
    if told and brier and brier["interval"]:
        told += f", which has no interval; the Brier score, which has one, gains {gain_text(**brier)}"
    return told and f"{told}."


def _is_lower(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and first < second


def _contender(found: Mapping[str, Any]) -> Contender:
    members = found.get("members", [])
    more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
    return Contender(
        name=NAMES.get(found["name"], found["name"]),
        members="" if found["name"] == "latest" else ", ".join(members[:MOST_NAMED]) + more,
        passes=count(found["forward_passes"]),
        loss=number(found["loss"]),
        over_merge=_gain(found, "gain_over_merge", "merge"),
        over_latest=_gain(found, "gain_over_latest", "latest"),
        others=[number(found[key], ".4f") for key in OTHERS if key in found],
        weights=size(found["weight_bytes"]) if "weight_bytes" in found else MISSING,
        time=_duration(found["seconds"]) if "seconds" in found else MISSING,
        is_ours=found["name"] == "ensemble",
    )


def _duration(value: float) -> str:
    return seconds(value) if value >= 1 else f"{1000 * value:.0f} ms"


def _gain_of(found: Mapping[str, Any], over: str) -> tuple[float | None, list[float] | None]:
    gain = found[over]["loss"]
    return gain["gain"], gain["interval"]


def _gain(found: Mapping[str, Any], over: str, itself: str) -> str:
    return MISSING if found["name"] == itself or over not in found else gain_text(*_gain_of(found, over))


def _recipe(member: Mapping[str, Any], snapshots: Sequence[Mapping[str, Any]]) -> str:
    """Return how a member was made: its largest coefficients, by the snapshots' last steps."""
    if "artifact" in member:
        return f"published at step {count(member['step'])}"
    if "groups" in member:
        return f"coefficients for each of {len(member['groups'])} groups of tensors"
    parts = [(c, s["last_step"]) for c, s in zip(member.get("coefficients", ()), snapshots, strict=False) if abs(c) > 0]
    if len(parts) == 1:
        return f"the weights of step {count(parts[0][1])}"
    largest = sorted(parts, key=lambda part: -abs(part[0]))[:MOST_NAMED]
    told = ", ".join(f"{number(c, '.2f')} of {count(step)}" for c, step in sorted(largest, key=lambda part: part[1]))
    more = f" and {len(parts) - len(largest)} more" if len(parts) > len(largest) else ""
    return told + more


def _choice(title: str, found: Mapping[str, Any]) -> Choice:
    chosen, rows, before = found["chosen"], [], None
    for place, step in enumerate(chosen, start=1):
        loss = step["loss_so_far"]
        lower = f"{100 * (before - loss) / abs(before):.2f} %" if before and loss is not None else MISSING
        rows.append((str(place), step["name"], number(loss), lower))
        before = loss
    ending = ""
    if len(chosen) > 1:
        trials = found["weight_trials"]
        ending = (
            f"With the best weights of {trials} trials the loss on the search half is {number(found['loss'])}."
            if trials
            else f"With equal weights the loss on the search half is {number(found['loss'])}."
        )
    return Choice(title=title, steps=rows, ending=ending)


def _disagreement(value: float | None) -> str:
    return MISSING if value is None else number(100 * value, ".3g") + " %"


def _disagreement_told(averaging: str) -> str:
    if averaging == "outputs":
        return "the mean squared difference from the single merge's outputs, as a share of the model's loss"
    return "the share of samples that the model and the single merge see differently"


def _evaluation(manifest: Ensemble) -> list[tuple[str, str]]:
    rows = [("What is averaged", AVERAGED[manifest["averaging"]])]
    if manifest.get("predict"):
        rows.append(("Outputs and targets by", manifest["predict"]))
    if "monitor" in manifest:
        rows.append(("Metric that led the search for merges", manifest["monitor"]))
    rows.append(("Unseen batches that judge", count(manifest["verdict"].get("num_differences", 0))))
    if "selection" in manifest:
        rows += [("Rule of the choice", manifest["selection"]["rule"]), ("Source", manifest["selection"]["source"])]
    return rows
