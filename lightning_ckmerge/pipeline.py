"""One search, from the buffer's snapshots to the verdict. No Trainer in sight."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.config import AdapterMerge, MergeSettings
from lightning_ckmerge.core.outcome import Coefficients, Cost, EvaluationRecord, Score, Scored, SearchOutcome
from lightning_ckmerge.core.spaces import Space, Tail
from lightning_ckmerge.errors import SkipError
from lightning_ckmerge.search.anchors import candidate_at
from lightning_ckmerge.search.engine import Search, T, most_confirmed
from lightning_ckmerge.search.interval import ONE_BATCH
from lightning_ckmerge.search.problem import Evaluate, Half, KeepGoing, Problem
from lightning_ckmerge.search.refine import MAX_REFINED, Array, refine
from lightning_ckmerge.search.stopping import NEVER, Budget, Stopping
from lightning_ckmerge.search.study import SearchStudy, SharedStudy, make_sampler
from lightning_ckmerge.search.verdict import Point, Progress, reach_verdict


class Scorer(Protocol):
    """Loads, scores and differentiates merges; the plugin runs the user's own validation for it."""

    @property
    def merger(self) -> Merger:
        """The snapshots."""

    def score(self, c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        """Return a candidate's score; arguments are those of ``search.problem.Evaluate``."""

    def load(self, c: Coefficients) -> None:
        """Put a merge in place of the live weights."""

    def gradient(self, c: Coefficients) -> Mapping[str, Array]:
        """Return the derivatives at ``c``, as ``search.refine.Differentiate`` says."""

    def check(self, scored: Scored, read: Callable[[], None]) -> None:
        """Raise ``ArtifactError`` unless the weights that ``read`` puts in place score as was recorded."""

    def num_batches(self, half: Half) -> tuple[int, ...]:
        """Return the batches of each loader in a half."""

    def can_confirm(self) -> bool:
        """Whether the confirmation half has any batches."""

    def notes(self) -> Sequence[str]:
        """Return warnings about the evaluations so far."""


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """What one search needs. The defaults are of one that takes nothing of a training's time, and knows no earlier one.

    Args:
        name: Unique in the storage; an interrupted search goes on under the same name.
        settings: What the callback was asked for.
        space: The space of ``settings``, bound to the model.
        allowed_s: Seconds that the search may take; ``None``: no limit.
        allowed_by: The argument that sets the limit.
        searched_s: Seconds that the run's earlier searches took.
        training_s: Seconds of training so far, searches not counted.
        previous: Coordinates of the previous search's optimum.
        validated: Step and value of the run's own validations, at least over its last third.
        searched: Step and value of its earlier searches' latest weights over that third, on the confirmation half.
        notes: What people should know of the moment of this search; they lead the verdict's warnings.
        journal: The journal file that is used where ``search.storage`` is ``None``.
        shared: Other processes may work on this search at the same time.
        adapters: How adapters are merged; ``None``: there are none.
        due: Name of the due search that a follower carries out; ``None``: the run searches itself.
    """

    name: str
    step: int
    settings: MergeSettings
    space: Space
    scorer: Scorer
    journal: Path
    on_scored: Callable[[Scored, int], None]
    agree: Callable[[Callable[[], T]], T]
    allowed_s: float | None
    allowed_by: str = "search.timeout_s"
    searched_s: float = 0.0
    training_s: float = 0.0
    previous: Mapping[str, float] | None = None
    validated: Sequence[Point] = ()
    searched: Sequence[Point] = ()
    notes: Sequence[str] = ()
    shared: bool = False
    adapters: AdapterMerge | None = None
    due: str | None = None

    def at_low_rate(self, objection: str | None, *, is_decayed: bool) -> SearchJob:
        """Return the job at a moment of the learning rate.

        Args:
            objection: Why a search has little to find there, which is noted; ``None``: it may have.
            is_decayed: Whether that is since the rate has decayed. Then, as ``search.at_low_lr`` says, the search stays
                near the latest weights, wherever the last optimum was.
        """
        job = self if objection is None else replace(self, notes=[f"{objection[0].upper()}{objection[1:]}."])
        if is_decayed and self.settings.search.at_low_lr == "tail":
            return replace(job, settings=self.settings.after_decay(), space=Tail(), previous=None)
        return job


def run_search(job: SearchJob) -> SearchOutcome:
    """Search, confirm, and reach the verdict. The live weights are left as the last evaluation had them.

    Raises:
        SkipError: There is nothing to merge, or the budget does not allow the least of searches.
        SearchError: The latest weights have no finite value.
        MonitorError: Validation does not log the metric.
    """
    start = time.monotonic()
    search = _search(job, job.scorer.score)
    warnings = _refine(job, search)
    if job.scorer.can_confirm():
        search.confirm()
    return _outcome(job, search, time.monotonic() - start, warnings)


def join_search(job: SearchJob) -> int:
    """Help another process's search until all its trials are scored, and return how many candidates were scored here.

    Raises:
        SearchError: As ``run_search``.
        MonitorError: As ``run_search``.
    """
    num_scored = 0

    def evaluate(c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        nonlocal num_scored
        num_scored += 1
        return job.scorer.score(c, half, keep_going)

    _search(job, evaluate)
    return num_scored


def _search(job: SearchJob, evaluate: Evaluate) -> Search:
    """Score anchors and trials."""
    if len(job.scorer.merger.snapshots_K) < 2:
        raise SkipError(
            "a search needs at least one snapshot beside the latest weights, got none. "
            "Shorten `buffer.every_n_train_steps` or search later."
        )
    settings, config = job.settings, job.settings.search
    problem = Problem(
        objectives=settings.objectives,
        space=job.space,
        segments_K=job.scorer.merger.segments_K,
        n_trials=config.n_trials,
        anchors=tuple(config.anchors),
        staged=settings.evaluation.staged,
        constraints=tuple(config.constraints),
        previous=job.previous,
        max_added=MAX_REFINED if config.refine else 0,
    )
    reserved = most_confirmed(of_front=settings.has_several) * sum(job.scorer.num_batches("confirm"))
    budget = Budget(job.allowed_s, reason=f"`{job.allowed_by}`", reserved_batches=reserved)
    search = Search(
        problem=problem,
        evaluate=evaluate,
        open_study=lambda latest: _open_study(job, latest),
        budget=budget,
        agree=job.agree,
        stopping=_stopping(job),
        on_scored=job.on_scored,
    )
    search.run()
    if search.stopped_early is not None and not (search.anchors[1:] or search.trials):
        raise SkipError(
            f"the search stopped {search.stopped_early}. Raise `{job.allowed_by}`, or search less often.",
            needed_s=budget.forecast_s,
        )
    return search


def _stopping(job: SearchJob) -> Stopping:
    if job.shared:  # every process ends with all trials
        return NEVER
    # The Gaussian process knows one objective, and no constraint.
    config = job.settings.search
    min_gain_left = 0.0 if job.settings.has_several or config.constraints else config.min_gain_left
    return Stopping(min_gain_left=min_gain_left, terminator=config.terminator)


def _refine(job: SearchJob, search: Search) -> list[str]:
    """Refine the winner where that is asked for, and return why it stopped, if that was a fault."""
    if job.settings.search.refine is None:
        return []
    reason = refine(search, job.scorer.gradient, tolerant=not job.settings.raises)
    return [f"The refinement by gradients stopped: {reason}"] if reason else []


def _open_study(job: SearchJob, latest: Score) -> SearchStudy:
    config, objectives = job.settings.search, job.settings.objectives
    sampler = make_sampler(config.sampler, config.seed)
    segments_K = job.scorer.merger.segments_K
    intervals = job.space.coordinates(segments_K)
    # The latest weights' values, batch by batch, stand for weights, data and random state at once.
    identity = {
        "snapshots": [asdict(r) for r in job.scorer.merger.records()],
        "latest": [[o.value, o.values_B] for o in latest.objectives],
        "space": [type(job.space).__qualname__, {n: asdict(i) for n, i in intervals.items()}],
        # Settings that leave the ranges as they are show in the coefficients.
        "corner": asdict(candidate_at("", {n: i.high for n, i in intervals.items()}, segments_K, job.space)),
        "groups": dict(job.space.group_of),
        "constraints": [asdict(c) for c in config.constraints],
        "sampler": type(sampler).__qualname__,
        "monitor": [objectives[0].monitor, objectives[0].mode, *(asdict(o) for o in objectives[1:])],
        "adapters": job.adapters,
    }
    open_study = partial(SharedStudy, n_trials=config.n_trials) if job.shared else SearchStudy
    return open_study(
        config.storage or job.journal,
        job.name,
        sampler=sampler,
        intervals=intervals,
        objectives=objectives,
        fingerprint=_fingerprint(identity),
    )


def _outcome(job: SearchJob, search: Search, elapsed_s: float, warnings: Sequence[str]) -> SearchOutcome:
    winner, latest = search.winner, search.latest
    judge = partial(
        reach_verdict,
        latest=latest,
        best_anchor=search.best_anchor,
        objectives=job.settings.objectives,
        front=search.front,
        progress=_progress(job, latest),
    )
    seconds = {**search.seconds, "other": max(0.0, elapsed_s - sum(search.seconds.values()))}
    share = (job.searched_s + elapsed_s) / job.training_s if job.training_s > 0 else None
    return SearchOutcome(
        step=job.step,
        monitor=job.settings.objectives[0].monitor,
        mode=job.settings.objectives[0].mode,
        space=job.space.space_name,
        snapshots_K=job.scorer.merger.records(),
        group_of=job.space.group_of,
        winner=winner,
        anchors=tuple(search.anchors),
        trials=tuple(search.trials),
        verdict=judge(winner, warnings=(*_warnings(job, search, winner), *warnings)),
        evaluation=_evaluation_record(job, latest),
        cost=Cost(
            seconds=seconds,
            share_of_training=share,
            num_batches=search.num_batches,
            num_batches_saved=search.num_batches_saved,
            stopped_early=search.stopped_early,
        ),
        front=tuple((t, judge(t, warnings=tuple(_warnings(job, search, t)))) for t in search.shown if t is not winner),
    )


def _progress(job: SearchJob, latest: Scored) -> Progress:
    now = [(job.step, latest.confirm.value)] if latest.confirm is not None else []
    return Progress(job.step, (job.validated, [*job.searched, *now]))


def _warnings(job: SearchJob, search: Search, winner: Scored) -> list[str]:
    z_D = winner.candidate.coordinates
    found = [*job.notes, *job.scorer.notes()]
    if z_D is not None:
        found += job.space.warnings(z_D, job.scorer.merger.segments_K)
    if search.stopped_early is not None and not search.found_enough:
        found.append(f"The search stopped {search.stopped_early}.")
    if not job.scorer.can_confirm():
        found.append(ONE_BATCH)
    if winner is search.latest and job.space.must_be_certain:
        found.append("So near the latest weights, a merge must be better for certain on the search half, too.")
    return found


def _evaluation_record(job: SearchJob, latest: Scored) -> EvaluationRecord:
    def samples(score: Score | None) -> float | None:
        return sum(score.sizes_B) if score is not None and score.sizes_B is not None else None

    search_batches, confirm_batches = job.scorer.num_batches("search"), job.scorer.num_batches("confirm")
    num_samples = samples(latest.search), samples(latest.confirm)
    identity = [*job.settings.monitors, search_batches, confirm_batches, *num_samples]
    return EvaluationRecord(
        search_batches=search_batches,
        confirm_batches=confirm_batches,
        search_samples=num_samples[0],
        confirm_samples=num_samples[1],
        fingerprint=_fingerprint(identity),
    )


def _fingerprint(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
