"""One due search, carried out by a follower with the code that searches inside ``fit``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.artifact.due import FOLLOW_NAME, DueResult, DueSearch, earlier, read_results
from lightning_ckmerge.artifact.leases import Lease
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.runs import DirectoryLock, Place
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.outcome import Score, SearchOutcome
from lightning_ckmerge.distributed.comm import on_rank_zero
from lightning_ckmerge.errors import ArtifactError, FinalError, SearchError, SkipError, SnapshotError
from lightning_ckmerge.pipeline import Scorer, SearchJob, join_search, run_search
from lightning_ckmerge.plugin.evaluate.scorer import ScorerMaker
from lightning_ckmerge.plugin.follow.material import DueReader
from lightning_ckmerge.plugin.progress import OnScored, harmless, say
from lightning_ckmerge.plugin.publish.publisher import Publisher
from lightning_ckmerge.plugin.publish.standing import measure_best
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.triggers import LearningRates
from lightning_ckmerge.search.verdict import RECENT_SHARE

WAIT_S = 0.1


class DueSearcher:
    """Carries out due searches of one run, in the module of a Trainer inside ``fit``, before its first step.

    Args:
        settings: The run's.
        trainer: The follower's own.
        callback: Told of batches in place of the muted others.
        dirpath: The run's directory.
        scratch: A directory for files of the follower's own.
        shares: Whether other followers help, and are helped.
        on_scored: Told of each scored candidate.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        dirpath: Path,
        scratch: Path,
        *,
        shares: bool,
        on_scored: OnScored,
    ) -> None:
        self._settings = settings
        self._trainer = trainer
        self._dirpath = dirpath
        self._shares = shares
        self._on_scored = on_scored
        self._model = RankModel(trainer.lightning_module, settings)
        self._lease: Lease | None = None
        self._loaded: tuple[DueSearch, Score | None] | None = None  # whose latest weights the module holds; their score
        self._scorer_maker = ScorerMaker(settings, callback, trainer, self._model, self._interruption)
        warn = partial(say, trainer, tell=rank_zero_warn)
        self._reader = DueReader(settings.buffer, self._model, scratch, warn)
        self._publisher: Publisher | None = None

    def search(self, due: DueSearch, lease: Lease) -> DueResult | None:
        """Search and publish, and return the result; ``None`` if the due search has been taken away, or the lease.

        Raises:
            CkmergeError: The follower cannot do its work.
        """
        if not due.is_whole():  # it had gone before there was the lease
            return None
        if (known := self._published(due)) is not None:
            return self._conclude(due, known, time.monotonic(), None)
        self._lease, start = lease, time.monotonic()
        try:
            self._reader.load(due)
            self._loaded = due, None
            result = self._attempt(due, start)
        except (SnapshotError, OSError):
            if due.is_whole():
                raise
            return None  # it was taken away after the lease had run out
        finally:
            self._lease = None
        return result

    def help_on(self, due: DueSearch) -> int:
        """Help the follower that has the lease, and return how many candidates were scored here."""
        self._reader.load(due)
        with self._paused(due) as scorer:
            return join_search(self._make_job(due, scorer))

    def enter_skips(self) -> None:
        """Enter the due searches without an artifact into the run's timeline, which the run does not write itself."""
        results = read_results(self._dirpath)
        without = [r for r in results.values() if r.status != "published"]
        if not without:
            return
        with self._alone():
            known = {record.get("due") for record in read_timeline(self._dirpath)}
            for result in without:
                if result.due not in known:
                    reason = result.reason or ""
                    self._publisher_of(result.run_id).record_skip(result.step, reason, result.seconds, due=result.due)

    def look_back(self, step: int) -> None:
        """Say which weights to use, the run's best artifact or its final ones, if these are in the module.

        Args:
            step: The run's last.
        """
        if self._loaded is None or self._loaded[0].step != step:
            return
        due, score = self._loaded
        publisher = self._publisher_of(due.run_id)
        with self._alone(), harmless("The comparison of the best merge with the final weights", self._trainer):
            told = (publisher, self._scorer_maker, self._model)
            measure_best(*told, step=step, run_id=due.run_id, known=score)

    def _attempt(self, due: DueSearch, start: float) -> DueResult | None:
        """Search and publish."""
        try:
            objection, is_decayed = self._objection(due)
            asked = self._settings.search.at_low_lr
            if objection is not None and asked != "search" and not (asked == "tail" and is_decayed):
                raise SkipError(f"{objection}. Set `search.at_low_lr: search` to search anyway.")
            with self._paused(due) as scorer:
                job = self._make_job(due, scorer)
                outcome = run_search(job)
                with self._alone():
                    self._require_lease()
                    artifact = self._publisher_of(due.run_id).publish(outcome, job, self._unpublished(due))
                    result = self._conclude(due, artifact, start, outcome)
            self._scorer_maker.check_traces()
        except FinalError:
            raise
        except SearchError as error:
            if self._lease is not None and self._lease.is_lost():
                return None
            return self._give_up(due, str(error), start)
        self._publisher_of(due.run_id).show_run()
        self._loaded = due, outcome.anchors[0].confirm
        return result

    def _give_up(self, due: DueSearch, reason: str, start: float) -> DueResult:
        seconds = time.monotonic() - start
        result = DueResult(
            due=due.name, run_id=due.run_id, step=due.step, status="skipped", reason=reason, seconds=seconds
        )
        result.write(self._dirpath)
        return result

    def _conclude(self, due: DueSearch, artifact: Artifact, start: float, outcome: SearchOutcome | None) -> DueResult:
        """Write the result of a due search that has been published; without its outcome, by its manifest."""
        latest = artifact.manifest["anchors"][0]["confirm"]
        result = DueResult(
            due=due.name,
            run_id=due.run_id,
            step=due.step,
            status="published",
            artifact=artifact.path.name,
            coordinates=outcome.best_coordinates if outcome is not None else artifact.manifest["coordinates"],
            latest=latest["value"] if latest else None,
            num_validated=len(due.info.validated),
            seconds=time.monotonic() - start,
        )
        result.write(self._dirpath)
        return result

    def _published(self, due: DueSearch) -> Artifact | None:
        """Return the artifact of a follower that has died before it wrote the result."""
        for path in self._dirpath.glob(f"step={due.step:09d}*"):
            with contextlib.suppress(ArtifactError):
                manifest = read_manifest(path)
                if manifest.get("due") == due.name:
                    return Artifact(path, manifest)
        return None

    def _objection(self, due: DueSearch) -> tuple[str | None, bool]:
        """Why a search has little to find at its step, and whether that is since the learning rate has decayed.

        As the run itself would say.
        """
        rates = LearningRates()
        rates.load_state_dict(due.info.rates)
        part = due.parts[0]
        entries = [*part.snapshots, *([part.open] if part.open else [])]
        objection = rates.objection(entries[0].segment.first_step if entries else due.step)
        return objection, objection is not None and not rates.is_rising

    @contextlib.contextmanager
    def _paused(self, due: DueSearch) -> Iterator[Scorer]:
        def snapshots() -> list[Snapshot]:
            return self._reader.snapshots(due)

        with self._scorer_maker.paused(snapshots, due.step) as scorer:
            yield scorer

    def _make_job(self, due: DueSearch, scorer: Scorer) -> SearchJob:
        results = list(earlier(read_results(self._dirpath), due))
        objection, is_decayed = self._objection(due)
        # As `Curve` keeps them.
        first = (1 - RECENT_SHARE) * results[-1].step if results else -1.0
        return SearchJob(
            name=f"{due.run_id}-step={due.step:09d}",
            step=due.step,
            settings=self._settings,
            space=self._model.space,
            scorer=scorer,
            allowed_s=self._settings.search.timeout_s,
            previous=next((r.coordinates for r in reversed(results) if r.coordinates), None),
            validated=[p for p in due.info.validated if p[0] > first],
            searched=[(r.step, r.latest) for r in results if r.latest is not None and r.step > first],
            journal=self._dirpath / "study.journal",
            on_scored=self._on_scored,
            agree=partial(on_rank_zero, self._model.comm),
            shared=self._shares,
            adapters=self._model.adapter_merge,
            due=due.name,
        ).at_low_rate(objection, is_decayed=is_decayed)

    def _unpublished(self, due: DueSearch) -> list[tuple[int, float]]:
        """Return the run's own validations since the search before, for the timeline."""
        known = [r.num_validated for r in earlier(read_results(self._dirpath), due)]
        return due.info.validated[known[-1] if known else 0 :]

    def _publisher_of(self, run_id: str) -> Publisher:
        if self._publisher is None:
            place = Place(dirpath=self._dirpath, run_id=run_id, source=None)
            self._publisher = Publisher(self._settings, self._trainer, place, self._model)
        return self._publisher

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Write the run's artifacts and records while no other follower does, where the file system knows locks."""
        directory = self._dirpath / FOLLOW_NAME
        while (lock := DirectoryLock.acquire(directory)) is None:
            time.sleep(WAIT_S)
        try:
            yield
        finally:
            lock.release()

    def _require_lease(self) -> None:
        if (reason := self._interruption(look=True)) is not None:
            raise SkipError(f"{reason}.")

    def _interruption(self, *, look: bool = False) -> str | None:
        """Why the search must end, as far as it is known without a look at the disk."""
        lease = self._lease
        if lease is None or not (lease.is_lost() if look else lease.was_lost):
            return None
        return "another follower has taken this search over, since this one had shown no sign of life for too long"
