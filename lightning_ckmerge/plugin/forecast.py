"""What can be known of a run from its config alone, and the plan that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ckmerge.artifact.timeline import TIMELINE_NAME
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.errors import ConfigError, UnsupportedError
from lightning_ckmerge.plugin.cli_config import Configured
from lightning_ckmerge.plugin.loaders import length_of, limited
from lightning_ckmerge.plugin.plan import Known, Plan, make_plan
from lightning_ckmerge.plugin.rank_model import RankModel
from lightning_ckmerge.plugin.strategies import check_supported
from lightning_ckmerge.plugin.triggers import run_length
from lightning_ckmerge.plugin.whereabouts import find_fault, root_of


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """A run's loaders; ``None`` where they could not be had without it."""

    train: list[Any] | None
    val: list[Any] | None


def forecast(configured: Configured, settings: MergeSettings) -> Plan:
    """Return one callback's plan. Loaders are built but not read; nothing is trained, written or moved to a GPU."""
    trainer: Any = configured.trainer
    warnings: list[str] = []
    loaders = _loaders(configured, warnings)
    num_ranks = trainer.num_devices * trainer.num_nodes
    _configure_model(configured, warnings)
    train = [_batches(loader, trainer.limit_train_batches, num_ranks) for loader in loaders.train or ()]
    # Of several training loaders, shorter ones begin anew.
    length = run_length(trainer, max(train, default=math.inf), _steps_per_update(configured, warnings))
    val = loaders.val
    dirpath, fault = _directory(trainer, settings)
    known = Known(
        length=length,
        val_batches=None if val is None else [_batches(v, trainer.limit_val_batches, num_ranks) for v in val],
        dirpath=dirpath,
        num_ranks=num_ranks,
        holders=num_ranks,
    )
    model = RankModel(
        configured.module, settings.search.space, settings.artifact, parse_size(settings.buffer.bucket_size)
    )
    plan = make_plan(settings, trainer, model, known)
    plan.warnings[:0] = warnings
    plan.warnings += _warnings(trainer, known)
    plan.faults += [*([fault] if fault is not None else []), *_faults(settings, trainer, known)]
    return plan


def _directory(trainer: Any, settings: MergeSettings) -> tuple[Path, str | None]:
    """Return where artifacts go, or what that is below, and why they cannot."""
    try:
        dirpath = root_of(trainer, settings.dirpath)
    except ConfigError as error:
        return Path(trainer.default_root_dir), str(error)
    return dirpath, find_fault(dirpath)


def _loaders(configured: Configured, warnings: list[str]) -> Loaders:
    """Return the loaders that can be had without a run."""
    owner: Any = configured.datamodule or configured.module
    found: dict[str, list[Any]] = {}
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


def _batches(loader: Any, limit: float, num_ranks: int) -> float:
    """Return the batches that each rank takes of a loader, whose samples Lightning deals out."""
    length = length_of(loader)
    is_dealt = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if is_dealt and num_ranks > 1 and not isinstance(loader.sampler, DistributedSampler):
        batch = length_of(loader.sampler) / max(1, length)
        samples = math.ceil(length_of(loader.sampler) / num_ranks)
        size = loader.batch_size or batch
        length = samples // size if loader.drop_last else math.ceil(samples / size)
    return length if math.isinf(length) and isinstance(limit, float) else limited(length, limit)


def _configure_model(configured: Configured, warnings: list[str]) -> None:
    try:
        configured.module.configure_model()
    except Exception as error:  # it may want the strategy's mesh
        warnings.append(
            f"`configure_model` could not run here ({type(error).__name__}: {error}): what it builds is not counted."
        )


def _steps_per_update(configured: Configured, warnings: list[str]) -> int | None:
    """Return how many optimizers are stepped by hand; 1 where Lightning steps the only one."""
    if configured.module.automatic_optimization:
        return 1
    try:
        made: Any = configured.module.configure_optimizers()
    except Exception as error:  # it may want the run's length, or the strategy
        warnings.append(
            f"`configure_optimizers` could not run here ({type(error).__name__}: {error}): under manual optimization "
            "the run's length is known from `max_steps` alone."
        )
        return None
    # Optimizers alone, or with their schedulers as a second list, or each in a dict with its own.
    optimizers = made[0] if isinstance(made, tuple) and made and isinstance(made[0], (list, tuple)) else made
    return len(optimizers) if isinstance(optimizers, (list, tuple)) else 1


def _faults(settings: MergeSettings, trainer: Any, known: Known) -> list[str]:
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


def _warnings(trainer: Any, known: Known) -> list[str]:
    found = []
    if (known.dirpath / TIMELINE_NAME).is_file():
        found.append(
            f"{known.dirpath} holds the artifacts of an earlier run: a new one goes to a directory of its own below, "
            "`run=2` or later, and one that is resumed goes on where it has been."
        )
    if trainer.fast_dev_run:
        found.append("The callback does nothing in a `fast_dev_run`: this plan is not of the run itself.")
    return found
