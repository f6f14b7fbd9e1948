"""Anchors, then the sampler's trials, then the winner's confirmation. No Trainer and no tensor in sight.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from lightning_ckmerge.core.outcome import Candidate, Score, Scored
from lightning_ckmerge.errors import MonitorError, SearchError
from lightning_ckmerge.search.anchors import candidate_at, is_known_merge, make_anchors, most_derived, next_anchor
from lightning_ckmerge.search.pareto import knee, pareto_front, spread
from lightning_ckmerge.search.problem import Evaluate, Problem
from lightning_ckmerge.search.racing import MIN_PROMISE, Race, paired_difference
from lightning_ckmerge.search.stopping import NEVER, Budget, Stopping
from lightning_ckmerge.search.study import SearchStudy

# Each merge of a front that is published costs a confirmation, and a model on the disk.
MAX_SHOWN = 5
# The best of eight that gain nothing is this far above 0 in one search of a hundred, and then is yet to be confirmed.
CERTAIN_STANDARD_ERRORS = 3.0

T = TypeVar("T")


def most_confirmed(*, of_front: bool) -> int:
    """Return how many candidates are confirmed at most: three for one metric, plus the shown part of a front."""
    return 3 + MAX_SHOWN * of_front


@dataclass
class Search:
    """One search. ``run`` it, then read the fields.

    Args:
        problem: The space, the snapshots and the score.
        evaluate: Scores coefficients.
        open_study: Makes the study, on rank 0, once the latest weights' score is known.
        budget: Its limit of time.
        agree: Runs a function on rank 0 and returns its result on every rank.
        stopping: When it has found enough, where one metric is searched by and no constraint is set.
        on_scored: Called with each scored candidate and the number expected at most.
        gradient_batches: Batch evaluations that gradients took the time of.
    """

    problem: Problem
    evaluate: Evaluate
    open_study: Callable[[Score], SearchStudy]
    budget: Budget
    agree: Callable[[Callable[[], T]], T]
    stopping: Stopping = NEVER
    on_scored: Callable[[Scored, int], None] = lambda scored, total: None
    anchors: list[Scored] = field(default_factory=list)
    trials: list[Scored] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("anchors", "trials", "confirm"), 0.0))
    stopped_early: str | None = None
    found_enough: bool = False
    gradient_batches: int = 0
    _study: SearchStudy | None = None
    _total: int = 0

    def run(self) -> None:
        """Score the anchors, then the sampler's trials, until they are done, or enough is found, or spent."""
        self._run()
        self._finish()

    def _run(self) -> None:
        problem = self.problem
        anchors = make_anchors(problem.segments_K, problem.space, problem.previous, problem.anchors)
        self._total = len(anchors) + most_derived(problem.anchors, len(problem.segments_K)) + problem.n_trials
        self._total += problem.max_added
        self.anchors.append(self._score(anchors[0], "anchors"))
        if not math.isfinite(self.latest.search.value):
            raise SearchError(
                f"the monitored metric must be finite for the latest weights, got {self.latest.search.value}. "
                "Look at the training run first: there is nothing to merge."
            )
        self.agree(self._open)
        for anchor in anchors[1:]:
            if self._must_stop():
                return
            self.anchors.append(self._score_anchor(anchor))
        while (derived := self._next_anchor()) is not None:
            if self._must_stop():
                return
            self.anchors.append(self._score_anchor(derived))
        for i in range(problem.n_trials):
            if self._must_stop():
                return
            self.trials.append(self._score_trial(f"trial-{i}"))

    def add(self, candidate: Candidate) -> Scored:
        """Score one more candidate; it is dropped where it loses, but need not promise more than a draw."""
        race = self._race(min_promise=0)
        self.trials.append(self._score(candidate, "trials", self._evaluate(candidate, "trials", race)))
        return self.trials[-1]

    def affords(self, num_evaluations: int = 1) -> bool:
        """Whether so many more evaluations fit the budget; ``stopped_early`` says so if they do not."""
        reason = self.agree(lambda: self._over_budget(num_evaluations))
        if reason is not None:
            self._stop(reason, found_enough=False)
        return reason is None

    def confirm(self) -> None:
        """Score the winner, the latest weights, the best anchor and others of a front on the confirmation half."""
        for scored in {id(t): t for t in (self.latest, self.best_anchor, self.winner, *self.shown)}.values():
            start = time.monotonic()
            try:
                score = self.evaluate(scored.candidate.coefficients, "confirm")
            except MonitorError:
                return  # all its batches are in the search half
            self.seconds["confirm"] += time.monotonic() - start
            self._replace(scored, replace(scored, confirm=score))

    @property
    def latest(self) -> Scored:
        """The latest weights."""
        return self.anchors[0]

    @property
    def best_anchor(self) -> Scored:
        """The best merge on the search half that needs no search; by its estimate, if it was dropped."""
        return self._best([t for t in self.anchors if is_known_merge(t.candidate)], complete=False)

    @property
    def winner(self) -> Scored:
        """The best of all on the search half; where several metrics are monitored, the knee of the front.

        Where the space asks for certainty, it is the latest weights unless the best one is better by three standard
        errors on the search half.
        """
        best, latest = self._leader, self.latest
        if best is latest or self.problem.has_several or not self.problem.space.must_be_certain:
            return best
        ours, theirs = best.search, latest.search
        if ours.values_B is None or ours.sizes_B is None or theirs.values_B is None:
            return best
        if len(ours.values_B) != len(theirs.values_B):
            return latest
        mean, standard_error = paired_difference(ours.values_B, theirs.values_B, ours.sizes_B)
        return best if -self.problem.sign * mean > CERTAIN_STANDARD_ERRORS * standard_error else latest

    @property
    def front(self) -> list[Scored]:
        """The Pareto front on the search half, by the first metric; empty for one metric."""
        if not self.problem.has_several:
            return []
        front = self._front([*self.anchors, *self.trials])
        return sorted(front, key=lambda t: self._losses(t)[0])

    @property
    def shown(self) -> list[Scored]:
        """Merges along the front, the knee among them, few enough to confirm and publish each."""
        front = self.front
        if not front:
            return []
        keep = next(i for i, t in enumerate(front) if t is self.winner)
        chosen = spread([self._losses(t)[0] for t in front], keep, MAX_SHOWN)
        return [front[i] for i in chosen if front[i] is not self.latest]

    @property
    def num_batches(self) -> int:
        """Batch evaluations spent, gradients counted by their time."""
        scores = [s for t in (*self.anchors, *self.trials) for s in (t.search, t.confirm) if s is not None]
        return sum(s.num_batches for s in scores) + self.gradient_batches

    @property
    def num_batches_saved(self) -> int:
        """Batch evaluations that dropping losers early avoided."""
        full = self.latest.search.num_batches
        # A candidate that was dropped late and scored to its end after all took more.
        return max(0, sum(full - t.search.num_batches for t in (*self.anchors, *self.trials)))

    @property
    def _leader(self) -> Scored:
        return self._best([*self.anchors, *self.trials])

    def _best(self, candidates: Sequence[Scored], *, complete: bool = True) -> Scored:
        """The first of the best, so that the latest weights win a draw."""
        front = self._front(candidates, complete=complete)
        return front[knee([self._losses(t) for t in front])]

    def _front(self, candidates: Sequence[Scored], *, complete: bool = True) -> list[Scored]:
        """The candidates that no other one beats in every metric; for one metric, the first of the best."""
        losses = {id(t): self._losses(t) for t in candidates if t.feasible and (t.search.complete or not complete)}
        eligible = [t for t in candidates if all(map(math.isfinite, losses.get(id(t), (math.nan,))))]
        return [eligible[n] for n in pareto_front([losses[id(t)] for t in eligible])]

    def _losses(self, scored: Scored) -> tuple[float, ...]:
        return tuple(s * o.value for s, o in zip(self.problem.signs, scored.search.objectives, strict=True))

    def _finish(self) -> None:
        """Score a near draw that was dropped to its end, if by its estimate it is the best: it may win after all."""
        loss = {id(t): self.problem.sign * t.search.value for t in (*self.anchors, *self.trials)}
        dropped = (t for t in (*self.anchors, *self.trials) if not t.search.complete and math.isfinite(loss[id(t)]))
        best = min(dropped, key=lambda t: loss[id(t)], default=self._leader)
        if loss[id(best)] >= loss[id(self._leader)] or self.agree(self._over_budget) is not None:
            return
        score = self._evaluate(best.candidate, "trials", race=None)
        # The time before counts as well.
        score = replace(score, num_batches=score.num_batches + best.search.num_batches)
        self._replace(best, replace(best, search=score))

    def _over_budget(self, num_evaluations: int = 1) -> str | None:
        # Not all loaders know their length; the latest weights have been through it.
        return self.budget.stop_reason(num_evaluations * self.latest.search.num_batches)

    def _reason_to_stop(self) -> tuple[str | None, bool]:
        """Why to stop, and whether that is for the best."""
        reason = self._over_budget()
        if reason is not None or not self.trials or self._opened.knows(f"trial-{len(self.trials)}"):
            # A known trial was asked for before an interruption: the search continued.
            return reason, False
        gain = self.problem.sign * (self.latest.search.value - self._leader.search.value)
        reason = self.stopping.reason(self._opened.study, num_trials=len(self.trials), gain=gain)
        return reason, reason is not None

    def _must_stop(self) -> bool:
        reason, found_enough = self.agree(self._reason_to_stop)
        if reason is not None:
            self._stop(reason, found_enough=found_enough)
        return reason is not None

    def _stop(self, reason: str, *, found_enough: bool) -> None:
        scored = f"{_counted(len(self.anchors), 'anchor')} and {_counted(len(self.trials), 'trial')}"
        self.stopped_early = f"after {scored}: {reason}"
        self.found_enough = found_enough

    def _open(self) -> None:
        self._study = self.open_study(self.latest.search)
        self._begin(self.latest.candidate)
        self._tell(self.latest)

    def _next_anchor(self) -> Candidate | None:
        problem = self.problem
        return next_anchor(problem.segments_K, problem.space, problem.anchors, self.anchors, problem.sign)

    def _score_anchor(self, anchor: Candidate) -> Scored:
        known = self.agree(lambda: self._begin(anchor))
        return self._score(anchor, "anchors", known)

    def _score_trial(self, name: str) -> Scored:
        start = time.monotonic()
        z_D, known = self.agree(lambda: self._opened.begin(name))
        self.seconds["trials"] += time.monotonic() - start
        return self._score(candidate_at(name, z_D, self.problem.segments_K, self.problem.space), "trials", known)

    def _begin(self, anchor: Candidate) -> Score | None:
        return self._opened.begin(anchor.name, anchor.coordinates)[1] if anchor.coordinates is not None else None

    def _tell(self, scored: Scored) -> None:
        if scored.candidate.coordinates is not None:
            self._opened.tell(scored.candidate.name, scored.search, self._violations(scored.search))

    @property
    def _opened(self) -> SearchStudy:
        assert self._study is not None
        return self._study

    def _score(self, candidate: Candidate, phase: str, known: Score | None = None) -> Scored:
        """Score a candidate, unless an interrupted run of this search has done so, and tell the study."""
        score = known or self._evaluate(candidate, phase, self._race())
        feasible = all(v <= 0 for v in self._violations(score).values())
        scored = Scored(candidate=candidate, search=score, feasible=feasible)
        if self.anchors and known is None:
            self.agree(lambda: self._tell(scored))
        self.on_scored(scored, self._total)
        return scored

    def _evaluate(self, candidate: Candidate, phase: str, race: Race | None) -> Score:
        start = time.monotonic()
        score = self.evaluate(candidate.coefficients, "search", race.keep_going if race else None)
        elapsed = time.monotonic() - start
        self.seconds[phase] += elapsed
        self.budget.spent(elapsed, score.num_batches)
        return race.estimate(score) if race is not None and not score.complete else score

    def _race(self, min_promise: float = MIN_PROMISE) -> Race | None:
        # A constraint is compared with the latest weights' value over all batches, and a dropped candidate may have
        # missed the only ones that log its metric. And a loser by one metric may be on the front by another.
        if not self.problem.staged or self.problem.constraints or self.problem.has_several:
            return None
        if not self.anchors or self._leader.search.values_B is None:
            return None
        sign, incumbent = self.problem.sign, self._leader.search
        return Race(incumbent, sign, margin=min_promise * sign * (self.latest.search.value - incumbent.value))

    def _violations(self, score: Score) -> dict[str, float]:
        """By how much each constraint is broken, against the latest weights; nothing for the latest weights."""
        if not self.anchors:
            return {}
        before, after = self.latest.search.metrics, score.metrics
        for c in self.problem.constraints:
            if c.monitor not in before:
                raise MonitorError(
                    f"`search.constraints` must name metrics that validation logs, got {c.monitor!r}. "
                    f"Logged are: {', '.join(sorted(before))}."
                )
        return {
            c.monitor: c.sign * (after[c.monitor] - before[c.monitor]) - c.allowance for c in self.problem.constraints
        }

    def _replace(self, old: Scored, new: Scored) -> None:
        for group in (self.anchors, self.trials):
            group[:] = [new if t is old else t for t in group]


def _counted(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"
