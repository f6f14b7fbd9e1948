"""What a run with the callback will take, told from its config before an allocation is spent."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.timeline import TIMELINE_NAME
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.spaces import make_space
from lightning_ckmerge.distributed.comm import Alone
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import UnsupportedError
from lightning_ckmerge.plugin.callback import CheckpointMergeCallback
from lightning_ckmerge.plugin.loaders import Split, length_of, limited
from lightning_ckmerge.plugin.offline import Configured
from lightning_ckmerge.plugin.plan import FORWARDS_PER_TRAINING_BATCH
from lightning_ckmerge.plugin.run_length import finest_segment
from lightning_ckmerge.plugin.schedule import NUM_SEARCHES
from lightning_ckmerge.plugin.strategies import check_supported
from lightning_ckmerge.search.anchors import most_anchors
from lightning_ckmerge.search.engine import MAX_SHOWN, most_confirmed
from lightning_ckmerge.search.refine import MAX_EVALUATIONS


@dataclass(kw_only=True)
class Forecast:
    """The plan of one callback. Sizes are bytes a rank, but for the disk's; ``None``: the config does not tell.

    Args:
        faults: What would end the run, or let it end badly; the plan is not one to start.
        warnings: What the user should know.
        total_steps: Optimizer steps of the run.
        num_searches: Searches over the run.
        buffer_memory: Memory of the buffer.
        search_memory: Further host memory during a search: a copy of the weights, and the batches that
            ``evaluation.cache_batches`` lets it keep, at most.
        disk: Buffer and artifacts, over all ranks.
        search_batches: Validation batches that a candidate is scored on, on each rank.
        confirm_batches: Those kept for the verdict.
        evaluations: Most forward batches of one search.
        share: Expected share of the training between two searches.
    """

    strategy: str
    num_ranks: int
    num_parameters: int
    space: str
    num_candidates: int
    total_steps: int | None
    num_searches: int | None
    segment_steps: int
    buffer_memory: int
    search_memory: int
    disk: int
    free_disk: int | None
    search_batches: int | None = None
    confirm_batches: int | None = None
    evaluations: int | None = None
    share: float | None = None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def forecast(configured: Configured, callback: CheckpointMergeCallback) -> Forecast:
    """Return the plan of a callback. Loaders are built but not read; nothing is trained, written or moved to a GPU."""
    trainer: Any = configured.trainer
    warnings: list[str] = []
    loaders = _loaders(configured, warnings)
    num_ranks = trainer.num_devices * trainer.num_nodes
    _configure_model(configured, warnings)
    ownership = Ownership(configured.module, Alone())
    layout = TensorLayout(ownership.owned())
    total_steps = _total_steps(trainer, loaders.get("train"))
    segment_steps = finest_segment(callback.buffer, total_steps)
    buffer = _buffer(callback, layout, segment_steps)
    dirpath = Path(callback.dirpath) if callback.dirpath is not None else Path(trainer.default_root_dir)
    plan = Forecast(
        strategy=type(trainer.strategy).__name__,
        num_ranks=num_ranks,
        num_parameters=sum(p.numel() for p in configured.module.parameters()),
        space=type(make_space(callback.search.space)).__name__.lower(),
        num_candidates=most_anchors(callback.search.anchors, callback.buffer.capacity) + callback.search.n_trials,
        total_steps=total_steps,
        num_searches=_num_searches(callback, total_steps),
        segment_steps=segment_steps,
        buffer_memory=_a_rank(buffer.num_bytes_in_memory, num_ranks),
        # The copy of everything that a rank holds, adapters' base included: whole where the model is replicated.
        search_memory=TensorLayout(ownership.local()).num_bytes + callback.evaluation.cache_bytes,
        disk=buffer.num_bytes_on_disk + _artifact_bytes(callback, layout),
        free_disk=_free_disk(dirpath),
        warnings=warnings,
    )
    _count_batches(plan, callback, trainer, loaders.get("val"))
    plan.faults += _faults(plan, callback, trainer, loaders.get("val"))
    plan.warnings += _warnings(plan, callback, dirpath)
    return plan


def _loaders(configured: Configured, warnings: list[str]) -> dict[str, list[Any]]:
    """Return the loaders that can be had without a run, by stage."""
    owner: Any = configured.datamodule or configured.module
    found = {}
    try:
        if configured.datamodule is not None:
            configured.datamodule.setup("fit")
        for stage in ("train", "val"):
            made = getattr(owner, f"{stage}_dataloader")()
            found[stage] = list(_flattened(made))
    except Exception as error:  # the user's own code, which may want what only a run has
        warnings.append(
            f"The data could not be set up here ({type(error).__name__}: {error}): batches and evaluations are not "
            "counted. Run `plan` where the data is."
        )
    return found


def _flattened(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _flattened(loader)
    elif isinstance(loaders, dict):
        yield from _flattened(list(loaders.values()))
    elif loaders is not None:
        yield loaders


def _configure_model(configured: Configured, warnings: list[str]) -> None:
    try:
        configured.module.configure_model()
    except Exception as error:  # it may want the strategy's mesh
        warnings.append(
            f"`configure_model` could not run here ({type(error).__name__}: {error}): what it builds is not counted."
        )


def _total_steps(trainer: Any, loaders: list[Any] | None) -> int | None:
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs not in (None, -1) and loaders:
        batches = limited(min(map(length_of, loaders)), trainer.limit_train_batches)
        # A distributed sampler deals the batches out.
        per_epoch = math.ceil(batches / (trainer.num_devices * trainer.num_nodes) / trainer.accumulate_grad_batches)
        limits.append(trainer.max_epochs * per_epoch)
    return min(limits, default=None)


def _num_searches(callback: CheckpointMergeCallback, total_steps: int | None) -> int | None:
    every = callback.triggers["every_n_train_steps"]
    if every is not None:
        return total_steps // every + bool(total_steps % every) if total_steps else None
    return NUM_SEARCHES if not any(callback.triggers.values()) and total_steps else None


def _buffer(callback: CheckpointMergeCallback, layout: TensorLayout, segment_steps: int) -> RollingBuffer:
    """The buffer itself, which takes no memory before its first update."""
    storage: Storage = DiskStorage("unused") if callback.buffer.storage == "disk" else MemoryStorage()
    return RollingBuffer(
        callback.buffer,
        layout,
        storage,
        device="cpu",
        run_id="0" * 8,
        segment_steps=segment_steps,
        double_segments=False,
    )


def _a_rank(num_bytes: int, num_ranks: int) -> int:
    """Snapshots are dealt out, or sharded as the model is."""
    return math.ceil(num_bytes / num_ranks)


def _artifact_bytes(callback: CheckpointMergeCallback, layout: TensorLayout) -> int:
    """The artifacts that are kept, and one more while it is published."""
    kept = max(1, callback.save_top_k) + 1
    num_models = len(set(callback.artifact.formats) | {"safetensors"}) + MAX_SHOWN * bool(callback.others)
    return kept * num_models * layout.num_bytes


def _free_disk(path: Path) -> int | None:
    existing = next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def _count_batches(plan: Forecast, callback: CheckpointMergeCallback, trainer: Any, loaders: list[Any] | None) -> None:
    if callback.evaluation.dataloader is not None or not loaders:
        return
    lengths = [limited(length_of(loader), trainer.limit_val_batches) for loader in loaders]
    if any(map(math.isinf, lengths)):
        plan.warnings.append("A validation loader has no length: set `evaluation.limit_batches` to bound a search.")
        return
    shares = [math.ceil(n / plan.num_ranks) for n in lengths]
    config = callback.evaluation
    splits = [Split((), limited(n, config.limit_batches), config.confirm_fraction) for n in shares]
    plan.search_batches = sum(s.num_batches("search") or 0 for s in splits)
    plan.confirm_batches = sum(s.num_batches("confirm") or 0 for s in splits)
    num_confirmed = most_confirmed(has_others=bool(callback.others))
    num_evaluations = plan.num_candidates + (MAX_EVALUATIONS if callback.search.refine else 0)
    plan.evaluations = plan.search_batches * num_evaluations + num_confirmed * plan.confirm_batches
    if plan.total_steps and plan.num_searches:
        interval = plan.total_steps / plan.num_searches
        plan.share = plan.evaluations / (FORWARDS_PER_TRAINING_BATCH * interval * trainer.accumulate_grad_batches)


def _faults(plan: Forecast, callback: CheckpointMergeCallback, trainer: Any, loaders: list[Any] | None) -> list[str]:
    found = []
    try:
        check_supported(trainer, callback.search.refine)
    except UnsupportedError as error:
        found.append(str(error))
    if loaders == [] and callback.evaluation.dataloader is None:
        found.append(
            "a search needs validation batches, got no validation loader. Define `val_dataloader`, or name a method in "
            "`evaluation.dataloader`."
        )
    if plan.free_disk is not None and plan.disk > plan.free_disk:
        found.append(
            f"the disk must hold the buffer and the artifacts, {plan.disk} bytes, got {plan.free_disk} free. Lower "
            "`buffer.capacity`, store snapshots in bfloat16, or name another `dirpath`."
        )
    return found


def _warnings(plan: Forecast, callback: CheckpointMergeCallback, dirpath: Path) -> list[str]:
    found = []
    cap = callback.search.max_fraction_of_training
    if plan.share is not None and cap is not None and plan.share > cap:
        found.append(
            f"A full search would take about {100 * plan.share:.3g} % of the training before it, but "
            f"`search.max_fraction_of_training` allows {100 * cap:g} %: it will stop early. Set "
            "`evaluation.limit_batches`, search less often, or allow more."
        )
    if plan.confirm_batches == 0:
        found.append("One validation batch cannot be split: nothing could be confirmed. Use more or smaller batches.")
    if (dirpath / TIMELINE_NAME).is_file():
        found.append(f"{dirpath} holds the artifacts of an earlier run, which this one would go on with.")
    if callback.save_top_k == -1:
        found.append("`save_top_k` is -1: all artifacts are kept, of which the plan counts one.")
    return found
