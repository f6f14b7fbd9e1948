"""The search over checkpoints on disk."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import Claim, Place, home_of, keep_snapshots
from lightning_ckmerge.checkpoints.formats import Source, run_sources
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, EvaluationConfig, MergeSettings, SearchConfig
from lightning_ckmerge.core.objectives import Mode, make_objectives
from lightning_ckmerge.core.outcome import SearchOutcome
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.distributed.comm import on_rank_zero
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.pipeline import Scorer, SearchJob, join_search, run_search
from lightning_ckmerge.plugin.dirpath import find_fault, local_root_of
from lightning_ckmerge.plugin.offline.scoring import CheckpointScoring, at_train_start, data_of, make_trainer
from lightning_ckmerge.plugin.progress import OnScored, say
from lightning_ckmerge.plugin.publish.publisher import Publisher


def search_checkpoints(
    module: LightningModule,
    val_dataloaders: Any,
    paths: str | Path | Sequence[str | Path],
    *,
    monitor: str | list[str] = "val_loss",
    mode: Mode | list[Mode] = "min",
    dirpath: str | Path = "merges",
    search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
    artifact: ArtifactConfig = ArtifactConfig(),  # noqa: B008
    save_top_k: int = 1,
    train_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    key: str | None = None,
    last: int | None = None,
    check_mode: bool = True,
) -> Artifact:
    """Search for the best merge of checkpoints on disk, as the callback does during training, and publish it.

    The newest checkpoint is the latest weights, which the module holds afterwards; `load_merged` loads the merge.
    Called again with the same checkpoints, it goes on where it was; others have a directory of their own below
    ``dirpath``, as a second run has: ``run=2``.

    Args:
        module: The LightningModule that was trained, built as it was; its weights do not matter.
        val_dataloaders: The loaders that candidates are scored on, as ``Trainer.fit`` takes them.
        paths: Checkpoints in any format that ``ckmerge merge`` reads, directories of them, or patterns such as
            ``"checkpoints/*.ckpt"``. Each must tell its step, in the file or in its name; that gives their order.
        monitor: As the callback's.
        mode: As the callback's.
        dirpath: Where the artifact goes, as the callback's.
        search: How the search spends its trials. All of them run: ``min_gain_left`` ends none early.
        evaluation: On what candidates are scored.
        artifact: What the artifact holds.
        save_top_k: As the callback's.
        train_dataloaders: Training loaders, which ``evaluation.recalibrate_batches`` needs.
        trainer: Arguments for the Trainer, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``; one device.
        key: The entry that holds the weights in a torch file, where it is not Lightning's.
        last: Use the newest so many checkpoints.
        check_mode: As the callback's.

    Returns:
        The artifact; ``artifact.manifest["verdict"]`` says whether merging helps. Unless that is ``rejected``, or
        ``save_top_k`` is 0, it holds weights.

    Raises:
        ArtifactError: The checkpoints cannot be read, or do not fit the module.
        ConfigError: An argument is outside its range, or nothing can be written to ``dirpath``.
        MonitorError: Validation does not log ``monitor``.
    """
    settings = MergeSettings(
        objectives=make_objectives(monitor, mode),
        dirpath=dirpath,
        save_top_k=save_top_k,
        buffer=BufferConfig(snapshot="point"),  # as checkpoints are
        search=search,
        evaluation=evaluation,
        artifact=artifact,
        on_error="raise",
        check_mode=check_mode,
    )
    sources = find_sources(paths, key, last)
    made = make_trainer(trainer)
    data = data_of(module, train_dataloaders, val_dataloaders, settings.evaluation)
    found = search_sources(made, module, data, settings, sources, local_root_of(made, dirpath))
    assert isinstance(found, Artifact)
    return found


def search_sources(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    settings: MergeSettings,
    sources: Sequence[Source],
    dirpath: Path,
    *,
    help_only: bool = False,
    on_scored: OnScored = lambda trial, total: None,
) -> Artifact | int:
    """Search over checkpoints, the newest being the latest weights, and publish.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: Gets the newest checkpoint's weights.
        data: What ``fit`` takes beside the module.
        settings: What the search was asked for.
        sources: Checkpoints, oldest first, each with its step.
        dirpath: Where artifacts go.
        help_only: Score candidates of a search that another process publishes.
        on_scored: Told of each scored trial, and of how many are expected in all.

    Returns:
        The artifact, or how many candidates were scored here if ``help_only``.

    Raises:
        ConfigError: Nothing can be written to ``dirpath``.
    """
    if fault := find_fault(dirpath):
        raise ConfigError(fault)

    def find(trainer: Trainer, callback: Callback) -> Artifact | int:
        search = OfflineSearch(settings, trainer, callback, dirpath, sources, on_scored)
        return search.help_on() if help_only else search.run()

    return at_train_start(trainer, module, data, find)


def find_sources(paths: str | Path | Sequence[str | Path], key: str | None, last: int | None) -> list[Source]:
    """Return checkpoints, oldest first, from files, directories and patterns; see ``run_sources``."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return run_sources([path for each in given for path in _matches(each)], key, last)


def _matches(path: str | Path) -> list[Path]:
    """Return the files that a pattern names; anything else names itself."""
    if not (isinstance(path, str) and glob.has_magic(path)) or os.path.lexists(path):
        return [Path(path)]
    found = [Path(name) for name in sorted(glob.glob(path))]
    if not found:
        raise ArtifactError(f"a pattern must match a checkpoint, got {path!r}, which matches nothing. Correct it.")
    return found


class OfflineSearch:
    """One search whose snapshots are checkpoints on disk.

    Args:
        settings: What the search was asked for.
        trainer: The Trainer, inside ``fit``, before the first step.
        callback: Told of batches in place of the muted others.
        dirpath: Where artifacts go.
        sources: Checkpoints, oldest first, each with its step; the last one is loaded into the module.
        on_scored: Told of each scored trial.
        segments: As for ``CheckpointScoring``.

    Attributes:
        offline: Scores them.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        dirpath: Path,
        sources: Sequence[Source],
        on_scored: OnScored,
        segments: Sequence[Segment] | None = None,
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._on_scored = on_scored
        self.offline = CheckpointScoring(settings, trainer, callback, sources, segments)
        self._dirpath = dirpath

    def find(self, scorer: Scorer) -> SearchOutcome:
        """Search with the scorer of this search, and publish nothing."""
        return run_search(self._make_job(scorer, self._known_place()))

    def run(self) -> Artifact:
        """Search and publish, in the place of these checkpoints alone."""
        claim = Claim(self._dirpath, self.offline.run_id)
        try:
            keep_snapshots(claim.place.dirpath)  # if it is interrupted, no other search takes the place
            return self._search(claim.place)
        finally:
            claim.release()

    def help_on(self) -> int:
        """Help another process that publishes, and return how many candidates were scored here."""
        with self.offline.paused() as scorer:
            return join_search(self._make_job(scorer, self._known_place()))

    def _known_place(self) -> Place:
        run_id = self.offline.run_id
        return Place(dirpath=home_of(self._dirpath, run_id) or self._dirpath, run_id=run_id, source=None)

    def _search(self, place: Place) -> Artifact:
        for note in place.notes:
            say(self._trainer, note)
        publisher = Publisher(self._settings, self._trainer, place, self.offline.model, keeps_newest=True)
        with self.offline.paused() as scorer:
            job = self._make_job(scorer, place)
            outcome = run_search(job)
            artifact = publisher.publish(outcome, job, ())
        publisher.announce(outcome, artifact, sum(outcome.cost.seconds.values()))
        return artifact

    def _make_job(self, scorer: Scorer, place: Place) -> SearchJob:
        return SearchJob(
            # The same checkpoints make the same study, so that a search that was interrupted goes on.
            name=f"{place.run_id}-step={self.offline.step:09d}",
            step=self.offline.step,
            settings=self._settings,
            space=self.offline.model.space,
            scorer=scorer,
            allowed_s=self._settings.search.timeout_s,
            journal=place.dirpath / "study.journal",
            on_scored=self._on_scored,
            agree=partial(on_rank_zero, self.offline.model.comm),
            shared=True,
            adapters=self.offline.model.adapter_merge,
        )
