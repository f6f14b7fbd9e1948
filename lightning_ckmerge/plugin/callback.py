"""``CheckpointMergeCallback``: arguments and hooks. Their work is in ``run.py``."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ckmerge.artifact.load import Artifact, best_target
from lightning_ckmerge.artifact.runs import Place, keep_snapshots
from lightning_ckmerge.checks import checked
from lightning_ckmerge.config import (
    Apply,
    ArtifactConfig,
    BufferConfig,
    EvaluationConfig,
    MergeSettings,
    OnError,
    SearchConfig,
    Triggers,
)
from lightning_ckmerge.core.objectives import Mode, make_objectives
from lightning_ckmerge.distributed.comm import connect, together
from lightning_ckmerge.errors import CkmergeError, ConfigError, UnsupportedError, explain
from lightning_ckmerge.plugin.dirpath import (
    ClaimedDirpath,
    Destination,
    SpawnedDirpath,
    find_destination_fault,
    resolve_dirpath,
)
from lightning_ckmerge.plugin.evaluate.lightning_loop import directions, logged_names
from lightning_ckmerge.plugin.evaluate.validation import require_logged
from lightning_ckmerge.plugin.evaluate.weight_gradients import loss_of
from lightning_ckmerge.plugin.progress import say
from lightning_ckmerge.plugin.run import MergeRun
from lightning_ckmerge.plugin.strategies import check_supported
from lightning_ckmerge.search.study import open_storage

SANITY_STAGE = RunningStage.SANITY_CHECKING.value


class CheckpointMergeCallback(Callback):
    """Searches, during training, for the best merge of the recent weights, and publishes it.

    Training itself is not changed by a single bit. Artifacts appear under ``dirpath``; ``dirpath/best`` is the best
    accepted one. With no trigger set, a search runs after each quarter of the run, where its length is known.

    Args:
        monitor: A metric that validation logs. Of several the Pareto front is searched: the artifact is its knee and
            holds other merges of the front under ``front/``; charts and ``save_top_k`` go by the first metric.
        mode: ``min`` if lower is better, ``max`` if higher is; of several metrics, one for all or one for each.
        dirpath: Where artifacts go; ``None``: ``merges/`` in the logger's directory, else in ``default_root_dir``.
        save_top_k: Artifacts that keep their weights, by value; -1: all, 0: none. The best accepted one is never
            deleted. Unless it is 0, an unconfirmed merge is kept beside them until the next that is not rejected.
        every_n_train_steps: Optimizer steps between searches.
        every_n_epochs: Epochs between searches.
        train_time_interval: Training time between searches.
        search_on_train_end: Whether to search when ``fit`` ends, also by EarlyStopping or Ctrl-C. Not after a decay of
            the learning rate, unless ``search.at_low_lr`` says so.
        buffer: Contents and place of the buffer.
        search: How a search spends its trials.
        evaluation: The data that score candidates.
        artifact: Contents of an artifact.
        apply: ``emit``: never touch the module. ``on_train_end``: load the best accepted merge into the module after
            training, if it is better than the final weights on the batches that no search has chosen by.
        on_error: ``warn``: a failing search is reported, and training continues. ``raise``: it ends training.
        check_mode: Refuse a ``mode`` that contradicts the metric's name, or ``higher_is_better`` of the logged
            torchmetrics object. ``False`` accepts it.

    Raises:
        ConfigError: An argument is outside its range, or arguments contradict each other.

    Source:
        Liu et al. 2024, arXiv:2403.19390, whose method is ``search.space="pairwise"``.
    """

    @checked()
    def __init__(
        self,
        monitor: str | list[str] = "val_loss",
        mode: Mode | list[Mode] = "min",
        dirpath: str | Path | None = None,
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        search_on_train_end: bool = True,
        buffer: BufferConfig = BufferConfig(),  # noqa: B008 - frozen
        search: SearchConfig = SearchConfig(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        artifact: ArtifactConfig = ArtifactConfig(),  # noqa: B008
        apply: Apply = "emit",
        on_error: OnError = "warn",
        check_mode: bool = True,
    ) -> None:
        self.settings = MergeSettings(
            objectives=make_objectives(monitor, mode),
            triggers=Triggers(
                every_n_train_steps=every_n_train_steps,
                every_n_epochs=every_n_epochs,
                train_time_interval=train_time_interval,
                on_train_end=search_on_train_end,
            ),
            dirpath=dirpath,
            save_top_k=save_top_k,
            buffer=buffer,
            search=search,
            evaluation=evaluation,
            artifact=artifact,
            apply=apply,
            on_error=on_error,
            check_mode=check_mode,
        )
        self._space_name = self.settings.space_name  # Lightning reads `state_key` at each hook
        self._run: MergeRun | None = None
        self._claimed: ClaimedDirpath | None = None
        self._destination: Destination | None = None
        self._resolved_dirpath: Path | None = None
        self._spawned = SpawnedDirpath()
        self._state: dict[str, Any] | None = None
        self._last_state: dict[str, Any] = {}
        self._monitor_seen = False

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the run in progress: modules may keep callbacks in hyperparameters, which checkpoints hold."""
        return {**vars(self), "_run": None, "_claimed": None}

    @property
    def state_key(self) -> str:
        """Tells several callbacks of one Trainer apart in a checkpoint."""
        dirpath = None if self.settings.dirpath is None else str(self.settings.dirpath)
        monitor = ",".join(self.settings.monitors)
        return f"{type(self).__qualname__}{ ({'monitor': monitor, 'space': self._space_name, 'dirpath': dirpath})!r}"

    @property
    def best_artifact(self) -> Artifact | None:
        """The best accepted artifact so far, read from the disk; ``None`` if there is none.

        A warning says so where newer weights were better, on the same batches.
        """
        dirpath = self._spawned.find() or self._resolved_dirpath
        target = best_target(dirpath) if dirpath is not None else None
        artifact = Artifact.open(target, verify=False) if target is not None else None
        if artifact is not None and (caveat := artifact.caveat):
            rank_zero_warn(f"Newer weights beat the best artifact. {caveat}")
        return artifact

    def search_now(self) -> Artifact | None:
        """Search at this moment of ``fit``, from any hook; ``None`` if there was nothing to search, or it failed."""
        return self._run.search() if self._run is not None else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported settings and strategies, before anything is spent."""
        if stage != "fit":
            return
        _check_served(trainer, self.settings.search)
        destination = _usable_destination(trainer, self.settings)
        others = [c for c in _merge_callbacks(trainer) if c is not self]
        if any(other._destination == destination for other in others):
            place = destination.url or destination.dirpath
            raise ConfigError(f"each merge callback needs a `dirpath` of its own, got {place} twice. Name another.")
        self._destination, self._resolved_dirpath = destination, None
        self._run, self._state, self._monitor_seen = None, None, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the buffer, or restore a checkpoint's."""
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("lightning-ckmerge does nothing in a fast_dev_run: there is no trail of weights to merge.")
            return
        assert self._destination is not None
        state = self._state or self._left_off(trainer)
        self._claimed = ClaimedDirpath(trainer, self._destination, state, moves=self.settings.dirpath is not None)
        self._resolved_dirpath = self._claimed.place.dirpath
        if trainer.local_rank == 0:
            self._spawned.leave(self._resolved_dirpath)
        self._run = self._make_run(trainer, self._claimed.place, state)
        self._state = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Find a missing loss before training, not at the first search."""
        if self.settings.search.refine is not None and trainer.sanity_checking:
            loss_of(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a misspelt ``monitor`` or a wrong ``mode`` at the first validation; keep the value for reports."""
        if self._run is not None:
            self._run.after_validation()
        if self._monitor_seen or self.settings.evaluation.dataloader is not None:
            return
        try:
            self._judge_monitor(trainer)
        except CkmergeError as error:
            if trainer.sanity_checking:  # nothing is lost yet
                raise
            rank_zero_warn(str(error))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take the optimizer's step, and search if one is due."""
        if self._run is not None:
            self._run.after_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search if one is due."""
        if self._run is not None:
            self._run.after_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search one last time."""
        if self._run is not None:
            self._run.at_end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Search one last time after Ctrl-C, which Lightning handles; let anything else through."""
        if self._run is None:
            self._release_dirpath()
            return
        # Several ranks are interrupted at several places, some of them inside a collective.
        if isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1:
            self._run.at_end()
        self._close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the merge where that was asked for. Checkpoints have been written by now; later ones know the buffer."""
        if self._run is None:
            return
        if self.settings.apply == "on_train_end":
            self._run.apply()
        self._last_state = self._run.finish()
        self._run = None
        self._release_dirpath()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish writing, if training failed."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint, no tensors."""
        if self._run is not None:
            return self._run.state_dict()
        state = self._state or self._last_state
        if state:
            keep_snapshots(Path(state["dirpath"]))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._state = state_dict or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the state of a run with another `dirpath`, where it can be no other run's."""
        own, _, _ = self.state_key.rpartition("'dirpath'")
        states = {key: state for key, state in checkpoint["callbacks"].items() if str(key).startswith(own)}
        keys = {c.state_key for c in _merge_callbacks(trainer) if c.state_key.startswith(own)}
        unclaimed, without = states.keys() - keys, keys - states.keys()
        if self.state_key in without and len(unclaimed) == len(without) == 1:
            self.load_state_dict(states[unclaimed.pop()])

    def _judge_monitor(self, trainer: Trainer) -> None:
        """Raise unless validation logs what is monitored, in the right direction; once."""
        logged = logged_names(trainer)
        if trainer.sanity_checking and any(SANITY_STAGE in name for name in logged):
            return  # the module names metrics by the stage, so those of validation are still to come
        self._monitor_seen = True
        require_logged(self.settings.monitors, logged)
        self.settings.check_modes(directions(trainer))

    def _make_run(self, trainer: Trainer, place: Place, state: dict[str, Any] | None) -> MergeRun | None:
        """Set a run up, on all ranks; ``None``, on all of them, if that failed on one: no fault of ours is worth it."""
        comm = connect()
        try:
            with together(comm):
                return MergeRun(self.settings, trainer, self, place, state, comm)
        except Exception as error:
            is_refused = isinstance(error, (ConfigError, UnsupportedError))
            if any(comm.exchange(is_refused or self.settings.raises)):
                raise
            comm.close()
            self._release_dirpath()
            text = f"No merges in this run: setting it up failed. {explain(error).rstrip('.')}. Training continues."
            say(trainer, text, rank_zero_warn)
            return None

    def _left_off(self, trainer: Trainer) -> dict[str, Any] | None:
        """The state of the last ``fit``, where this one continues from its last step."""
        state = self._last_state
        return state if state and trainer.global_step == state["schedule"]["step"] > 0 else None

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
        self._release_dirpath()

    def _release_dirpath(self) -> None:
        if self._claimed is not None:
            self._claimed.end()
            self._claimed = None


def _check_served(trainer: Trainer, search: SearchConfig) -> None:
    """Raise, on all ranks, unless the strategy can be served and rank 0 can open the storage."""
    check_supported(trainer, search.refine)
    fault, storage = None, search.storage
    if storage is not None and trainer.is_global_zero:
        try:
            open_storage(storage)
        except ConfigError as error:
            fault = str(error)
    if fault := trainer.strategy.broadcast(fault):
        raise ConfigError(fault)


def _merge_callbacks(trainer: Trainer) -> list[CheckpointMergeCallback]:
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009 - set where mypy cannot see it
    return [c for c in callbacks if isinstance(c, CheckpointMergeCallback)]


def _usable_destination(trainer: Trainer, settings: MergeSettings) -> Destination:
    """Return where artifacts go, the same on all ranks; raise, on all of them, unless rank 0 can write there."""
    # Loggers of several ranks may count several versions.
    found = resolve_dirpath(trainer, settings.dirpath, settings.buffer.dirpath)
    destination: Destination = trainer.strategy.broadcast(found)
    if fault := trainer.strategy.broadcast(find_destination_fault(destination) if trainer.is_global_zero else None):
        raise ConfigError(fault)
    return destination
