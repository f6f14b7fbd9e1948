"""One search by several processes over one Optuna storage, each on a device of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.study import SearchStudy, quiet, score_from

POLL_S = 0.5
# On another machine nobody sees whether a process lives: one that takes so many times the longest trial so far, and at
# least a minute more, is given up. Its trial is evaluated again, so a wrong guess costs one evaluation.
MAX_SLOWNESS = 10
MIN_PATIENCE_S = 60


class SharedStudy(SearchStudy):
    """A study that other processes work on at the same time.

    ``begin`` hands out the sampler's trials in the order in which they become known to this process: first those that
    others have finished, then new ones until there are ``n_trials`` in all, and last it waits for what is under way. So
    every process ends with all trials, each evaluated once. Anchors that another process is evaluating are evaluated
    here too: waiting would take as long.

    Args:
        n_trials: The sampler's trials, over all processes.
        kwargs: As for ``SearchStudy``.
    """

    def __init__(self, *args: Any, n_trials: int, **kwargs: Any) -> None:
        self._n_trials = n_trials
        self._seen: set[int] = set()
        self._worker = {"host": socket.gethostname(), "pid": os.getpid()}
        super().__init__(*args, **kwargs)

    def begin(self, name: str, fixed: Mapping[str, float] | None = None) -> tuple[dict[str, float], Score | None]:
        """Return coordinates, and the score if some process has it already."""
        if fixed is not None:
            return self._begin_anchor(name, fixed)
        while True:
            self._clear()
            trials = [t for t in self._trials() if _is_samplers(t)]
            done = [t for t in trials if t.state.is_finished() and t.number not in self._seen]
            if done:
                self._seen.add(done[0].number)
                return dict(done[0].params), score_from(done[0].user_attrs["score"])
            if len(trials) < self._n_trials:
                asked = self._ask(name, None)
                asked.set_user_attr("worker", self._worker)
                self._seen.add(asked.number)
                return dict(asked.params), None
            time.sleep(POLL_S)

    def tell(self, name: str, score: Score, violations: Mapping[str, float]) -> None:
        """Report what was asked; too late if another process has given this one up."""
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            super().tell(name, score, violations)

    def _begin_anchor(self, name: str, fixed: Mapping[str, float]) -> tuple[dict[str, float], Score | None]:
        for trial in self._trials():
            if trial.user_attrs.get("name") == name:
                score = trial.user_attrs.get("score")
                return dict(fixed), score_from(score) if score and trial.state.is_finished() else None
        asked = self._ask(name, fixed)
        asked.set_user_attr("worker", self._worker)
        return dict(fixed), None

    def _trials(self) -> Sequence[FrozenTrial]:
        """Those under way or scored; a trial that was given up is neither."""
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if t.state == TrialState.RUNNING or "score" in t.user_attrs]

    def _name(self, backend: BaseStorage, name: str, fingerprint: str) -> str:
        """All processes come to the same name without asking each other."""
        return f"{name}-{fingerprint[:8]}"

    def _clear(self) -> None:
        """Give up what processes that are gone were doing."""
        durations = [t.duration.total_seconds() for t in self._trials() if t.state.is_finished() and t.duration]
        patience_s = MIN_PATIENCE_S + MAX_SLOWNESS * max(durations, default=0.0)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_abandoned(trial, patience_s):
                # Another process may come first, with the same or with a late result.
                with quiet(), contextlib.suppress(UpdateFinishedTrialError, ValueError):
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def _is_abandoned(self, trial: FrozenTrial, patience_s: float) -> bool:
        worker = trial.user_attrs.get("worker", {})
        if worker == self._worker:
            return False
        if worker.get("host") == self._worker["host"] and not _is_alive(worker["pid"]):
            return True
        assert trial.datetime_start is not None
        return (datetime.now() - trial.datetime_start).total_seconds() > patience_s


def _is_samplers(trial: FrozenTrial) -> bool:
    """The moment after it was asked a trial has no name."""
    return str(trial.user_attrs.get("name", "trial-")).startswith("trial-")


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where the signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
