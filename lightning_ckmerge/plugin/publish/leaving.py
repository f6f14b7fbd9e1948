"""Leaves the searches of a run for followers, and shows what they have found."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.artifact.due import DueResult, RunInfo, RunState, Trigger, due_path
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.wording import amount_told
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.clock import Clock, Curve
from lightning_ckmerge.plugin.progress import harmless, say
from lightning_ckmerge.plugin.publish.followed import Followed
from lightning_ckmerge.plugin.publish.publisher import Publisher
from lightning_ckmerge.plugin.rank.buffer import RankBuffer
from lightning_ckmerge.plugin.rank.due import RankDues
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.triggers import LearningRates


class Leaving:
    """The searches that one ``fit`` leaves for followers. All ranks make theirs together.

    Args:
        settings: The callback's settings.
        trainer: The Trainer.
        place: The run's directory.
        model: Whose weights.
        buffer: Whose snapshots.
        publisher: Shows what followers have published.

    Raises:
        ConfigError: Artifacts go to a URL.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        place: Place,
        model: RankModel,
        buffer: RankBuffer,
        publisher: Publisher,
    ) -> None:
        if place.url is not None:
            raise ConfigError(
                f'`search.where` "follower" publishes in a directory that both processes see, got the URL {place.url}. '
                "Name a local or mounted `dirpath`, and copy the artifacts from there."
            )
        self._trainer = trainer
        self._place = place
        self._monitors = settings.monitors
        self._buffer = buffer
        self._publisher = publisher
        self._seconds = 0.0  # of the searches that were shown
        self._session: str = model.comm.exchange(uuid.uuid4().hex[:8])[0]
        device = trainer.strategy.root_device
        self._dues = RankDues(model, buffer, place, session=self._session, device=device)
        told = (place.dirpath, place.run_id, self._session, trainer.global_step)
        self._followed = Followed(*told) if model.comm.rank == 0 else None

    def leave(self, step: int, trigger: Trigger, clock: Clock, rates: LearningRates, curve: Curve) -> None:
        """Leave a search. Nothing waits for it, on any rank."""
        info = RunInfo(
            trigger=trigger,
            monitors=list(self._monitors),
            epoch=self._trainer.current_epoch,
            training_s=clock.training_s,
            since=self._buffer.since,
            rates=rates.state_dict(),
            validated=list(curve.validated),
        )
        if not self._dues.leave(step, info):
            self.skip(step, "the one before is still being written. Search less often, or write to a faster disk.")
        elif self._followed is not None:
            self._followed.left = self._dues.num_left

    def skip(self, step: int, reason: str) -> None:
        """Say that a search was not left, and let a follower enter it into the timeline, which it alone writes."""
        say(self._trainer, f"No merge search was left at step {step}: {reason}")
        if self._followed is None:
            return
        due = due_path(self._place.dirpath, step, self._session).name
        with harmless("The record of a skipped search", self._trainer):
            result = DueResult(due=due, run_id=self._place.run_id, step=step, status="evicted", reason=reason)
            result.write(self._place.dirpath)

    def show(self, step: int) -> None:
        """Show what followers have found since the last call, as far as that is known. Does not wait."""
        if self._followed is not None:
            self._followed.step = step
            self._tell(self._followed.take())

    def end(self, state: RunState) -> None:
        """Finish writing, on this rank alone; tell followers that training is over, and look once at their results."""
        with harmless("Taking away what followers need no more", self._trainer):
            names = self._dues.settle()
            if self._followed is not None:
                self._followed.end(state, names)
        if self._followed is not None:
            self._followed.end("stopped")  # unless that has been told
            self._tell(self._followed.take())
            if state == "ended" and (num := self._followed.num_open):
                searches = "1 search is" if num == 1 else f"{num} searches are"
                text = f"{searches} still due: `ckmerge follow {self._place.dirpath}` ends when they are done."
                say(self._trainer, text)

    def _tell(self, results: Sequence[DueResult]) -> None:
        for result in results:
            self._seconds += result.seconds
            with harmless("Showing a follower's search", self._trainer):
                if result.artifact is None:
                    tell = rank_zero_warn if result.status == "evicted" else None
                    text = f"No merge search at step {result.step}: {result.reason}"
                    say(self._trainer, text, *([tell] if tell else []))
                else:
                    artifact = Artifact.open(self._place.dirpath / result.artifact, verify=False)
                    took = f" It took {amount_told(result.seconds)} s, none of them of training."
                    self._publisher.show_found(artifact, self._seconds, took)
