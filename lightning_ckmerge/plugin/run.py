"""What the callback does during one ``fit``: keep the buffer, search, publish, restore, log."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.outcome import Coefficients, SearchOutcome
from lightning_ckmerge.core.spaces import make_space
from lightning_ckmerge.distributed.comm import connect, on_rank_zero, together
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.distributed.scatter import scatter
from lightning_ckmerge.errors import CkmergeError, ConfigError, PeerError, explain
from lightning_ckmerge.pipeline import Bench, SearchJob, run_search
from lightning_ckmerge.plugin.adapters import Load, find_adapters
from lightning_ckmerge.plugin.curve import Curve
from lightning_ckmerge.plugin.derivatives import Derivatives
from lightning_ckmerge.plugin.loggers import Announcer
from lightning_ckmerge.plugin.plan import render_plan
from lightning_ckmerge.plugin.progress import OnScored, search_progress
from lightning_ckmerge.plugin.publisher import Publisher
from lightning_ckmerge.plugin.rates import LearningRates, rates_of
from lightning_ckmerge.plugin.reports import write_run_report
from lightning_ckmerge.plugin.resume import Leftovers, buffer_dirpath, fingerprint, resume_buffer
from lightning_ckmerge.plugin.run_length import finest_segment, length_of_run
from lightning_ckmerge.plugin.schedule import Schedule
from lightning_ckmerge.plugin.standstill import Standstill
from lightning_ckmerge.plugin.validation import Validation

if TYPE_CHECKING:
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback


class MergeRun:
    """One ``fit`` of one callback.

    Args:
        callback: Holds the arguments.
        trainer: The Trainer, which has the model on its device and knows the length of the run.
        dirpath: Where artifacts go.
        state: What a checkpoint held of an earlier one; ``None``: a new run.
    """

    def __init__(
        self, callback: CheckpointMergeCallback, trainer: Trainer, dirpath: Path, state: dict[str, Any] | None = None
    ) -> None:
        self.callback = callback
        self.dirpath = dirpath
        self._trainer = trainer
        self._module: LightningModule = trainer.lightning_module
        self._comm = connect()
        self._ownership = Ownership(self._module, self._comm)
        self._layout = TensorLayout(self._ownership.owned())
        self._space = make_space(callback.search.space).bind(list(self._ownership.shapes))
        self._local_layout = TensorLayout(self._ownership.local())
        self._own_loaders: Any = None
        self._previous: dict[str, float] | None = None
        self._last_artifact: Artifact | None = None
        self._adapters = find_adapters(
            self._module,
            callback.artifact,
            self._comm,
            self._space.group_of,
            is_sharded=self._ownership.is_sharded,
        )
        self._publisher = Publisher(callback, trainer, dirpath, self._adapters, self._comm)
        self._searching = False
        self._announcer = Announcer(trainer)
        self._curve = Curve()
        self._rates = LearningRates()
        total_steps = length_of_run(trainer)
        self._schedule = Schedule(**callback.triggers, total_steps=total_steps, step=trainer.global_step)
        state = state or {"run_id": uuid.uuid4().hex[:8], "training_s": 0.0, "searched_s": 0.0}
        self._run_id: str = self._comm.exchange(state["run_id"])[0]
        self._earlier_training_s = float(state["training_s"])
        self._searched_s = float(state["searched_s"])
        self._searched_here_s = 0.0
        self._start = time.monotonic()
        self._buffer = self._make_buffer(total_steps)
        self._leftovers = Leftovers([], "")
        if "buffers" in state:
            self._resume_buffer(state)
            self._schedule.load_state_dict(state["schedule"])
            self._previous = state["previous"]
            self._curve.load_state_dict(state["curve"])
            self._rates.load_state_dict(state["rates"])
            self._report_buffer()
        self._say_plan(total_steps)

    @property
    def training_s(self) -> float:
        """Seconds of training so far, over resumptions, without the searches."""
        return self._earlier_training_s + time.monotonic() - self._start - self._searched_here_s

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._trainer.global_step

    def after_batch(self) -> None:
        """Take an optimizer step into the buffer, and search if one is due."""
        step = self._trainer.global_step
        if step == self._schedule.step:  # gradients are being accumulated
            return
        due = self._due_at_step(step)
        self._leftovers.remove()
        self._buffer.update(self._layout.order(self._ownership.owned()), step)
        self._report_buffer()
        if step - self._rates.step >= self._buffer.segment_steps:
            self._rates.record(step, rates_of(self._trainer.optimizers))
        if due:
            self._search_as_scheduled()

    def after_validation(self) -> None:
        """Keep the run's own value."""
        value = self._trainer.callback_metrics.get(self.callback.monitor)
        if value is not None:
            self._curve.add_validation(self.step, float(value))

    def after_epoch(self) -> None:
        """Search if one is due."""
        if self._schedule.due_at_epoch_end(self._trainer.current_epoch):
            self._search_as_scheduled()

    def at_end(self) -> None:
        """Search once more, unless the last step has been searched or a search was interrupted."""
        if self.callback.search_on_train_end and not self._searching and self._buffer_has_moved():
            self._search_as_scheduled()

    def search(self) -> Artifact | None:
        """Search, publish, restore and log; ``None`` if the search was skipped or failed, on this rank or another."""
        if self._searching:  # the user's own hooks, which a search runs, may ask for one
            return None
        start = time.monotonic()
        self._searching = True
        self._last_artifact = None
        self._schedule.searched_step = self.step
        try:
            self._last_artifact = self._search_and_publish()
        except Exception as error:
            if not isinstance(error, PeerError):
                self._comm.give_up(error)
            if self.callback.on_error == "raise":
                raise
            rank_zero_warn(f"No merge at step {self.step}: {explain(error)}")
        finally:
            seconds = time.monotonic() - start
            self._searched_s += seconds
            self._searched_here_s += seconds
        self._searching = False
        return self._last_artifact

    def apply(self) -> None:
        """Load the last search's merge into the module, if it was accepted."""
        artifact = self._last_artifact
        if artifact is not None and artifact.manifest["verdict"]["status"] == "accepted" and artifact.has_weights:
            with together(self._comm):
                artifact.check_files()
            if self._ownership.is_sharded:
                self._ownership.settle()
                scatter(self._module, artifact.tensors())
            else:
                load_merged(artifact, self._module, verify=False)
            rank_zero_info(f"The module now holds the merged weights of {artifact.path}.")

    def finish(self) -> dict[str, Any]:
        """Finish writing, and return the state for checkpoints to come.

        It is taken last: the files of the last checkpoint, which are not all named in it, stay.
        """
        self._buffer.close()
        state = self.state_dict()
        self._report_buffer()
        self._comm.close()
        return state

    def close(self) -> None:
        """Finish writing, on this rank alone."""
        self._buffer.close()
        self._report_buffer()
        self._comm.close()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data from which a later one goes on; no tensors."""
        with together(self._comm):
            own = self._buffer.state_dict()
        self._leftovers.outdate()
        return {
            "run_id": self._run_id,
            "training_s": self.training_s,
            "searched_s": self._searched_s,
            "previous": self._previous,
            "curve": self._curve.state_dict(),
            "rates": self._rates.state_dict(),
            "schedule": self._schedule.state_dict(),
            # A checkpoint holds rank 0's state alone, so that has to hold everybody's.
            "buffers": self._comm.exchange(own),
            "layouts": self._comm.exchange(fingerprint(self._layout)),
        }

    def _say_plan(self, total_steps: int | None) -> None:
        found = (self._buffer, self._local_layout, self._space, total_steps, self.dirpath)
        merged = self._ownership.shapes.keys() if self._adapters is not None else None
        rank_zero_info(render_plan(self.callback, self._trainer, *found, merged=merged))

    def _make_buffer(self, total_steps: int | None) -> RollingBuffer:
        config = self.callback.buffer
        device = self._trainer.strategy.root_device
        storage: Storage = (
            DiskStorage(buffer_dirpath(self.dirpath, self._comm.rank, self._comm.world_size))
            if config.storage == "disk"
            else MemoryStorage(device if config.storage == "device" else "cpu")
        )
        return RollingBuffer(
            config,
            self._layout,
            storage,
            device=device,
            run_id=self._run_id,
            segment_steps=finest_segment(config, total_steps),
            double_segments=config.every_n_train_steps is None and total_steps is None,
        )

    def _buffer_has_moved(self) -> bool:
        return self._trainer.global_step > self._schedule.searched_step

    def _report_buffer(self) -> None:
        for warning in self._buffer.take_warnings():
            rank_zero_warn(warning)

    def _resume_buffer(self, state: dict[str, Any]) -> None:
        with together(self._comm):
            self._leftovers, warnings = resume_buffer(
                self._buffer, state["buffers"], state["layouts"], self._ownership, self._comm, self.dirpath
            )
        for warning in warnings:
            rank_zero_warn(warning)

    def _due_at_step(self, step: int) -> bool:
        due = self._schedule.due_at_step(step, self.training_s)
        if self._schedule.train_time_interval is None:
            return due
        return self._comm.exchange(due)[0]  # clocks differ

    def _search_as_scheduled(self) -> None:
        """Search, unless the learning rate says that there is little to find."""
        objection = self._objection()
        if objection is None or self.callback.search.at_low_lr == "search":
            self.search()
            return
        self._schedule.searched_step = self.step
        self._last_artifact = None  # which is not of these weights
        rank_zero_info(
            f"No merge search at step {self.step}: {objection}. `search.at_low_lr: search` searches all the same."
        )

    def _objection(self) -> str | None:
        """Why a search has little to find at this step."""
        self._rates.record(self.step, rates_of(self._trainer.optimizers))
        first_step = self._buffer.first_step() or self.step
        return self._comm.exchange(self._rates.objection(first_step))[0]

    def _search_and_publish(self) -> Artifact:
        """Everything between two identical states of the run."""
        self._ownership.check_frozen()
        with self._standing_still() as job:
            outcome = run_search(job)
            artifact = self._publisher.publish(outcome, job, self._curve.unpublished)
        self._curve.add_search(outcome)
        self._announce(outcome, artifact)
        self._comm.exchange(None)  # all are done, or all hear of it
        return artifact

    @contextlib.contextmanager
    def _standing_still(self) -> Iterator[SearchJob]:
        """Yield a search's job; the weights and all else are the same afterwards."""
        trainer = self._trainer
        with Standstill(trainer, self._ownership, self._local_layout) as standstill:
            validation = self._make_validation(standstill)
            standstill.watch(validation.loaders)
            latest = self._layout.order(self._ownership.select(standstill.weights))
            targets = self._layout.order(self._ownership.owned())
            snapshots = self._common_snapshots()
            merger = Merger(self._layout, targets, snapshots, latest, self.step, self._space.group_of)
            with (
                self._merging(merger) as load,
                search_progress(trainer, self.step, 1 if self.callback.mode == "min" else -1) as on_scored,
            ):
                yield self._make_job(self._make_bench(merger, validation, standstill, load), on_scored)

    def _merging(self, merger: Merger) -> contextlib.AbstractContextManager[Load]:
        """Yield what writes a merge into the module, on all ranks."""

        def load(c: Coefficients) -> None:
            merger.merge(c)
            self._comm.exchange(None)  # nobody has failed: publishing cannot be left half done
            self._ownership.publish()
            self._ownership.settle()

        if self._adapters is None:
            return contextlib.nullcontext(load)
        return self._adapters.merging(load, len(merger.snapshots_K))

    def _common_snapshots(self) -> list[Snapshot]:
        """The snapshots that no rank has lost."""
        own = self._buffer.snapshots()
        self._report_buffer()
        everywhere = self._comm.exchange({s.segment: s.sha256 for s in own})
        common = set.intersection(*map(set, everywhere))
        self._buffer.keep(common)
        if len(everywhere) == 1:
            return own
        files = {segment: tuple(f for rank in everywhere if (f := rank[segment]) is not None) for segment in common}
        return [replace(s, files_sha256=files[s.segment]) for s in own if s.segment in common]

    def _make_validation(self, standstill: Standstill) -> Validation:
        name = self.callback.evaluation.dataloader
        if name is not None and self._own_loaders is None:
            owners = [o for o in (getattr(self._trainer, "datamodule", None), self._module) if hasattr(o, name)]
            if not owners:
                raise ConfigError(
                    f"`evaluation.dataloader` must name a method of the datamodule or module, got {name!r}. "
                    "Define it, or leave the argument out to use the run's validation loaders."
                )
            self._own_loaders = getattr(owners[0], name)()
        callback = self.callback
        return Validation(
            self._trainer,
            callback,
            callback.evaluation,
            callback.monitors,
            self._comm,
            standstill,
            self._own_loaders,
        )

    def _make_bench(self, merger: Merger, validation: Validation, standstill: Standstill, merge: Load) -> Bench:
        recalibrate = self.callback.evaluation.recalibrate_batches

        def load(c: Coefficients) -> None:
            merge(c)
            if recalibrate:
                validation.recalibrate(recalibrate)

        return Bench(
            merger=merger,
            validation=validation,
            begin=standstill.begin,
            load=load,
            differentiate=Derivatives(self._ownership, self._layout, merger, load, standstill, validation, self._comm),
        )

    def _make_job(self, bench: Bench, on_scored: OnScored) -> SearchJob:
        callback = self.callback
        objection = self._objection()
        allowed_s, allowed_by = self._allowance()
        return SearchJob(
            name=f"{self._run_id}-step={self.step:09d}",
            step=self.step,
            monitor=callback.monitor,
            mode=callback.mode,
            others=callback.others,
            space=self._space,
            config=callback.search,
            staged=callback.evaluation.staged,
            bench=bench,
            allowed_s=allowed_s,
            allowed_by=allowed_by,
            searched_s=self._searched_s,
            training_s=self.training_s,
            # A rank that failed last time, after others had reached the verdict, knows of none.
            previous=self._comm.exchange(self._previous)[0],
            validated=self._curve.validated,
            searched=self._curve.searched,
            notes=[f"{objection[0].upper()}{objection[1:]}."] if objection else [],
            journal=self.dirpath / "study.journal",
            on_scored=on_scored,
            agree=partial(on_rank_zero, self._comm),
            adapters=self._adapters.merge if self._adapters is not None else None,
            tolerant=callback.on_error == "warn",
        )

    def _allowance(self) -> tuple[float | None, str]:
        """Seconds that this search may take, and the argument that says so."""
        search = self.callback.search
        allowed_s, allowed_by = search.timeout_s or math.inf, "search.timeout_s"
        if search.max_fraction_of_training is not None:
            share_s = max(0.0, search.max_fraction_of_training * self.training_s - self._searched_s)
            if share_s < allowed_s:
                allowed_s, allowed_by = share_s, "search.max_fraction_of_training"
        return (None, "") if math.isinf(allowed_s) else (allowed_s, allowed_by)

    def _write_run_report(self) -> None:
        """Show the run's searches so far. What is published stays so, whatever an older file makes of this."""
        if self._comm.rank != 0:
            return
        try:
            write_run_report(self.dirpath)
        except (CkmergeError, OSError) as error:
            rank_zero_warn(f"The run's report was not written: {explain(error)}")

    def _announce(self, outcome: SearchOutcome, artifact: Artifact) -> None:
        self._previous = outcome.best_coordinates or self._previous
        verdict = outcome.verdict
        line = f"Merge search at step {outcome.step}: {verdict.sentence} {artifact.path}"
        (rank_zero_warn if verdict.status == "rejected" else rank_zero_info)(line)
        for warning in verdict.warnings:
            rank_zero_warn(warning)
        self._write_run_report()
        self._announcer.announce(outcome, artifact, self._searched_s)
