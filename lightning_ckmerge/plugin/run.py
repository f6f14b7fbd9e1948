"""What the callback does during one ``fit``: keep the buffer, search, publish, restore, log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.artifact.due import RunState, Trigger
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import Place, keep_snapshots
from lightning_ckmerge.artifact.standing import Standing
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.distributed.comm import Comm, on_rank_zero
from lightning_ckmerge.errors import FinalError, SkipError, TraceError, explain
from lightning_ckmerge.pipeline import Scorer, SearchJob, run_search
from lightning_ckmerge.plugin.clock import Clock, Curve
from lightning_ckmerge.plugin.dirpath import Destination
from lightning_ckmerge.plugin.evaluate.scorer import ScorerMaker
from lightning_ckmerge.plugin.plan import Known, Plan, make_plan, render_plan
from lightning_ckmerge.plugin.progress import OnScored, harmless, say, search_progress
from lightning_ckmerge.plugin.publish.leaving import Leaving
from lightning_ckmerge.plugin.publish.publisher import Publisher
from lightning_ckmerge.plugin.publish.standing import measure_best
from lightning_ckmerge.plugin.rank.buffer import RankBuffer
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.restore.interruptions import Interruptions
from lightning_ckmerge.plugin.strategies import check_moment
from lightning_ckmerge.plugin.triggers import LearningRates, RunLength, TriggerState, length_of_run, rates_of
from lightning_ckmerge.search.study import keep_warned


class MergeRun:
    """One ``fit`` of one callback.

    Args:
        settings: What the callback was asked for.
        trainer: The Trainer, which has the model on its device and knows the length of the run.
        callback: The one that Lightning calls; it is told of batches in place of the muted others.
        place: Where artifacts go, and where they went before.
        state: What a checkpoint held of an earlier one; ``None``: a new run.
        comm: The ranks; ``None``: those of the process group.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        place: Place,
        state: dict[str, Any] | None = None,
        comm: Comm | None = None,
    ) -> None:
        self.settings = settings
        self.dirpath = place.dirpath
        self._trainer = trainer
        self._model = RankModel(trainer.lightning_module, settings, comm)
        self._interruptions = Interruptions(trainer, self._model.comm)
        self._scorer_maker = ScorerMaker(settings, callback, trainer, self._model, self._interruptions.reason)
        self._publisher = Publisher(settings, trainer, place, self._model)
        self._curve = Curve()
        self._rates = LearningRates()
        self._previous: dict[str, float] | None = None
        self._last_artifact: Artifact | None = None
        self._scored: tuple[int, Score | None] = (-1, None)  # the latest weights of the last search, and their step
        self._standing: Standing | None = None
        self._is_searching = False
        self._is_published = False  # the last search, whatever failed after it
        self._was_interrupted = False  # in a search, by what ends training
        self._has_ended = False
        self._fault: tuple[type[Exception], str] | None = None  # of the search that is ending
        self._buffer_failed = False
        self._is_last = not settings.triggers.on_train_end
        self._is_at_end = False
        self._needed_s = 0.0  # by the least of searches, where one was too dear
        length = length_of_run(trainer)
        self._triggers = TriggerState(triggers=settings.triggers, total_steps=length.steps, step=trainer.global_step)
        state = state or {"training_s": 0.0, "searched_s": 0.0}
        self._run_id, self._url = place.run_id, place.url
        self._clock = Clock(float(state["training_s"]), float(state["searched_s"]))
        self._buffer = RankBuffer(
            settings.buffer,
            self._model,
            place,
            device=trainer.strategy.root_device,
            total_steps=length.steps,
            warn=partial(say, trainer, tell=rank_zero_warn),
        )
        if "buffers" in state:
            self._buffer.load_state_dict(state)
        if "schedule" in state:
            self._triggers.load_state_dict(state["schedule"])
            self._previous = state["previous"]
            self._curve.load_state_dict(state["curve"])
            self._rates.load_state_dict(state["rates"])
        followed = settings.search.where == "follower"
        self._leaving = (
            Leaving(settings, trainer, place, self._model, self._buffer, self._publisher) if followed else None
        )
        for note in place.notes:
            say(trainer, note)
        self._say_plan(length)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._trainer.global_step

    def after_batch(self) -> None:
        """Take an optimizer step into the buffer, and search if one is due."""
        step = self._trainer.global_step
        if step == self._triggers.step:  # gradients are being accumulated
            return
        due = self._due_at_step(step)
        if self._leaving is not None:
            self._leaving.show(step)
        if self._buffer_failed:
            return
        self._keep(step)
        if step - self._rates.step >= self._buffer.rolling.segment_steps:
            self._rates.record(step, rates_of(self._trainer.optimizers))
        if due:
            self._search_as_scheduled()

    def after_validation(self) -> None:
        """Keep the run's own value."""
        value = self._trainer.callback_metrics.get(self.settings.objectives[0].monitor)
        if value is not None:
            self._curve.add_validation(self.step, float(value))

    def after_epoch(self) -> None:
        """Search if one is due."""
        if self._triggers.due_at_epoch_end(self._trainer.current_epoch):
            self._search_as_scheduled()

    def at_end(self) -> None:
        """Search once more, unless the last step has been searched or a search was interrupted, and sum the run up."""
        if self.settings.triggers.on_train_end and not self._was_interrupted and self._buffer_has_moved():
            self._is_last = self._is_at_end = True
            self._search_as_scheduled()
        if not self._was_interrupted and not self._has_ended and self._leaving is None:
            self._look_back()
        self._publisher.sum_up()

    def search(self) -> Artifact | None:
        """Search, publish, restore and log; ``None`` if the search was skipped or failed, on this rank or another.

        Where followers search, it is left for them, which is ``None`` too.
        """
        if self._is_searching or self._was_interrupted or self._has_ended:  # hooks that a search runs may ask for one
            return None
        if self._leaving is not None:
            self._leave("asked")
            return None
        self._last_artifact = None
        self._triggers.searched_step = self.step
        self._is_searching, self._is_published = True, False
        start = time.monotonic()
        try:
            if not self._can_search():
                return None
            self._attempt()
        except BaseException:
            self._was_interrupted = True
            raise
        finally:
            self._is_searching = False
        if self._fault is not None and not self._is_published:
            reason = f"The search failed: {self._fault[1]}"
            self._publisher.record_skip(self.step, reason, time.monotonic() - start, may_fail=True)
        self._conclude(f"No merge at step {self.step}")
        return self._last_artifact

    def _attempt(self) -> None:
        """Search and publish; keep a fault for ``_conclude``, unless it is to end training."""
        with self._interruptions.deferred(), self._clock.searching():
            start = time.monotonic()
            try:
                self._search_and_publish()
            except SkipError as skip:
                self._needed_s = max(self._needed_s, skip.needed_s)
                self._skip(str(skip), time.monotonic() - start)
            except Exception as error:
                self._model.comm.give_up(error)
                if self.settings.raises:
                    raise
                self._fault = (type(error), explain(error))
        keep_warned()

    def _conclude(self, outcome: str) -> None:
        """Say why a search has failed, if it has; search no more in this run if the next would, or a trace is left."""
        (kind, reason), self._fault = self._fault or (SkipError, ""), None
        is_final = issubclass(kind, FinalError) and kind is not TraceError
        finals = [f for f in self._model.comm.exchange(reason if is_final else None) if f is not None]
        if finals:
            self._has_ended = True
            say(self._trainer, f"{outcome}: {finals[0]} Searching has ended for this run.", rank_zero_warn)
        elif reason and kind is not TraceError:
            say(self._trainer, f"{outcome}: {reason}", rank_zero_warn)
        try:
            self._scorer_maker.check_traces()
        except TraceError as error:
            self._has_ended = True
            if self.settings.raises:
                raise
            say(self._trainer, str(error), rank_zero_warn)

    def apply(self) -> None:
        """Load the best artifact into the module, if it is better than the final weights."""
        best, standing = self._publisher.best(), self._standing
        if best is None:
            text = "The module keeps the final weights: no merge was accepted."
        elif standing is None:
            text = "The module keeps the final weights: the best merge could not be compared with them."
        elif standing.is_stale:
            text = "The module keeps the final weights, which are better than the best merge."
        else:
            self._model.load(best)
            text = (
                f"The module now holds `best`, the merge of step {standing.best_step}, in place of the final weights."
            )
        self._publisher.forget()
        say(self._trainer, text)

    def finish(self) -> dict[str, Any]:
        """Finish writing, and return the state for checkpoints to come.

        It is taken last: the files of the last checkpoint, which are not all named in it, stay.
        """
        self._leave_off("ended")
        self._buffer.rolling.close()
        state = self._state()
        self._buffer.warn()
        self._publisher.close()
        self._model.comm.close()
        return state

    def close(self) -> None:
        """Finish writing, on this rank alone, after a fault."""
        self._leave_off("stopped")
        self._buffer.rolling.close(is_saved=False)
        self._buffer.warn()
        self._publisher.close()
        self._model.comm.close()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data from which a later one goes on; no tensors. From now on, a checkpoint names snapshots."""
        state = self._state()
        if self._model.comm.rank == 0:
            keep_snapshots(self.dirpath, self._run_id)
        return state

    def _state(self) -> dict[str, Any]:
        buffers = self._state_of_buffer()
        return {
            "run_id": self._run_id,
            "dirpath": str(self.dirpath),
            "training_s": self._clock.training_s,
            "searched_s": self._clock.searched_s,
            "previous": self._previous,
            "curve": self._curve.state_dict(),
            "rates": self._rates.state_dict(),
            "schedule": self._triggers.state_dict(),
            **buffers,
        }

    def _keep(self, step: int) -> None:
        """Take an optimizer step into the buffer. Coordinates of another model mean nothing."""
        try:
            if self._buffer.update(step):
                self._previous = None
        except Exception as error:
            self._end(error)

    def _can_search(self) -> bool:
        """Whether the buffer works, and holds snapshots of the model as it is now. All ranks call it together."""
        if self._buffer_failed:
            return False
        try:
            if self._buffer.agree(self.step):
                self._previous = None
            is_empty = self._buffer.is_empty(self.step)
        except Exception as error:
            self._end(error)
            return False
        if is_empty:
            text = f"No merge search at step {self.step}: the buffer was reset and is still empty."
            say(self._trainer, text)
        return not is_empty

    def _state_of_buffer(self) -> dict[str, Any]:
        try:
            return {} if self._buffer_failed else self._buffer.state_dict()
        except Exception as error:
            self._end(error)
            return {}

    def _end(self, error: Exception) -> None:
        """Go on without buffer and searches, on all ranks: no fault of theirs is worth the run."""
        if self.settings.raises:
            raise error
        self._buffer_failed = True
        with harmless("Removing the buffer's files"):
            self._buffer.rolling.abandon()
        text = (
            f"The buffer could not read the model at step {self.step}: {explain(error)} Training continues without a "
            "buffer, and this run searches no more."
        )
        say(self._trainer, text, rank_zero_warn)

    def _look_back(self) -> None:
        """Say which weights to use: the run's best artifact or the final weights."""
        with self._clock.searching(), self._interruptions.deferred():
            try:
                self._standing = self._measure_best()
            except SkipError as skip:
                say(self._trainer, f"The best merge was not compared with the final weights: {skip}")
            except Exception as error:
                self._model.comm.give_up(error)
                if self.settings.raises:
                    raise
                self._fault = (type(error), explain(error))
        self._conclude("The best merge was not compared with the final weights")

    def _measure_best(self) -> Standing | None:
        step, score = self._scored
        known = score if step == self.step else None
        told = (self._publisher, self._scorer_maker, self._model)
        return measure_best(*told, step=self.step, run_id=self._run_id, known=known)

    def _say_plan(self, length: RunLength) -> None:
        trainer = self._trainer
        batches = trainer.num_val_batches
        destination = Destination(dirpath=self.dirpath, url=self._url)
        known = Known(length=length, val_batches=batches, destination=destination, num_ranks=trainer.world_size)
        self.plan: Plan = make_plan(self.settings, trainer, self._model, known)
        say(trainer, render_plan(self.plan))

    def _buffer_has_moved(self) -> bool:
        return self._trainer.global_step > self._triggers.searched_step

    def _due_at_step(self, step: int) -> bool:
        by_clock = self.settings.triggers.train_time_interval is not None and self._model.comm.world_size > 1
        before, every = self._triggers.step, self.settings.buffer.update_every_n_steps
        if by_clock and step // every == before // every:  # ranks do not talk at each step
            self._triggers.step = step
            return False
        due = self._triggers.due_at_step(step, self._clock.training_s)
        return self._model.comm.exchange(due)[0] if by_clock else due  # clocks differ

    def _search_as_scheduled(self) -> None:
        """Search, unless the learning rate says that there is little to find."""
        if self._buffer_failed:
            return
        if self._leaving is not None:
            self._leave("end" if self._is_at_end else "scheduled")
            return
        objection, is_decayed = self._objection()
        asked = self.settings.search.at_low_lr
        if objection is None or asked == "search" or (asked == "tail" and is_decayed):
            self.search()
            return
        self._triggers.searched_step = self.step
        self._skip(f"{objection}. Set `search.at_low_lr: search` to search anyway.")

    def _leave(self, trigger: Trigger) -> None:
        """Leave a search for followers, unless the moment forbids it. Ranks talk once, and wait for nothing else."""
        assert self._leaving is not None
        self._triggers.searched_step = self.step
        try:
            check_moment(self._trainer)
            if self._buffer_failed or self._buffer.agree(self.step):
                return
            self._rates.record(self.step, rates_of(self._trainer.optimizers))
            told = (self._clock, self._rates, self._curve)
            self._leaving.leave(self.step, trigger, *told)
        except SkipError as skip:
            self._leaving.skip(self.step, str(skip))
        except Exception as error:
            self._end(error)

    def _leave_off(self, state: RunState) -> None:
        if self._leaving is not None:
            self._leaving.end(state)
            self._leaving = None

    def _skip(self, reason: str, seconds: float = 0.0) -> None:
        say(self._trainer, f"No merge search at step {self.step}: {reason}")
        self._publisher.record_skip(self.step, reason, seconds)

    def _objection(self) -> tuple[str | None, bool]:
        """Why a search has little to find at this step, and whether that is since the learning rate has decayed."""
        self._rates.record(self.step, rates_of(self._trainer.optimizers))
        first_step = self._buffer.rolling.first_step() or self.step
        objection = self._rates.objection(first_step)
        return self._model.comm.exchange((objection, objection is not None and not self._rates.is_rising))[0]

    def _search_and_publish(self) -> None:
        """Everything between two identical states of the run."""
        check_moment(self._trainer)
        config, is_last = self.settings.search, self._is_last
        self._agree(lambda: self._clock.require(self._needed_s, config, is_last=is_last))
        self._model.ownership.check_frozen()
        with self._paused() as job:
            outcome = run_search(job)
            self._interruptions.let_finish()
            artifact = self._publisher.publish(outcome, job, self._curve.unpublished)
            self._is_published = True
        self._model.comm.exchange(None)  # a failure on any rank is raised on all
        self._last_artifact = artifact
        self._scored = (self.step, outcome.anchors[0].confirm)
        self._curve.add_search(outcome)
        if job.space is self._model.space:
            self._previous = outcome.best_coordinates or self._previous
        self._publisher.announce(outcome, artifact, self._clock.searched_s + sum(outcome.cost.seconds.values()))

    def _agree(self, check: Callable[[], None]) -> None:
        """Raise on all ranks the ``SkipError`` that ``check`` raises on rank 0."""
        skip = on_rank_zero(self._model.comm, partial(_caught, check))
        if skip is not None:
            raise SkipError(skip[0], needed_s=skip[1])

    @contextlib.contextmanager
    def _paused(self) -> Iterator[SearchJob]:
        """Yield a search's job; the weights and all else are the same afterwards."""
        with (
            self._scorer_maker.paused(self._snapshots, self.step) as scorer,
            search_progress(self._trainer, self.step, self.settings.objectives[0].sign) as on_scored,
        ):
            yield self._make_job(scorer, on_scored)

    def _snapshots(self) -> list[Snapshot]:
        """What to merge, beside the latest weights."""
        return self._buffer.snapshots()

    def _make_job(self, scorer: Scorer, on_scored: OnScored) -> SearchJob:
        objection, is_decayed = self._objection()
        allowed_s, allowed_by = self._clock.allowance(self.settings.search, is_last=self._is_last)
        return SearchJob(
            name=f"{self._run_id}-step={self.step:09d}",
            step=self.step,
            settings=self.settings,
            space=self._model.space,
            scorer=scorer,
            allowed_s=allowed_s,
            allowed_by=allowed_by,
            searched_s=self._clock.searched_s,
            training_s=self._clock.training_s,
            # A rank that failed last time, after others had reached the verdict, knows of none.
            previous=self._model.comm.exchange(self._previous)[0],
            validated=self._curve.validated,
            searched=self._curve.searched,
            journal=self.dirpath / "study.journal",
            on_scored=on_scored,
            agree=partial(on_rank_zero, self._model.comm),
            adapters=self._model.adapter_merge,
        ).at_low_rate(objection, is_decayed=is_decayed)


def _caught(check: Callable[[], None]) -> tuple[str, float] | None:
    try:
        check()
    except SkipError as skip:
        return str(skip), skip.needed_s
    return None
