"""One search as an Optuna study: candidates asked for, scores told, and continued after an interruption.

Each search is a study of its own (the weights have moved on since the last one, and so have all values); the studies of
a run share one storage.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.spaces import Interval
from lightning_ckmerge.errors import CkmergeError, ConfigError, SearchError

# Anchors in the space count as start-up trials: a search of `grouped` draws three random points, one of `decay` none.
NUM_STARTUP_TRIALS = 4
NUM_ATTEMPTS = 4
ATTEMPT_S = 0.5
POLL_S = 0.5
# A process on another machine cannot be seen to live: one that takes so many times the longest trial so far, and at
# least a minute more, is given up. Its trial is evaluated again, so a wrong guess costs one evaluation.
MAX_SLOWNESS = 10
MIN_PATIENCE_S = 60


class SearchStudy:
    """The trials of one search in an Optuna storage.

    Args:
        storage: Path of a journal file, which is created, or any Optuna storage URL.
        name: Name of the study; taken again only if ``fingerprint`` is that of the stored one, else ``name-v1``, ...
        sampler: Proposes coordinates; copied, so that it starts each search in the same state.
        intervals: The D coordinates and their ranges.
        objectives: The metrics to search by, at least one.
        fingerprint: Identifies weights, data and settings. Equal ones mean that an interrupted search continues.
    """

    def __init__(
        self,
        storage: Path | str,
        name: str,
        *,
        sampler: BaseSampler,
        intervals: Mapping[str, Interval],
        objectives: Sequence[Objective],
        fingerprint: str,
    ) -> None:
        self._distributions = {n: _distribution(i) for n, i in intervals.items()}
        self._pending: dict[str, optuna.Trial] = {}
        directions = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
        with quiet(), _readable(storage):
            self._backend = open_storage(storage)
            self._study = optuna.create_study(
                storage=self._backend,
                study_name=self._name(self._backend, name, fingerprint),
                directions=[directions[o.mode] for o in objectives],
                # Without a sampler Optuna would take up a stored study with TPE, whatever it was begun with.
                sampler=copy.deepcopy(sampler),
                load_if_exists=True,
            )
            self._study.set_user_attr("fingerprint", fingerprint)
            self._name_metrics([o.monitor for o in objectives])
            self._clear()

    @property
    def study(self) -> Study:
        """The study with all results so far, as Optuna keeps it."""
        return self._study

    def knows(self, name: str) -> bool:
        """Whether a candidate of this name was scored, by this process or before an interruption."""
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return any(t.user_attrs.get("name") == name for t in complete)

    def begin(self, name: str, fixed: Mapping[str, float] | None = None) -> tuple[dict[str, float], Score | None]:
        """Return the next candidate's coordinates, and its score if an interrupted run of this search has scored it.

        Args:
            name: The candidate's name, unique in the search.
            fixed: An anchor's coordinates; ``None``: the sampler proposes.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.user_attrs.get("name") == name:
                return dict(trial.params), score_from(trial.user_attrs.get("score", {}))
        return dict(self._ask(name, fixed).params), None

    def tell(self, name: str, score: Score, violations: Mapping[str, float]) -> None:
        """Report the score of a candidate.

        Args:
            name: As given to ``begin``.
            score: Its score.
            violations: Constraint name -> by how much it is broken; 0 or less if it holds.

        Optuna takes no value or violation that is not finite. In its place stands one that is worse than the worst
        so far by as much as that is worse than the best: the sampler learns to keep away, where of a failed trial it
        learns nothing and asks again next to it. Before there are two different ones to go by, the trial fails.
        """
        trial = self._pending.pop(name, None)
        if trial is None:  # it was told before the interruption
            return
        trial.set_user_attr("score", asdict(score))
        told = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        scores = [score_from(t.user_attrs.get("score", {})).objectives for t in told]
        signs = [sign_of_direction(direction) for direction in self._study.directions]
        values = [
            sign * _finite(sign * own.value, [sign * other[i].value for other in scores])
            for i, (sign, own) in enumerate(zip(signs, score.objectives, strict=True))
        ]
        # Beside 0, so that a missing value counts as broken.
        broken = {k: _finite(v, [0.0, *(t.constraints.get(k, 0.0) for t in told)]) for k, v in violations.items()}
        with quiet():
            if not all(map(math.isfinite, (*values, *broken.values()))):
                self._study.tell(trial, state=TrialState.FAIL)
                return
            for key, violation in broken.items():
                trial.set_constraint(key, violation)
            self._study.tell(trial, values)

    def _name(self, backend: BaseStorage, name: str, fingerprint: str) -> str:
        taken = {s.study_name: s for s in optuna.get_all_study_summaries(backend)}
        versions = (name if v == 0 else f"{name}-v{v}" for v in range(len(taken) + 1))
        return next(n for n in versions if n not in taken or taken[n].user_attrs.get("fingerprint") == fingerprint)

    def _name_metrics(self, names: list[str]) -> None:
        if self._study.metric_names == names:  # the study was begun earlier
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(names)

    def _clear(self) -> None:
        """A trial that was under way when the process died would count as pending for ever."""
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
        # One that waits cannot be told, and to ask for it would draw random numbers.
        study_id = self._backend.get_study_id_from_name(self._study.study_name)
        for trial in self._study.get_trials(states=(TrialState.WAITING,)):
            trial_id = self._backend.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            self._backend.set_trial_state_values(trial_id, state=TrialState.FAIL)

    def _ask(self, name: str, fixed: Mapping[str, float] | None) -> optuna.Trial:
        # Validation hooks run without gradients, but a GP is fitted with them.
        with quiet(), torch.inference_mode(False), torch.enable_grad():
            if fixed is not None:
                self._study.enqueue_trial(dict(fixed))
            asked = self._study.ask(self._distributions)
        asked.set_user_attr("name", name)
        self._pending[name] = asked
        return asked


def make_sampler(sampler: BaseSampler | None, seed: int) -> BaseSampler:
    """Return ``sampler``, or the default: a Gaussian process for an objective without noise."""
    if sampler is not None:
        return sampler
    with quiet(), warnings.catch_warnings():
        # `deterministic_objective` is marked experimental. All candidates see the same batches, so it is true here.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=NUM_STARTUP_TRIALS, deterministic_objective=True)


def open_storage(storage: Path | str) -> BaseStorage:
    """Return an Optuna storage, which is created where it does not exist.

    Args:
        storage: Path of a journal file, or any Optuna storage URL.

    Raises:
        ConfigError: The URL's driver is not installed, or there is no such database.
    """
    if isinstance(storage, str):
        return _open_url(storage)
    storage.parent.mkdir(parents=True, exist_ok=True)
    lock = _JournalLock(str(storage))
    with _writable(storage):
        _cut_unfinished_line(storage, lock)
        return JournalStorage(_Journal(str(storage), lock_obj=lock))


class _Journal(JournalFileBackend):
    """Optuna's journal, which says what it needs where it cannot be written."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines.

        Raises:
            SearchError: The disk refuses.
        """
        with _writable(self._file_path):
            super().append_logs(logs)


@contextlib.contextmanager
def _writable(journal: Path | str) -> Iterator[None]:
    """Say what a journal needs where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise SearchError(
            f"a search's journal must be writable, got {type(error).__name__} for {journal}: {error}. Free some space "
            "or fix the cause, and the next search writes again."
        ) from error


class _JournalLock(JournalFileOpenLock):
    """Optuna's lock, which works on file systems without links, and which a dead process of this machine loses at once.

    Optuna alone would wait 30 s for it, in the next search of a run that has died in a write.
    """

    def acquire(self) -> bool:
        """Take the lock, and leave word who has it."""
        if self._is_orphaned():
            with contextlib.suppress(RuntimeError):  # another process was faster
                self.release()
        super().acquire()
        with contextlib.suppress(OSError):  # of a full disk; then others wait, as Optuna does
            Path(self._lock_file).write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        return True

    def release(self) -> None:
        """Give the lock back. Optuna renames it first, and a process that dies then leaves that file for good."""
        try:
            os.unlink(self._lock_file)
        except OSError as error:
            raise RuntimeError("Error: did not possess lock") from error

    def _is_orphaned(self) -> bool:
        try:
            host, pid = Path(self._lock_file).read_text(encoding="utf-8").split()
            return host == socket.gethostname() and not is_process_alive(int(pid))
        except (OSError, ValueError):
            return False


def _cut_unfinished_line(journal: Path, lock: JournalFileOpenLock) -> None:
    """Cut off the rest of a write that a full disk has ended: the next one would follow on its line, unreadable."""
    if not _has_unfinished_line(journal):
        return
    lock.acquire()
    try:
        if _has_unfinished_line(journal):  # and nobody is writing it
            with journal.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _has_unfinished_line(journal: Path) -> bool:
    if not journal.exists() or not journal.stat().st_size:
        return False
    with journal.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


@contextlib.contextmanager
def _readable(storage: Path | str) -> Iterator[None]:
    """A journal is a file that others may have written to, and Optuna takes it for its own."""
    try:
        yield
    except (CkmergeError, OSError):
        raise
    except Exception as error:
        if isinstance(storage, str):
            raise
        raise SearchError(
            f"a study must be a journal that Optuna wrote, got {type(error).__name__} for {storage}. Move the file "
            "away: the next search begins a new one."
        ) from error


def _open_url(url: str) -> BaseStorage:
    for attempts_left in reversed(range(NUM_ATTEMPTS)):
        try:
            return optuna.storages.get_storage(url)
        except ImportError as error:
            raise _refused(url, error, "Install that driver, or name another one: `postgresql+psycopg2://`.") from error
        # Processes that are started together may all try to create the tables; the others' lie there by then.
        except Exception as error:
            if not attempts_left:
                raise _refused(url, error, "Check the URL, and that the server runs.") from error
            time.sleep(ATTEMPT_S)
    raise AssertionError("the last attempt returns or raises")


def _refused(url: str, error: Exception, remedy: str) -> ConfigError:
    # Neither user nor password belongs in a log.
    shown = re.sub("://.*@", "://...@", url).partition("?")[0]
    reason = str(error.__cause__ or error).partition("\n")[0]
    return ConfigError(f"`search.storage` must be a database that Optuna can open, got {shown}: {reason}. {remedy}")


def _distribution(interval: Interval) -> BaseDistribution:
    if interval.integer:
        return IntDistribution(int(interval.low), int(interval.high), log=interval.log)
    return FloatDistribution(interval.low, interval.high, log=interval.log)


def _finite(value: float, others: Sequence[float]) -> float:
    """Return ``value``, or one that is worse (higher) than all others.

    Where fewer than two differ there is no scale, and ``value`` stays as it is.
    """
    finite = [v for v in others if math.isfinite(v)]
    if math.isfinite(value) or len(set(finite)) < 2:
        return value
    return max(finite) + (max(finite) - min(finite))


def score_from(stored: Mapping[str, object]) -> Score:
    """Return the score that a trial keeps; JSON has no tuples, and no scores.

    Raises:
        SearchError: It is none.
    """
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        values["value"] = float(values.get("value", ""))
        return Score(**{**values, "others": tuple(map(score_from, values.get("others", ())))})
    except (TypeError, ValueError, AttributeError) as error:
        raise SearchError(
            f"a trial must keep the score that it was told, got {type(error).__name__} for one of the study's. Move "
            "the journal away, or name another storage: the search begins anew."
        ) from error


def sign_of_direction(direction: StudyDirection) -> int:
    """Return 1 if a study minimises, -1 if it maximises."""
    return 1 if direction == StudyDirection.MINIMIZE else -1


def require_one_objective(study: Study, sampler: BaseSampler) -> None:
    """Raise ``SearchError`` unless a study has but one objective, for samplers that know no more."""
    if len(study.directions) > 1:
        raise SearchError(
            f"`{type(sampler).__name__}` searches by one metric, got {len(study.directions)} in `monitor`. Name one, "
            "or leave `search.sampler` out: the default searches by several."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna logs every study and trial at INFO; a pretraining log wants one line a search."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        keep_warned()


def keep_warned() -> None:
    """Keep Python from repeating its warnings.

    It forgets all of that wherever filters change, and Optuna and others change them for a moment. A warning that a
    training step raises would be shown once more after each search.
    """
    probe: dict[str | tuple[str, type[Warning], int], int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.warn_explicit("", UserWarning, "", 0, registry=probe)
    # A registry holds while its version is that of the filters, which leaving the block has raised once more.
    version = probe["version"] + 1
    for module in tuple(sys.modules.values()):
        if (registry := getattr(module, "__dict__", {}).get("__warningregistry__")) is not None:
            registry["version"] = version


class SharedStudy(SearchStudy):
    """A study that other processes work on at the same time.

    ``begin`` hands out the sampler's trials in the order in which they become known to this process: first those that
    others have finished, then new ones until there are ``n_trials`` in all, and last it waits for evaluations under
    way. So every process ends with all trials, each evaluated once. Anchors that another process is evaluating are
    evaluated here too: waiting would take as long.

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
        """Report a score; too late if another process has given this one up."""
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
        """Give up the evaluations of dead processes."""
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
        if worker.get("host") == self._worker["host"] and not is_process_alive(worker["pid"]):
            return True
        assert trial.datetime_start is not None
        return (datetime.now() - trial.datetime_start).total_seconds() > patience_s


def _is_samplers(trial: FrozenTrial) -> bool:
    """The moment after it was asked a trial has no name."""
    return str(trial.user_attrs.get("name", "trial-")).startswith("trial-")


def is_process_alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    if os.name == "nt":  # where the signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
