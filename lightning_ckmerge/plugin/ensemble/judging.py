"""Whether an ensemble is worth its cost, in words. All numbers stand in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ckmerge.core.outcome import Status
from lightning_ckmerge.core.wording import change_told, value_told
from lightning_ckmerge.plugin.ensemble.figures import Figures
from lightning_ckmerge.search.interval import MIN_CONFIRM_BATCHES, score_gain


def judge(figures: Mapping[str, Figures], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the verdict: whether the ensemble beats the single merge on the confirmation half, by its loss.

    ``accepted``: the 95 % interval of the gain lies above 0. ``unconfirmed``: it contains 0, or does not exist.
    ``rejected``: it lies below 0, or the ensemble has one member.

    Args:
        figures: Of ``latest``, ``merge``, ``snapshots`` and ``ensemble``.
        notes: What else people should know.
    """
    ensemble, merge, latest, snapshots = (figures[n] for n in ("ensemble", "merge", "latest", "snapshots"))
    ours, theirs = ensemble.scores["loss"], merge.scores["loss"]
    is_merge = ensemble.members == merge.members
    gain, interval = (0.0, None) if is_merge else score_gain(ours, theirs, 1)
    status: Status = "unconfirmed"
    is_single = ensemble.forward_passes == 1
    if is_single or (interval is not None and interval[1] < 0):
        status = "rejected"
    elif interval is not None and interval[0] > 0:
        status = "accepted"
    if is_single:
        which = "The single merge" if is_merge else f"A single model, {ensemble.members[0]},"
        sentence = f"{which} has it already: no second member lowers the loss on the search half enough."
    else:
        told, ends = change_told("loss", "min", theirs.value, ours.value, interval)
        ends = f"; 95 % interval {ends}" if ends else f"; under {MIN_CONFIRM_BATCHES} batches there is no interval"
        opening = {
            "accepted": "An ensemble",
            "unconfirmed": "Unconfirmed: an ensemble",
            "rejected": "The single merge is as good or better: an ensemble",
        }[status]
        sentence = (
            f"{opening} of {ensemble.forward_passes} {told}{ends}, on {len(ours.values_B or ())} unseen batches, at "
            f"{ensemble.forward_passes} forward passes for one."
        )
        sentence += _share(latest, merge, ensemble)
    sentence += (
        f" An ensemble of {snapshots.forward_passes} checkpoints as they are comes to "
        f"{value_told(snapshots.scores['loss'].value)}."
    )
    return {
        "status": status,
        "gain": gain,
        "interval": list(interval) if interval else None,
        "num_differences": len(ours.values_B or ()),
        "sentence": sentence,
        "notes": list(notes),
    }


def _share(latest: Figures, merge: Figures, ensemble: Figures) -> str:
    """How much of the ensemble's gain over the latest weights the merge has, where both gain."""
    before, single, both = (f.scores["loss"].value for f in (latest, merge, ensemble))
    if not (both < before and single < before and both < single):
        return ""
    return (
        f" The merge alone has {100 * (before - single) / (before - both):.0f} % of its gain over the latest weights."
    )
