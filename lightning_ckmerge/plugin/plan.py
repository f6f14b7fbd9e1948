"""A run's costs, told before it starts: one record, made and shown by both ``fit`` and ``ckmerge plan``."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ckmerge.artifact.timeline import TIMELINE_NAME
from lightning_ckmerge.buffer.host_staging import num_staged_bytes
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import BufferConfig, MergeSettings
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.spaces import ByTensor, Grouped
from lightning_ckmerge.core.spaces.groups import describe_groups
from lightning_ckmerge.core.wording import amount_told
from lightning_ckmerge.errors import ConfigError, UnsupportedError
from lightning_ckmerge.plugin.clock import MIN_TRAINING_S
from lightning_ckmerge.plugin.dirpath import Destination, find_destination_fault, root_destination
from lightning_ckmerge.plugin.evaluate.halves import Split, length_of, limited
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.restore.paused_run import MAX_COPIED_BYTES
from lightning_ckmerge.plugin.strategies import check_supported
from lightning_ckmerge.plugin.triggers import NUM_SEARCHES, RunLength, finest_segment, run_length
from lightning_ckmerge.report.text import MISSING, count, size
from lightning_ckmerge.search.anchors import most_anchors
from lightning_ckmerge.search.engine import MAX_SHOWN, most_confirmed
from lightning_ckmerge.search.interval import MIN_CONFIRM_BATCHES, ONE_BATCH
from lightning_ckmerge.search.refine import MAX_EVALUATIONS

# A backward pass takes about twice as long as a forward pass.
FORWARDS_PER_TRAINING_BATCH = 3
# The newest search that is due, and one that a follower is at.
NUM_LEFT = 2


@dataclass(frozen=True, kw_only=True)
class Known:
    """The facts about a run before its first step.

    Args:
        length: How long it is.
        val_batches: Validation batches of each loader on each rank, after ``limit_val_batches``, infinite for a loader
            without a length; ``None``: they cannot be counted.
        destination: Where artifacts go.
        num_ranks: Ranks of the run.
        holders: Ranks over which the tensors of this process will still be dealt out.
    """

    length: RunLength
    val_batches: Sequence[float] | None
    destination: Destination
    num_ranks: int
    holders: int = 1


@dataclass(kw_only=True)
class Plan:
    """The actions and costs of one callback. Sizes are bytes per rank, except on disk; ``None``: unknown.

    To show something else, add a field, fill it in ``make_plan``, and give it a row in ``plan_rows``; calls for action
    go into ``warnings``.

    Args:
        strategy: Class of the strategy.
        num_ranks: Ranks of the run.
        num_parameters: Floating numbers of the model's parameters.
        space: Name of the space.
        total_steps: Optimizer steps of the run.
        num_searches: Searches over the run, the one at its end counted.
        when: When they are due.
        interval: Optimizer steps between two of them.
        snapshots: Contents of the buffer.
        segment_steps: Length of the finest segment.
        buffer_memory: Memory of the buffer, but for ``staging_memory``.
        staging_memory: On the weights' device, where running means are in host memory.
        update_bytes: Sent to host memory by each update of such means.
        update_every: Optimizer steps between two of these.
        buffer_disk: The buffer's files.
        search_memory: Further host memory during a search: a copy of the weights, and the batches that
            ``evaluation.cache_batches`` lets it keep, at most.
        disk: Buffer and artifacts, over all ranks.
        free_disk: Free bytes where artifacts go.
        dirpath: Where artifacts go.
        url: Where they are uploaded to from there.
        candidates: Candidates of a search.
        num_candidates: Most anchors and trials of a search.
        search_batches: Validation batches that a candidate is scored on, on each rank.
        confirm_batches: Batches kept for the verdict.
        num_confirmed: Most candidates scored on them.
        evaluations: Most forward batches of one search.
        share: Expected share of the training between two searches.
        cap: Share of the training time that all searches may take.
        where: Who searches: ``training`` or a ``follower``.
        due_bytes: Copied to host memory and written behind training whenever a search is left for a follower.
        groups: The groups of tensors with coefficients of their own.
        adapters: The buffered and merged part of a model with adapters.
        left_out: Tensors that are not averaged, by name.
        faults: Reasons why the run would fail; do not start it.
        warnings: Notes for the user.
    """

    strategy: str
    num_ranks: int
    num_parameters: int
    space: str
    total_steps: int | None
    num_searches: int | None
    when: str
    interval: float | None
    snapshots: str
    segment_steps: int
    buffer_memory: int
    buffer_disk: int
    search_memory: int
    disk: int
    free_disk: int | None
    dirpath: str
    url: str | None
    candidates: str
    num_candidates: int
    search_batches: int | None = None
    confirm_batches: int | None = None
    num_confirmed: int
    evaluations: int | None = None
    share: float | None = None
    cap: float | None = None
    where: str = "training"
    due_bytes: int = 0
    staging_memory: int = 0
    update_bytes: int = 0
    update_every: int = 1
    groups: str | None = None
    adapters: str | None = None
    left_out: str | None = None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def make_plan(settings: MergeSettings, trainer: Trainer, model: RankModel, known: Known) -> Plan:
    """Return the plan of one settings. Nothing is read, written or moved.

    Args:
        settings: The callback's settings.
        trainer: The Trainer; it need not have started.
        model: This process's part of the module.
        known: The facts about the run.
    """
    config, steps = settings.buffer, known.length.steps
    segment_steps = finest_segment(config, steps)
    buffer = _probe(config, model.layout, segment_steps)
    buffer_disk = math.ceil(buffer.num_bytes_on_disk / known.holders)
    model_bytes = math.ceil(model.layout.num_bytes / known.holders) * known.num_ranks
    update_bytes = math.ceil(buffer.num_bytes_of_update / known.holders)
    num_anchors = most_anchors(settings.search.anchors, config.capacity)
    is_followed = settings.search.where == "follower"
    due_bytes = _due_bytes(settings, model, buffer, known) if is_followed else 0
    # A follower may be reading an older due search while the newest is left: with its snapshots, which the ring drops.
    left_disk = NUM_LEFT * due_bytes + is_followed * math.ceil(
        config.capacity * buffer.stored_layout.num_bytes / known.holders
    )
    plan = Plan(
        strategy=type(trainer.strategy).__name__,
        num_ranks=known.num_ranks,
        num_parameters=_num_parameters(model),
        space=settings.space_name,
        total_steps=steps,
        num_searches=num_searches(settings, known.length),
        when=_when(settings, steps),
        interval=_interval(settings, known.length),
        snapshots=f"up to {config.capacity} {config.snapshot} snapshots, {config.layout}",
        segment_steps=segment_steps,
        buffer_memory=math.ceil(buffer.num_bytes_in_memory / known.holders),
        buffer_disk=buffer_disk,
        # The copy of everything that a rank holds, adapters' base included: whole where the model is replicated.
        search_memory=0 if is_followed else model.local_layout.num_bytes + settings.evaluation.cache_bytes,
        disk=(buffer_disk + left_disk) * known.num_ranks + _num_models(settings) * model_bytes,
        free_disk=_free_disk(known.destination.dirpath),
        dirpath=str(known.destination.dirpath),
        url=known.destination.url,
        candidates=f"up to {num_anchors} anchors and {settings.search.n_trials} trials"
        + (
            f", and a refinement by gradients that takes up to {MAX_EVALUATIONS} more" if settings.search.refine else ""
        ),
        num_candidates=num_anchors + settings.search.n_trials,
        num_confirmed=most_confirmed(of_front=settings.has_several),
        cap=None if is_followed else settings.search.max_fraction_of_training,
        where=settings.search.where,
        due_bytes=due_bytes,
        staging_memory=_staging_memory(config, update_bytes),
        update_bytes=update_bytes,
        update_every=config.update_every_n_steps if config.snapshot == "mean" else segment_steps,
        groups=_groups(model),
        adapters=_adapters(settings, model),
        left_out=", ".join(model.ownership.left_out) or None,
    )
    _count_batches(plan, settings, known)
    plan.warnings += _warnings(plan, settings)
    plan.faults += _faults(plan)
    return plan


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as labels and texts, the same for ``fit`` and ``ckmerge plan``."""

    def known(value: float | None) -> str:
        return MISSING if value is None else count(value)

    steps = "an unknown number of optimizer steps" if plan.total_steps is None else None
    each = " a rank" if plan.num_ranks > 1 else ""
    searches = "" if plan.num_searches is None else f"{count(plan.num_searches)}: "
    rows = [
        ("run", f"{steps or f'{count(plan.total_steps or 0)} optimizer steps'}, {plan.strategy}, {_ranks(plan)}"),
        ("model", f"{count(plan.num_parameters)} parameters"),
        ("adapters", plan.adapters),
        ("not averaged", plan.left_out and f"{plan.left_out}: copied from the latest weights"),
        ("snapshots", f"{plan.snapshots}, the finest of {_steps(plan.segment_steps)}"),
        (f"buffer{each}", f"{size(plan.buffer_memory)} in memory and at most {size(plan.buffer_disk)} on disk"),
        (
            f"means{each}",
            f"in host memory, with {size(plan.staging_memory)} on the device for staging; {size(plan.update_bytes)} go "
            f"from it to the host every {_steps(plan.update_every) if plan.update_every > 1 else 'step'}"
            if plan.update_bytes
            else None,
        ),
        (
            f"during a search{each}",
            None
            if plan.where == "follower"
            else f"at most {size(plan.search_memory)} of extra host memory, plus {size(MAX_COPIED_BYTES)} for other "
            "state",
        ),
        (
            f"when one is due{each}",
            f"{size(plan.due_bytes)} copied to host memory, and written behind training"
            if plan.where == "follower"
            else None,
        ),
        ("disk, buffer and artifacts", f"{size(plan.disk)}, {_free(plan)}, in {plan.dirpath}"),
        ("uploads", plan.url and f"artifacts to {plan.url}, behind training"),
        ("searches", f"{searches}{plan.when}"),
        ("a search", f"space {plan.space}, {plan.candidates}"),
        ("groups", plan.groups),
        (
            f"validation batches{each}",
            f"{known(plan.search_batches)} + {known(plan.confirm_batches)} for the verdict, of {plan.num_confirmed} "
            "candidates",
        ),
        ("evaluations of a search", f"up to {known(plan.evaluations)} forward batches"),
        ("a full search takes", _share(plan) if plan.where == "training" else None),
        (
            "who searches",
            f"a follower, at no cost of training: `ckmerge follow {plan.dirpath} --config ...`"
            if plan.where == "follower"
            else None,
        ),
    ]
    return [(label, text) for label, text in rows if text is not None]


def render_plan(plan: Plan) -> str:
    """Return the plan as lines of text."""
    width = max(len(label) for label, _ in plan_rows(plan))
    lines = [f"  {label:{width}}  {text}" for label, text in plan_rows(plan)]
    notes = [f"  note: {note}" for note in (*plan.warnings, *plan.faults)]
    return "\n".join(["lightning-ckmerge, the plan of this run:", *lines, *notes])


def num_searches(settings: MergeSettings, length: RunLength) -> int | None:
    """Return the searches over a run, the one at its end counted; ``None``: only training will tell."""
    every_n_steps, every_n_epochs = settings.triggers.every_n_train_steps, settings.triggers.every_n_epochs
    if settings.triggers.train_time_interval is not None:
        return None
    if every_n_steps is not None:
        total, every = length.steps, every_n_steps
    elif every_n_epochs is not None:
        total, every = length.epochs, every_n_epochs
    else:
        within = min(NUM_SEARCHES, length.steps) - 1 if length.steps else 0
        return within + settings.triggers.on_train_end
    if total is None:
        return None
    # A step that has been searched is not searched again.
    return int(total // every) + (settings.triggers.on_train_end and total % every > 0)


def _groups(model: RankModel) -> str | None:
    if isinstance(model.space, ByTensor):
        return f"each of {len(model.space.group_of)} tensors, after `search.refine`"
    if model.space.group_of:
        return describe_groups(model.space.group_of)
    return "none found by name: all tensors share their coefficients" if isinstance(model.space, Grouped) else None


def _when(settings: MergeSettings, total_steps: int | None) -> str:
    triggers = settings.triggers
    end = triggers.on_train_end
    last = " and at the end" if end else ""
    if (steps := triggers.every_n_train_steps) is not None:
        return f"every {_steps(steps)}{last}"
    if (epochs := triggers.every_n_epochs) is not None:
        return f"every {f'{count(epochs)} epochs' if epochs > 1 else 'epoch'}{last}"
    if (interval := triggers.train_time_interval) is not None:
        return f"every {interval} of training{last}"
    if total_steps is None:
        only = "at the end only" if end else "none"
        return f"{only}, because the run's length is unknown; set `every_n_train_steps` for more"
    return f"after each quarter of the run{'' if end else ' but the last'}"


def _interval(settings: MergeSettings, length: RunLength) -> float | None:
    """Return the steps from one search to the next, on the average where epochs differ."""
    triggers, steps = settings.triggers, length.steps
    if triggers.train_time_interval is not None or not steps:
        return None
    if triggers.every_n_train_steps is not None:
        return float(min(triggers.every_n_train_steps, steps))
    if triggers.every_n_epochs is not None:
        return min(1.0, triggers.every_n_epochs / length.epochs) * steps if length.epochs else None
    return steps / NUM_SEARCHES


def _num_parameters(model: RankModel) -> int:
    if model.ownership.is_sharded:
        return sum(map(math.prod, model.ownership.shapes.values()))
    return sum(slot.numel for slot in model.local_layout.slots if slot.role == "parameter")


def _num_models(settings: MergeSettings) -> int:
    """Return the copies of the model on disk, in each format: of the artifacts kept, and of one being published.

    Kept are `save_top_k` of them, or ``best``, and an unconfirmed one.
    """
    num_copies = len(set(settings.artifact.formats) | {"safetensors"}) + MAX_SHOWN * settings.has_several
    num_kept = 1 if settings.save_top_k == 0 else max(1, settings.save_top_k) + 1
    return (num_kept + 1) * num_copies


def _due_bytes(settings: MergeSettings, model: RankModel, buffer: RollingBuffer, known: Known) -> int:
    """Return a rank's share of the latest weights and of the mean of the segment in progress."""
    others = sum(o.tensor.nbytes for o in model.ownership.others())
    mean = buffer.accumulator_layout.num_bytes if settings.buffer.snapshot == "mean" else 0
    return math.ceil((model.layout.num_bytes + mean) / known.holders) + others


def _staging_memory(config: BufferConfig, update_bytes: int) -> int:
    return num_staged_bytes(update_bytes, parse_size(config.bucket_size)) if update_bytes else 0


def _adapters(settings: MergeSettings, model: RankModel) -> str | None:
    if model.adapters is None:
        return None
    merged, slots = model.ownership.shapes.keys(), model.local_layout.slots
    chosen = [slot for slot in slots if slot.name in merged]
    num_bytes = sum(slot.numel * slot.dtype.itemsize for slot in chosen)
    return (
        f"{len(chosen)} of {len(slots)} tensors, {size(num_bytes)} of {size(model.local_layout.num_bytes)}, are "
        f"buffered and merged ({settings.artifact.adapters}); the frozen base stays as it is"
    )


def _probe(config: BufferConfig, layout: TensorLayout, segment_steps: int) -> RollingBuffer:
    """Return a buffer to ask for its sizes; it takes no memory before its first update."""
    storage: Storage = DiskStorage("unused") if config.storage == "disk" else MemoryStorage()
    return RollingBuffer(
        config,
        layout,
        storage,
        device="cpu",
        run_id="0" * 8,
        segment_steps=segment_steps,
        double_segments=False,
    )


def _free_disk(path: Path) -> int | None:
    existing = next((p for p in (path.absolute(), *path.absolute().parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def _count_batches(plan: Plan, settings: MergeSettings, known: Known) -> None:
    config, length = settings.evaluation, known.length
    if config.dataloader is not None:
        return
    counts = [limited(n, config.limit_batches) for n in known.val_batches or () if n]
    if not counts:
        return
    if any(map(math.isinf, counts)):
        plan.warnings.append("A validation loader has no length: set `evaluation.limit_batches` to bound a search.")
        return
    splits = [Split((), n, config.confirm_fraction) for n in counts]
    plan.search_batches = sum(s.num_batches("search") or 0 for s in splits)
    plan.confirm_batches = sum(s.num_batches("confirm") or 0 for s in splits)
    num_evaluations = plan.num_candidates + (MAX_EVALUATIONS if settings.search.refine else 0)
    plan.evaluations = plan.search_batches * num_evaluations + plan.num_confirmed * plan.confirm_batches
    if plan.interval and length.steps and length.batches:
        training_batches = plan.interval * length.batches / length.steps
        plan.share = plan.evaluations / (FORWARDS_PER_TRAINING_BATCH * training_batches)


def _warnings(plan: Plan, settings: MergeSettings) -> list[str]:
    found = []
    if plan.share is not None and plan.cap is not None and plan.share > plan.cap:
        allowed = f"{100 * plan.cap:g} %, or {_least(plan.cap)} in a short run"
        found.append(
            f"A full search would take about {amount_told(100 * plan.share)} % of the training before it, but "
            f"`search.max_fraction_of_training` allows {allowed}: it will stop early. Set `evaluation.limit_batches`, "
            "search less often, or allow more."
        )
    if plan.confirm_batches == 0:
        found.append(ONE_BATCH)
    elif plan.confirm_batches is not None and plan.confirm_batches < MIN_CONFIRM_BATCHES:
        found.append(
            f"A verdict needs at least {MIN_CONFIRM_BATCHES} confirmation batches, got {plan.confirm_batches}: every "
            "gain will be `unconfirmed`. Use more or smaller batches."
        )
    if settings.save_top_k == -1:
        found.append("`save_top_k` is -1: all artifacts are kept, of which the plan counts one.")
    return found


def _faults(plan: Plan) -> list[str]:
    found = []
    if plan.free_disk is not None and plan.disk > plan.free_disk:
        found.append(
            f"the disk must hold the buffer and the artifacts, {plan.disk} bytes, got {plan.free_disk} free. Lower "
            "`buffer.capacity`, store snapshots in bfloat16, or name another `dirpath`."
        )
    return found


def _steps(num: int) -> str:
    return "1 step" if num == 1 else f"{count(num)} steps"


def _ranks(plan: Plan) -> str:
    return f"{plan.num_ranks} {'rank' if plan.num_ranks == 1 else 'ranks'}"


def _free(plan: Plan) -> str:
    return MISSING if plan.free_disk is None else f"{size(plan.free_disk)} free"


def _share(plan: Plan) -> str:
    limit = (
        ""
        if plan.cap is None
        else f"; all searches may take {100 * plan.cap:g} % of the training time, or {_least(plan.cap)}"
    )
    share = MISSING if plan.share is None else f"an expected {amount_told(100 * plan.share)} %"
    return f"{share} of the training between two searches{limit}"


def _least(cap: float) -> str:
    """The time that all searches may take of a run, however short it is."""
    return f"{cap * MIN_TRAINING_S:.3g} s"


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """A run's loaders; ``None`` where they could not be had without it."""

    train: list[Any] | None
    val: list[Any] | None


def forecast(
    settings: MergeSettings, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None = None
) -> Plan:
    """Return the plan of a run that has not begun, from its config alone.

    Loaders are built but not read; nothing is trained, written or moved to a GPU.
    """
    warnings: list[str] = []
    loaders = _loaders(module, datamodule, warnings)
    num_ranks = trainer.num_devices * trainer.num_nodes
    _configure_model(module, warnings)
    train = [_batches_of(loader, trainer.limit_train_batches, num_ranks) for loader in loaders.train or ()]
    # Of several training loaders, shorter ones start again.
    length = run_length(trainer, max(train, default=math.inf), _steps_per_update(module, warnings))
    val = loaders.val
    destination, fault = _directory(trainer, settings)
    known = Known(
        length=length,
        val_batches=None if val is None else [_batches_of(v, trainer.limit_val_batches, num_ranks) for v in val],
        destination=destination,
        num_ranks=num_ranks,
        holders=num_ranks,
    )
    model = RankModel(module, settings)
    plan = make_plan(settings, trainer, model, known)
    plan.warnings[:0] = warnings
    plan.warnings += _warnings_of_run(trainer, known)
    plan.faults += [*([fault] if fault is not None else []), *_faults_of_run(settings, trainer, known)]
    return plan


def _directory(trainer: Any, settings: MergeSettings) -> tuple[Destination, str | None]:
    """Return where artifacts go, or its parent, and the reason why they cannot."""
    try:
        destination = root_destination(trainer, settings.dirpath, settings.buffer.dirpath)
    except ConfigError as error:
        return Destination(dirpath=Path(trainer.default_root_dir)), str(error)
    return destination, find_destination_fault(destination)


def _loaders(module: LightningModule, datamodule: LightningDataModule | None, warnings: list[str]) -> Loaders:
    """Return the loaders that can be had without a run."""
    owner: Any = datamodule or module
    found: dict[str, list[Any]] = {}
    try:
        if datamodule is not None:
            datamodule.setup("fit")
        for stage in ("train", "val"):
            made = getattr(owner, f"{stage}_dataloader")()
            found[stage] = list(_flattened(made))
    except Exception as error:  # the user's own code may need a running Trainer
        warnings.append(
            f"The data could not be set up here ({type(error).__name__}: {error}): batches and evaluations are not "
            "counted. Run `plan` where the data is."
        )
    return Loaders(train=found.get("train"), val=found.get("val"))


def _flattened(loaders: Any) -> Iterator[Any]:
    if hasattr(loaders, "flattened"):  # Lightning's CombinedLoader
        yield from loaders.flattened
    elif isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _flattened(loader)
    elif isinstance(loaders, dict):
        yield from _flattened(list(loaders.values()))
    elif loaders is not None:
        yield loaders


def _batches_of(loader: Any, limit: float, num_ranks: int) -> float:
    """Return the batches that each rank takes of a loader, whose samples Lightning deals out."""
    length = length_of(loader)
    is_dealt = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if is_dealt and num_ranks > 1 and not isinstance(loader.sampler, DistributedSampler):
        batch = length_of(loader.sampler) / max(1, length)
        samples = math.ceil(length_of(loader.sampler) / num_ranks)
        size = loader.batch_size or batch
        length = samples // size if loader.drop_last else math.ceil(samples / size)
    return length if math.isinf(length) and isinstance(limit, float) else limited(length, limit)


def _configure_model(module: LightningModule, warnings: list[str]) -> None:
    try:
        module.configure_model()
    except Exception as error:  # it may want the strategy's mesh
        warnings.append(
            f"`configure_model` could not run here ({type(error).__name__}: {error}): the plan leaves out what it "
            "builds."
        )


def _steps_per_update(module: LightningModule, warnings: list[str]) -> int | None:
    """Return how many optimizers are stepped by hand; 1 where Lightning steps the only one."""
    if module.automatic_optimization:
        return 1
    try:
        made: Any = module.configure_optimizers()
    except Exception as error:  # it may want the run's length, or the strategy
        warnings.append(
            f"`configure_optimizers` could not run here ({type(error).__name__}: {error}): under manual optimization "
            "the run's length is known from `max_steps` alone."
        )
        return None
    # Optimizers alone, or with their schedulers as a second list, or each in a dict with its own.
    optimizers = made[0] if isinstance(made, tuple) and made and isinstance(made[0], (list, tuple)) else made
    return len(optimizers) if isinstance(optimizers, (list, tuple)) else 1


def _faults_of_run(settings: MergeSettings, trainer: Any, known: Known) -> list[str]:
    found = []
    try:
        check_supported(trainer, settings.search.refine)
    except UnsupportedError as error:
        found.append(str(error))
    if known.val_batches == [] and settings.evaluation.dataloader is None:
        found.append(
            "a search needs validation batches, got no validation loader. Define `val_dataloader`, or name a method in "
            "`evaluation.dataloader`."
        )
    return found


def _warnings_of_run(trainer: Any, known: Known) -> list[str]:
    found = []
    if (known.destination.dirpath / TIMELINE_NAME).is_file():
        found.append(
            f"{known.destination.dirpath} already holds a run. A new run writes to `run=2` or the next number below "
            "it; a resumed run continues in its own directory."
        )
    if trainer.fast_dev_run:
        found.append("The callback does nothing in a `fast_dev_run`; this plan is for the run without it.")
    return found
