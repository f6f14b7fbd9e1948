"""What a run will spend, said once at its start."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.core.groups import describe_groups
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.spaces import Space
from lightning_ckmerge.plugin.loaders import Split, limited
from lightning_ckmerge.plugin.schedule import NUM_SEARCHES
from lightning_ckmerge.report.text import size
from lightning_ckmerge.search.anchors import most_anchors
from lightning_ckmerge.search.engine import most_confirmed
from lightning_ckmerge.search.refine import MAX_EVALUATIONS

if TYPE_CHECKING:
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback

# A backward pass takes about twice as long as a forward pass.
FORWARDS_PER_TRAINING_BATCH = 3


def render_plan(
    callback: CheckpointMergeCallback,
    trainer: Trainer,
    buffer: RollingBuffer,
    layout: TensorLayout,
    space: Space,
    total_steps: int | None,
    dirpath: Path,
    *,
    merged: Collection[str] | None = None,
) -> str:
    """Return the plan as a few lines of text: buffer, evaluations, expected share of the training time.

    ``merged`` names the tensors of ``layout`` that are buffered, where the frozen base of adapters is not.
    """
    config = callback.buffer
    each = f" on each of {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    memory, disk = size(buffer.num_bytes_in_memory), size(buffer.num_bytes_on_disk)
    lines = [
        f"lightning-ckmerge: up to {config.capacity} {config.snapshot} snapshots, {config.layout}, the finest of "
        f"{buffer.segment_steps} steps; space {type(space).__name__.lower()}.",
        f"  buffer{each}: {memory} in memory and at most {disk} on disk; a search holds {size(layout.num_bytes)} "
        f"more, and at most {size(callback.evaluation.cache_bytes)} of batches. Artifacts go to {dirpath}.",
        f"  a search: {_evaluations(callback, trainer, total_steps)}",
    ]
    if space.group_of:
        lines.append(f"  groups: {describe_groups(space.group_of)}.")
    if merged is not None:
        chosen = [slot for slot in layout.slots if slot.name in merged]
        num_bytes = sum(slot.numel * slot.dtype.itemsize for slot in chosen)
        lines.append(
            f"  adapters: {len(chosen)} of {len(layout.slots)} tensors, {size(num_bytes)} of {size(layout.num_bytes)}, "
            f"are buffered and merged ({callback.artifact.adapters}); the frozen base stays as it is."
        )
    return "\n".join(lines)


def _evaluations(callback: CheckpointMergeCallback, trainer: Trainer, total_steps: int | None) -> str:
    num_anchors = most_anchors(callback.search.anchors, callback.buffer.capacity)
    refinement = (
        f", and a refinement by gradients that takes up to {MAX_EVALUATIONS} more" if callback.search.refine else ""
    )
    candidates = f"up to {num_anchors} anchors and {callback.search.n_trials} trials{refinement}"
    cap = callback.search.max_fraction_of_training
    limit = f", at most {100 * cap:g} % of the training time" if cap is not None else ""
    loaders = [] if callback.evaluation.dataloader else [n for n in trainer.num_val_batches if n]
    if not loaders:
        return f"{candidates}{limit}."
    config = callback.evaluation
    splits = [Split((), limited(n, config.limit_batches), config.confirm_fraction) for n in loaders]
    search = sum(s.num_batches("search") or 0 for s in splits)
    confirm = sum(s.num_batches("confirm") or 0 for s in splits)
    num_confirmed = most_confirmed(has_others=bool(callback.others))
    num_refined = MAX_EVALUATIONS if callback.search.refine else 0
    most = search * (num_anchors + callback.search.n_trials + num_refined) + num_confirmed * confirm
    text = f"{candidates} on {search} batches, {num_confirmed} candidates on {confirm}: up to {most} forward batches"
    if total_steps:
        interval = callback.triggers["every_n_train_steps"] or total_steps / NUM_SEARCHES
        share = most / (FORWARDS_PER_TRAINING_BATCH * interval * trainer.accumulate_grad_batches)
        text += f", an expected {100 * share:.3g} % of the training between two searches"
        if cap is not None and share > cap:
            limit += ", so searches stop early: raise `search.max_fraction_of_training`, or search or evaluate less"
    return f"{text}{limit}."
