"""The search over checkpoints on disk.

The search runs where a training run would begin: in ``fit``, with everything set up and no step taken. So candidates
are scored by the same code as during training.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.checkpoints.formats import Source, run_sources
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, EvaluationConfig, MergeSettings, SearchConfig
from lightning_ckmerge.core.layout import as_real
from lightning_ckmerge.core.objectives import Mode, make_objectives
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.distributed.comm import on_rank_zero
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.pipeline import Bench, SearchJob, join_search, run_search
from lightning_ckmerge.plugin.evaluate.scorer import BenchMaker
from lightning_ckmerge.plugin.progress import OnScored
from lightning_ckmerge.plugin.publish.publisher import Publisher
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.tensorfiles.durable import file_record

# One process, one device: more of them share the trials of one storage.
ALONE: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "min_epochs": None,
    "min_steps": None,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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
) -> Artifact:
    """Search for the best merge of checkpoints on disk, as the callback does during training, and publish it.

    The newest checkpoint is the latest weights, which the module holds afterwards; `load_merged` loads the merge.
    Called again after an interruption, it goes on.

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

    Returns:
        The artifact; ``artifact.manifest["verdict"]`` says whether merging helps.

    Raises:
        ArtifactError: The checkpoints cannot be read, or do not fit the module.
        ConfigError: An argument is outside its range.
        MonitorError: Validation does not log ``monitor``.
    """
    settings = MergeSettings(
        objectives=make_objectives(monitor, mode),
        save_top_k=save_top_k,
        buffer=BufferConfig(snapshot="point"),  # as checkpoints are
        search=search,
        evaluation=evaluation,
        artifact=artifact,
        on_error="raise",
    )
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    sources = run_sources([path for each in given for path in _matches(each)], key, last)
    made = Trainer(**{**ALONE, "max_epochs": 1, "enable_checkpointing": False, **(trainer or {})})
    if made.world_size != 1:
        raise ConfigError(
            f"a search over checkpoints takes one device, got {made.world_size} in `trainer`. Several processes share "
            "one search over `search.storage`: see `ckmerge search --worker`."
        )
    data = {"train_dataloaders": _training_data(module, train_dataloaders, evaluation)}
    found = search_sources(
        made, module, {**data, "val_dataloaders": val_dataloaders}, settings, sources, Path(dirpath).absolute()
    )
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
    """

    def find(trainer: Trainer, callback: Callback) -> Artifact | int:
        search = OfflineSearch(settings, trainer, callback, dirpath, sources, on_scored)
        return search.help_on() if help_only else search.run()

    host = _Host(find)
    # Nothing of the run's own shall happen: no checkpoint, no early stop, no bar.
    getattr(trainer, "callbacks")[:] = [host]  # noqa: B009
    own = vars(module).get("configure_callbacks")
    module.configure_callbacks = list  # type: ignore[method-assign]
    try:
        trainer.fit(module, **data)
    finally:
        del module.configure_callbacks
        if own is not None:
            module.configure_callbacks = own  # type: ignore[method-assign]
    assert host.result is not None
    return host.result


def _matches(path: str | Path) -> list[Path]:
    """Return the files that a pattern names; anything else names itself."""
    if isinstance(path, str) and glob.has_magic(path) and not os.path.lexists(path):
        return [Path(found) for found in sorted(glob.glob(path))]
    return [Path(path)]


def _training_data(module: LightningModule, given: Any, evaluation: EvaluationConfig) -> Any:
    """Return training loaders: ``fit`` wants some, though no step is taken."""
    if given is not None or is_overridden("train_dataloader", module):
        return given
    if evaluation.recalibrate_batches:
        raise ConfigError(
            "`evaluation.recalibrate_batches` needs training data, got neither `train_dataloaders` nor a module with "
            "`train_dataloader`. Pass the loader, or leave it at 0."
        )
    return DataLoader([0])  # type: ignore[arg-type]


class _Host(Callback):
    """Searches where training would begin, and lets it end there.

    Args:
        find: The search; it listens to the batches through this callback.
    """

    def __init__(self, find: Callable[[Trainer, Callback], Artifact | int]) -> None:
        self._find = find
        self.result: Artifact | int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        trainer.should_stop = True
        self.result = self._find(trainer, self)


class OfflineSearch:
    """One search whose snapshots are checkpoints on disk.

    Args:
        settings: What the search was asked for.
        trainer: The Trainer, inside ``fit``, before the first step.
        callback: Told of batches in place of the muted others.
        dirpath: Where artifacts go.
        sources: Checkpoints, oldest first, each with its step; the last one is loaded into the module.
        on_scored: Told of each scored trial.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        dirpath: Path,
        sources: Sequence[Source],
        on_scored: OnScored,
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._sources = sources
        self._on_scored = on_scored
        _load(sources[-1], trainer.lightning_module)
        # The same checkpoints make the same study, so that a search that was interrupted goes on.
        names = "\n".join(f"{s.step} {s.path.name}" for s in sources)
        run_id = hashlib.sha256(names.encode()).hexdigest()[:8]
        self._place = Place(dirpath=dirpath, run_id=run_id, source=None)
        bucket_bytes = parse_size(settings.buffer.bucket_size)
        self._model = RankModel(trainer.lightning_module, settings.search.space, settings.artifact, bucket_bytes)
        self._bench_maker = BenchMaker(settings, callback, trainer, self._model, lambda: None)
        assert sources[-1].step is not None
        self._step = sources[-1].step

    def run(self) -> Artifact:
        """Search and publish."""
        publisher = Publisher(self._settings, self._trainer, self._place, self._model)
        with self._bench_maker.standing_still(self._snapshots, self._step) as bench:
            job = self._make_job(bench)
            outcome = run_search(job)
            artifact = publisher.publish(outcome, job, ())
        publisher.announce(outcome, artifact, sum(outcome.cost.seconds.values()))
        self._bench_maker.check_traces()
        return artifact

    def help_on(self) -> int:
        """Help another process that publishes, and return how many candidates were scored here."""
        with self._bench_maker.standing_still(self._snapshots, self._step) as bench:
            return join_search(self._make_job(bench))

    def _snapshots(self) -> list[Snapshot]:
        """Return the checkpoints but the newest, which is in the module."""
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

    def _make_job(self, bench: Bench) -> SearchJob:
        """There is no training time that a share could be taken of."""
        return SearchJob(
            name=f"{self._place.run_id}-step={self._step:09d}",
            step=self._step,
            settings=self._settings,
            space=self._model.space,
            bench=bench,
            allowed_s=self._settings.search.timeout_s,
            allowed_by="search.timeout_s",
            searched_s=0.0,
            training_s=0.0,
            previous=None,
            validated=(),
            searched=(),
            notes=(),
            journal=self._place.dirpath / "study.journal",
            on_scored=self._on_scored,
            agree=partial(on_rank_zero, self._model.comm),
            shared=True,
            adapters=self._model.adapter_merge,
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
