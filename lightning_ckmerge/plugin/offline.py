"""The search over checkpoints on disk, and the plan of a run, both from a LightningCLI config.

The search runs where a training run would begin: in ``fit``, with everything set up and no step taken. So candidates
are scored by the same code as during training.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_ckmerge.artifact.files import file_record
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.offline import listed
from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.artifact.sources import Source
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.core.layout import as_real
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import ArtifactError, CkmergeError, ConfigError
from lightning_ckmerge.pipeline import Bench, SearchJob, join_search
from lightning_ckmerge.plugin.callback import CheckpointMergeCallback
from lightning_ckmerge.plugin.progress import OnScored
from lightning_ckmerge.plugin.run import MergeRun
from lightning_ckmerge.plugin.run_length import RunLength


@dataclass(frozen=True, kw_only=True)
class Configured:
    """What a config builds.

    Args:
        callbacks: The merge callbacks among the Trainer's.
    """

    trainer: Trainer
    module: LightningModule
    datamodule: LightningDataModule | None
    callbacks: list[CheckpointMergeCallback]


def build(
    config: Mapping[str, Any],
    *,
    model_class: str | None = None,
    data_class: str | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Configured:
    """Build Trainer, module and datamodule as LightningCLI does.

    Args:
        config: A config for ``fit``, as YAML or ``SaveConfigCallback`` have it.
        model_class: Import path, where the user's own LightningCLI fixes the class and the config leaves it out.
        data_class: Likewise.
        trainer: Arguments that take the place of the config's.

    Raises:
        ConfigError: The config does not fit the classes.
    """
    sections = dict(config["fit"] if isinstance(config.get("fit"), Mapping) else config)
    # Arguments of `fit` itself: LightningCLI has no place for them where it only builds.
    for name in ("ckpt_path", "weights_only", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"):
        sections.pop(name, None)
    sections["trainer"] = {**(sections.get("trainer") or {}), **(trainer or {})}
    try:
        with warnings.catch_warnings():
            # It wants no arguments beside a command line, which is ours.
            warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter")
            cli = LightningCLI(
                _imported(model_class),
                _imported(data_class),
                run=False,
                args=sections,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False},
            )
    except (SystemExit, Exception) as error:  # the first is how some parsers refuse
        fault = _fault(error)
        raise ConfigError(
            f"the config must be one that `fit` runs with, got {fault}. Run from the directory where training was "
            "started, or name classes that the config leaves out with --model-class and --data-class."
        ) from error
    callbacks: list[Callback] = getattr(cli.trainer, "callbacks")  # noqa: B009 - set where mypy cannot see it
    return Configured(
        trainer=cli.trainer,
        module=cli.model,
        datamodule=cli.datamodule,
        callbacks=[c for c in callbacks if isinstance(c, CheckpointMergeCallback)],
    )


def search_checkpoints(
    configured: Configured,
    callback: CheckpointMergeCallback,
    sources: Sequence[Source],
    dirpath: Path,
    *,
    help_only: bool,
    on_scored: OnScored,
) -> Artifact | int:
    """Search over checkpoints, the newest being the latest weights, and publish.

    Args:
        configured: One device, no logger.
        callback: Holds the arguments of the search.
        sources: Checkpoints, oldest first, each with its step.
        dirpath: Where artifacts go.
        help_only: Score candidates of a search that another process publishes.
        on_scored: Told of each scored trial, and of how many are expected in all.

    Returns:
        The artifact, or how many candidates were scored here if ``help_only``.
    """
    trainer = configured.trainer

    def make_run(host: CheckpointMergeCallback, trainer: Trainer) -> OfflineRun:
        return OfflineRun(host, trainer, dirpath, sources, help_only, on_scored)

    host = _Host(callback, make_run)
    # Nothing of the run's own shall happen: no checkpoint, no early stop, no bar.
    getattr(trainer, "callbacks")[:] = [host]  # noqa: B009
    configured.module.configure_callbacks = list  # type: ignore[method-assign]
    trainer.fit(configured.module, datamodule=configured.datamodule)
    assert host.result is not None
    return host.result


class _Host(CheckpointMergeCallback):
    """Searches where training would begin, and lets it end there.

    One of our own callbacks, since a search listens to the batches through it.
    """

    def __init__(self, merge: CheckpointMergeCallback, make_run: Callable[[_Host, Trainer], OfflineRun]) -> None:
        vars(self).update(vars(merge))
        self._make_run = make_run
        self.result: Artifact | int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: one device is always served."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        trainer.should_stop = True
        run = self._make_run(self, trainer)
        try:
            self.result = run.find()
        finally:
            run.close()


class OfflineRun(MergeRun):
    """One search whose snapshots are checkpoints on disk.

    Args:
        callback: Holds the arguments.
        trainer: The Trainer, inside ``fit``, before the first step.
        dirpath: Where artifacts go.
        sources: Checkpoints, oldest first, each with its step; the last one is loaded into the module.
        help_only: Score candidates of a search that another process publishes.
        on_scored: Told of each scored trial.
    """

    def __init__(
        self,
        callback: CheckpointMergeCallback,
        trainer: Trainer,
        dirpath: Path,
        sources: Sequence[Source],
        help_only: bool,
        on_scored: OnScored,
    ) -> None:
        self._sources = sources
        self._help_only = help_only
        self._on_scored = on_scored
        _load(sources[-1], trainer.lightning_module)
        # The same checkpoints make the same study, so that a search that was interrupted goes on.
        names = "\n".join(f"{s.step} {s.path.name}" for s in sources)
        run_id = hashlib.sha256(names.encode()).hexdigest()[:8]
        super().__init__(callback, trainer, Place(dirpath=dirpath, run_id=run_id, source=None))

    @property
    def step(self) -> int:
        """The newest checkpoint's."""
        step = self._sources[-1].step
        assert step is not None
        return step

    def find(self) -> Artifact | int:
        """Search and publish, or help another process that does."""
        if self._help_only:
            with self._standing_still() as job:
                return join_search(job)
        artifact = self.search()
        assert artifact is not None, "an offline search raises what goes wrong"
        return artifact

    def _say_plan(self, length: RunLength) -> None:
        """Nothing: there is no run."""

    def _snapshots(self) -> list[Snapshot]:
        """The checkpoints but the newest, which is in the module."""
        steps = [0, *(s.step or 0 for s in self._sources)]
        hashes = [tuple(file_record(path)["sha256"] for path in s.files) for s in self._sources[:-1]]
        return [
            Snapshot(
                segment=Segment(kind="point", first_step=before + 1, last_step=step),
                sha256=files[0] if len(files) == 1 else None,
                files_sha256=files if len(files) > 1 else (),
                tensors=[as_real(source.weights[slot.name]) for slot in self._model.layout.slots],
            )
            for source, files, (before, step) in zip(self._sources[:-1], hashes, pairwise(steps), strict=False)
        ]

    def _make_job(self, bench: Bench, on_scored: OnScored) -> SearchJob:
        """There is no training time that a share could be taken of."""
        return replace(
            super()._make_job(bench, self._on_scored),
            shared=True,
            training_s=0.0,
            allowed_s=self.callback.search.timeout_s,
            allowed_by="search.timeout_s",
        )


def _load(source: Source, module: LightningModule) -> None:
    """Load a checkpoint's weights into the module."""
    state = {n: t for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    shaped = {n for n in state.keys() & source.specs.keys() if source.specs[n].shape != tuple(state[n].shape)}
    faults = {
        "of another shape": shaped,
        f"missing from {source.path.name}": state.keys() - source.specs.keys(),
        "unknown to the module": source.specs.keys() - state.keys(),
    }
    if found := "; ".join(f"{listed(names)} {fault}" for fault, names in faults.items() if names):
        raise ArtifactError(
            f"the checkpoints must be {type(module).__name__}'s, got {found}. Use the config of the run that "
            "wrote them."
        )
    module.load_state_dict({name: source.weights[name] for name in state}, strict=False)


def _imported(path: str | None) -> Any:
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"a class must be named by its import path, got {path!r}: {error}.") from error


def _fault(error: BaseException) -> str:
    """What was wrong: our own error, which parsers bury in all the types that an argument could have, or theirs."""
    innermost: BaseException | None = error
    while innermost is not None and not isinstance(innermost, CkmergeError):
        innermost = innermost.__cause__ or innermost.__context__
    return f"{type(innermost or error).__name__}: {innermost or error}"
