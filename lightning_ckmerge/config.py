"""The settings of one callback: one frozen object of parts that check themselves, and are checked together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_ckmerge.checks import check_fields, parse_size, require_at_least, require_fraction, require_positive
from lightning_ckmerge.core.objectives import Mode, Objective, require_modes, sign_of
from lightning_ckmerge.core.spaces import Space, SpaceName, make_space
from lightning_ckmerge.errors import ConfigError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.terminator import BaseTerminator

Apply = Literal["emit", "on_train_end"]
OnError = Literal["warn", "raise"]
AnchorName = Literal["uniform", "ema", "wsm-linear", "wsm-minus-sqrt", "best-single", "greedy-soup", "metrics-weighted"]
DEFAULT_ANCHORS: tuple[AnchorName, ...] = ("ema", "uniform")
Layout = Literal["geometric", "uniform"]
SnapshotKind = Literal["mean", "point"]
AccumulateOn = Literal["device", "host"]
StorageKind = Literal["disk", "cpu", "device"]
BufferDtype = Literal["float32", "bfloat16", "float16"]
ArtifactFormat = Literal["safetensors", "ckpt", "hf"]
AtLowRate = Literal["tail", "skip", "search"]
Refine = Literal["gradient"]
Where = Literal["training", "follower"]
AdapterMerge = Literal["factors", "products"]
# Of a search after a decay.
TAIL_TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """Contents and place of the buffer.

    Args:
        capacity: Snapshots kept; at least 2.
        layout: ``geometric``: fine recent segments and coarse old ones, which together span at least the last
            half of the run. ``uniform``: the last ``capacity`` segments, all of one length.
        every_n_train_steps: Length of the finest segment in optimizer steps. ``None``: 1 % of the run where its
            length is known, else 25 steps, doubled as the run grows.
        snapshot: ``mean``: the running mean of the weights over the segment. ``point``: the weights at its end.
        update_every_n_steps: Optimizer steps between two updates of the running mean; at least 1. Every step would
            cost 1.4 % of a short one (17 M parameters, 256 tokens). An odd number averages out alternation.
        accumulate_on: ``device``: running means lie beside the weights. ``host``: in host memory, pinned where there is
            a GPU, so that nothing stays on the device but the staging of ``bucket_size``; a thread averages behind
            training. The same bits.
        storage: ``disk``: safetensors files, written behind training, which survive a restart. ``cpu``: host
            memory. ``device``: memory of the weights' device.
        dtype: Precision of the stored snapshots. ``None``: float32 for means, the weights' own for points.
        dirpath: Local directory for whatever lies on disk while artifacts go to a URL: snapshots, the study, and the
            artifacts until they have been uploaded. ``None``: ``ckmerge`` under ``default_root_dir``, or under the
            working directory where that is a URL, too.
        bucket_size: Most extra memory that a merge takes while ranks that hold the model whole (DDP) send each other
            their shares of it, such as ``"64MB"``; and most memory on the device with ``accumulate_on: host``.
    """

    capacity: int = 10
    layout: Layout = "geometric"
    every_n_train_steps: int | None = None
    snapshot: SnapshotKind = "mean"
    update_every_n_steps: int = 3
    accumulate_on: AccumulateOn = "device"
    storage: StorageKind = "disk"
    dtype: BufferDtype | None = None
    dirpath: str | Path | None = None
    bucket_size: str = "64MB"

    def __post_init__(self) -> None:
        check_fields(self, "buffer")
        require_at_least("buffer.capacity", self.capacity, 2, "A merge needs two snapshots; the default is 10.")
        require_at_least("buffer.every_n_train_steps", self.every_n_train_steps, 1, "Leave it out for 1 % of the run.")
        require_at_least("buffer.update_every_n_steps", self.update_every_n_steps, 1, "1 averages every step.")
        parse_size(self.bucket_size, "buffer.bucket_size")
        if self.accumulate_on == "host" and self.storage == "device":
            raise ConfigError(
                '`buffer.accumulate_on` "host" keeps the device\'s memory free, got `buffer.storage` "device". Store '
                'snapshots on "disk", or in host memory ("cpu").'
            )


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """Another logged metric that a merge must not spoil.

    Args:
        monitor: Its name, as validation logs it.
        allowance: How much worse than the latest weights' it may get, in its own unit; at least 0.
        mode: ``min`` if lower is better, ``max`` if higher is.
    """

    monitor: str
    allowance: float = 0.0
    mode: Mode = "min"

    def __post_init__(self) -> None:
        check_fields(self, "search.constraints")
        require_at_least("search.constraints.allowance", self.allowance, 0, "0 allows no loss at all.")

    @property
    def sign(self) -> int:
        """1 if lower values are better, -1 if higher ones are."""
        return sign_of(self.mode)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Where a search looks, and what it may spend.

    Args:
        space: ``grouped``, ``decay``, ``pairwise`` (the paper's, needs ``point`` snapshots), ``window``, ``simplex``,
            ``affine``, ``auto`` or ``tail``; or a ``Space`` object.
        n_trials: Candidates proposed by the sampler, anchors not counted; at least 1.
        anchors: Known merges that are scored first, after the latest weights, the last search's optimum and the
            space's own first point: ``ema``, ``uniform``, ``wsm-linear``, ``wsm-minus-sqrt``; and, which cost an
            evaluation a snapshot or more, ``best-single``, ``greedy-soup``, ``metrics-weighted``.
        sampler: Any Optuna sampler; ``None``: ``GPSampler(deterministic_objective=True)``. The paper's is
            ``lightning_ckmerge.search.hedge.GPHedgeSampler``.
        seed: Seed of the default sampler.
        min_gain_left: Stop when less than this share of the gain over the latest weights is left to expect, by a
            Gaussian process, after six trials or more; in [0, 1), 0: never. All trials run where several metrics are
            monitored or constraints are set, and in ``ckmerge search``, where processes may share them.
        terminator: Any Optuna terminator, asked after each trial whether to stop; for one monitored metric. Not asked
            in ``ckmerge search`` either.
        refine: ``gradient``: a step downhill from the best candidate, by its gradient, over the coefficients of each
            snapshot in each tensor. It takes about five evaluations. Needs ``validation_step`` to return the loss that
            ``monitor`` is the mean of, and a strategy that holds the model whole: a single device or ``ddp``.
            ``None``: none.
        timeout_s: Seconds that one search may take; it stops early rather than exceed.
        max_fraction_of_training: Share of the training time so far that all searches together may take, in (0, 1]; a
            run counts as at least 200 s long, which makes 10 s of 5 %. Searches before the last one leave half of
            the rest for it. ``None``: no such limit.
        at_low_lr: What to do while the learning rate is still rising, or has fallen below 10 % of its peak over the
            buffer's snapshots, so that merging would gain little. ``tail``: leave scheduled searches out while it
            rises; once it has fallen, search near the latest weights only, in the space of that name, with few
            trials. ``skip``: leave out both, the last search too. ``search``: search as ever.
        constraints: Other logged metrics that may not get worse than the latest weights' by more than stated.
        storage: Optuna storage URL; ``None``: a journal file beside the artifacts.
        where: ``training``: on the run's own devices, while it stands still. ``follower``: elsewhere, by ``ckmerge
            follow``, while training goes on; needs ``buffer.storage: disk``. Of the limits above ``timeout_s`` holds
            there.
    """

    space: SpaceName | Space = "grouped"
    n_trials: int = 16
    anchors: list[AnchorName] = field(default_factory=lambda: [*DEFAULT_ANCHORS])
    sampler: BaseSampler | None = None
    seed: int = 0
    min_gain_left: float = 0.002
    terminator: BaseTerminator | None = None
    refine: Refine | None = None
    timeout_s: float | None = None
    max_fraction_of_training: float | None = 0.05
    at_low_lr: AtLowRate = "tail"
    constraints: list[Constraint] = field(default_factory=list)
    storage: str | None = None
    where: Where = "training"

    def __post_init__(self) -> None:
        check_fields(self, "search")
        require_at_least("search.n_trials", self.n_trials, 1, "The default is 16.")
        require_at_least("search.seed", self.seed, 0, "The default is 0.")
        if not 0 <= self.min_gain_left < 1:
            raise ConfigError(
                f"`0 <= search.min_gain_left < 1` must hold, got {self.min_gain_left}. 0 runs all trials."
            )
        require_positive("search.timeout_s", self.timeout_s, "Leave it out for no limit.")
        require_fraction("search.max_fraction_of_training", self.max_fraction_of_training, "`null` sets no limit.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The data that score a candidate, and how.

    Args:
        limit_batches: Like ``limit_val_batches``: batches a loader (int), or a share of them (float in (0, 1]).
        dataloader: Name of a method of the datamodule or module that returns the loaders; ``None``: the run's
            validation loaders.
        confirm_fraction: Share of the batches kept from the search, for the verdict; in (0, 1).
        recalibrate_batches: Batches of training data that re-estimate BatchNorm statistics of a candidate; 0: none.
        cache_batches: Host memory on each rank, such as ``"256MB"``, in which a search keeps its validation batches, so
            that they are fetched once, not for each candidate; ``0``: none. Batches that need more are not kept, nor
            are those that draw random numbers in the main process while they are fetched: values never change.
        staged: Drop losing candidates early, by paired per-batch differences, where the metric is a batch mean and no
            constraint needs all batches.
    """

    limit_batches: int | float | None = None
    dataloader: str | None = None
    confirm_fraction: float = 0.5
    recalibrate_batches: int = 0
    cache_batches: int | str = "256MB"
    staged: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        if isinstance(self.limit_batches, float):
            require_fraction("evaluation.limit_batches", self.limit_batches, "An int counts batches.")
        else:
            require_at_least("evaluation.limit_batches", self.limit_batches, 2, "One batch to search, one to confirm.")
        if not 0 < self.confirm_fraction < 1:
            raise ConfigError(
                f"`0 < evaluation.confirm_fraction < 1` must hold, got {self.confirm_fraction}. "
                "Both the search and the verdict need data; the default is 0.5."
            )
        require_at_least("evaluation.recalibrate_batches", self.recalibrate_batches, 0, "0 keeps the merged ones.")
        require_at_least("evaluation.cache_batches", self.cache_bytes, 0, "0 keeps no batches.")

    @property
    def cache_bytes(self) -> int:
        """``cache_batches`` in bytes."""
        if isinstance(self.cache_batches, int) or self.cache_batches.strip() == "0":
            return int(self.cache_batches)
        return parse_size(self.cache_batches, "evaluation.cache_batches")


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """Contents of an artifact.

    Args:
        formats: ``safetensors`` (always written) and, on request, ``ckpt`` (a weights-only Lightning checkpoint) and
            ``hf`` (a directory that ``from_pretrained`` opens, of the transformers or PEFT model inside the module).
        max_shard_size: Largest weights file, such as ``"5GB"`` or ``"500MB"``; larger models are sharded.
        adapters: How LoRA layers of PEFT are merged, for both the search and the artifact. ``factors``: ``A`` and
            ``B`` are averaged each, the rank stays. ``products``: the sum of the products ``B A``, exactly, which has
            the rank of all merged snapshots together.
    """

    formats: tuple[ArtifactFormat, ...] = ("safetensors",)
    max_shard_size: str = "5GB"
    adapters: AdapterMerge = "factors"

    def __post_init__(self) -> None:
        check_fields(self, "artifact")
        parse_size(self.max_shard_size, "artifact.max_shard_size")
        if self.adapters == "products" and "ckpt" in self.formats:
            raise ConfigError(
                '`artifact.adapters` "products" gives LoRA layers another rank, which no checkpoint of the module can '
                f'hold, got `artifact.formats` {", ".join(self.formats)}. Leave "ckpt" out; "hf" holds them.'
            )


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """Conditions that make a search due. Without a trigger: each quarter of the run, where its length is known.

    Args:
        every_n_train_steps: Optimizer steps between searches.
        every_n_epochs: Epochs between searches.
        train_time_interval: Training time between searches.
        on_train_end: Whether to search when ``fit`` ends.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    on_train_end: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        names = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"only one of {', '.join(names)} may be set, got {' and '.join(given)}. Keep one.")
        for name in names[:2]:
            require_at_least(name, getattr(self, name), 1, "Leave it out for the default triggers.")
        if self.train_time_interval is not None and self.train_time_interval <= timedelta(0):
            raise ConfigError(
                f"`train_time_interval > 0` must hold, got {self.train_time_interval}. Leave it out for the default "
                "triggers."
            )


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """All settings of one callback.

    Args:
        objectives: The metrics to search by, at least one; charts and ``save_top_k`` go by the first.
        triggers: Conditions that make a search due.
        dirpath: Where artifacts go; ``None``: beside the logger's files.
        save_top_k: Artifacts that keep their weights, by value; -1: all, 0: none.
        buffer: Contents and place of the buffer.
        search: How a search spends its trials.
        evaluation: The data that score candidates.
        artifact: Contents of an artifact.
        apply: Whether the best merge is loaded into the module after training.
        on_error: Whether a failing search is reported or raised.
        check_mode: Whether to refuse a mode that contradicts the metric.

    Raises:
        ConfigError: The parts contradict each other.
    """

    objectives: tuple[Objective, ...]
    triggers: Triggers = Triggers()
    dirpath: str | Path | None = None
    save_top_k: int = 1
    buffer: BufferConfig = BufferConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    artifact: ArtifactConfig = ArtifactConfig()
    apply: Apply = "emit"
    on_error: OnError = "warn"
    check_mode: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_modes({})
        require_at_least("save_top_k", self.save_top_k, -1, "-1 keeps all artifacts.")
        if self.dirpath is not None and not os.fspath(self.dirpath):
            raise ConfigError("`dirpath` must name a directory, got ''. Leave it out for the default, or write '.'.")
        needed = make_space(self.search.space).snapshot
        if needed not in (None, self.buffer.snapshot):
            raise ConfigError(
                f"`search.space` {self.space_name} needs {needed} snapshots, got `buffer.snapshot` "
                f"{self.buffer.snapshot!r}. Set it to {needed!r}, or search another space."
            )
        self._check_search()
        if self.apply == "on_train_end" and self.artifact.adapters == "products":
            raise ConfigError(
                '`apply` "on_train_end" would give the module\'s LoRA layers another rank, got `artifact.adapters` '
                '"products". Use "factors", or load the artifact after training.'
            )

    def after_decay(self) -> MergeSettings:
        """Return these settings for a search near the latest weights: in `tail`, with few candidates."""
        few = min(self.search.n_trials, TAIL_TRIALS)
        return replace(self, search=replace(self.search, space="tail", n_trials=few, anchors=[], refine=None))

    @property
    def monitors(self) -> list[str]:
        """The names of the monitored metrics."""
        return [o.monitor for o in self.objectives]

    @property
    def has_several(self) -> bool:
        """Whether the search is for a Pareto front."""
        return len(self.objectives) > 1

    @property
    def space_name(self) -> str:
        """The space's name, in lower case."""
        return make_space(self.search.space).space_name

    @property
    def raises(self) -> bool:
        """Whether a failing search ends training."""
        return self.on_error == "raise"

    def check_modes(self, higher_is_better: Mapping[str, bool]) -> None:
        """Raise ``ConfigError`` where a metric, or the object that logs it, contradicts its ``mode``."""
        if self.check_mode:
            require_modes([*self.objectives, *self.search.constraints], higher_is_better)

    def _check_search(self) -> None:
        search, num = self.search, len(self.objectives)
        if search.where == "follower" and self.buffer.storage != "disk":
            raise ConfigError(
                f'`search.where` "follower" needs snapshots that other processes can read, got `buffer.storage` '
                f"{self.buffer.storage!r}. Set it to 'disk'."
            )
        if search.where == "follower" and self.apply == "on_train_end":
            raise ConfigError(
                '`search.where` "follower" may have its result after training only, got `apply` "on_train_end". Use '
                '"emit", and `load_merged` once `ckmerge follow` has ended.'
            )
        if self.has_several and search.terminator is not None:
            raise ConfigError(f"`search.terminator` follows one metric, got {num} in `monitor`. Name one.")
        if self.has_several and search.refine is not None:
            raise ConfigError(
                f"`search.refine` follows the gradient of one metric, got {num} in `monitor`. Name one, or leave it "
                "out."
            )
        if search.refine is not None and self.artifact.adapters == "products":
            raise ConfigError(
                '`search.refine` needs `artifact.adapters` "factors", got "products". Use that, or leave it out.'
            )
