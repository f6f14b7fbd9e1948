"""Watches a live run, takes its due searches one after another, and stops when the run has."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ckmerge.artifact.due import (
    PART_NAME,
    DueResult,
    DueSearch,
    RunSign,
    due_step,
    list_due,
    read_due,
    result_names,
)
from lightning_ckmerge.artifact.leases import LEASE_S, Lease, find_lease
from lightning_ckmerge.artifact.runs import find_run
from lightning_ckmerge.buffer.storage import DiskStorage
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.errors import ConfigError, SnapshotError
from lightning_ckmerge.plugin.follow.searching import DueSearcher
from lightning_ckmerge.plugin.offline.scoring import at_train_start
from lightning_ckmerge.plugin.progress import OnScored

POLL_S = 0.5
# Without a sign of life of the run; it gives one every few seconds.
TIMEOUT_S = 300.0

Ending = Literal["ended", "stopped", "lost", "once"]


@dataclass(frozen=True, kw_only=True)
class FollowOptions:
    """How a follower works.

    Args:
        shares: Whether it shares the trials of a search with other followers that do.
        once: Search what is due now, and stop.
        timeout_s: Seconds without a sign of life of the run after which it counts as dead.
        poll_s: Seconds between two looks.
        lease_s: Seconds after a follower's last sign of life for which its lease counts.
    """

    shares: bool = False
    once: bool = False
    timeout_s: float = TIMEOUT_S
    poll_s: float = POLL_S
    lease_s: float = LEASE_S


@dataclass(kw_only=True)
class Following:
    """What a follower has done.

    Args:
        ending: Why it stopped: the run has ``ended``; an exception ``stopped`` it; it was ``lost``: no sign of life;
            or nothing more was due, for a follower that works ``once``.
        results: Of the due searches that it took.
        num_helped: Candidates that it scored for other followers.
    """

    ending: Ending = "ended"
    results: list[DueResult] = field(default_factory=list)
    num_helped: int = 0


def follow_run(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    settings: MergeSettings,
    dirpath: Path,
    options: FollowOptions,
    *,
    on_scored: OnScored = lambda trial, total: None,
    on_result: Callable[[DueResult], None] = lambda result: None,
    on_begun: Callable[[], None] = lambda: None,
) -> Following:
    """Search what a run leaves in ``dirpath``, until it has ended.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: The run's module, built as it was; its weights do not matter.
        data: What ``fit`` takes beside the module.
        settings: The run's callback's.
        dirpath: The run's directory; it need not be there yet.
        options: How to work.
        on_scored: Told of each scored candidate.
        on_result: Told of each result.
        on_begun: Called when module and data are set up, and the follower begins to look for the run.

    Raises:
        ConfigError: The run does not leave its searches to followers.
        CkmergeError: The follower cannot do its work; the search that it was at is left to others.
    """
    if settings.search.where != "follower":
        raise ConfigError(
            '`search.where` must be "follower" in the config of a run that is followed, got "training". Set it, and '
            "start the run with it."
        )
    with tempfile.TemporaryDirectory(prefix="ckmerge-follow-") as scratch:

        def work(trainer: Trainer, callback: Callback) -> Following:
            def searcher(found: Path) -> DueSearcher:
                told = (settings, trainer, callback, found, Path(scratch))
                return DueSearcher(*told, shares=options.shares, on_scored=on_scored)

            on_begun()
            return Follower(dirpath, searcher, options, on_result).run()

        return at_train_start(trainer, module, data, work)


class Follower:
    """Takes the due searches of one run.

    Args:
        dirpath: The run's directory, or one that several runs share.
        make_searcher: Makes what carries them out, in the run's own directory.
        options: How to work.
        on_result: Told of each result.
    """

    def __init__(
        self,
        dirpath: Path,
        make_searcher: Callable[[Path], DueSearcher],
        options: FollowOptions,
        on_result: Callable[[DueResult], None],
    ) -> None:
        self._shared_dirpath = dirpath
        self._dirpath = dirpath
        self._make_searcher = make_searcher
        self._options = options
        self._on_result = on_result
        self._searcher: DueSearcher | None = None
        self._sign: RunSign | None = None
        self._last_sign_s = time.monotonic()
        self._helped: set[str] = set()
        self._entered: set[str] = set()
        self._done = Following()

    def run(self) -> Following:
        """Work until the run has ended, or has given no sign of life for too long."""
        while (ending := self._round()) is None:
            time.sleep(self._options.poll_s)
        self._done.ending = ending
        if self._searcher is not None and self._sign is not None and self._sign.state != "training":
            self._searcher.look_back(self._sign.step)
        self._tidy()
        return self._done

    def _round(self) -> Ending | None:
        """Do what there is to do, and return why to stop; ``None`` while there may be more."""
        self._watch()
        while (due := self._next()) is not None:
            self._work_on(due)
            self._watch()
        if self._searcher is not None and (names := result_names(self._dirpath)) != self._entered:
            self._searcher.enter_skips()
            self._entered = names
        if self._options.once:
            return "once"
        # In this order: what was left before the end is seen after it.
        state = self._sign.state if self._sign is not None else "training"
        is_quiet = time.monotonic() - self._last_sign_s > self._options.timeout_s
        open_ = self._open()
        if state != "training" and (not open_ or is_quiet):
            self._give_up(open_)
            return state
        if is_quiet:
            self._give_up(open_)
            return "lost"
        return None

    def _watch(self) -> None:
        """Look for a sign of life; clocks of two machines are not compared."""
        if self._sign is None:
            self._dirpath = find_run(self._shared_dirpath)
        sign = RunSign.read(self._dirpath)
        if sign != self._sign or any(find_lease(due) is not None for due in self._open()):
            self._last_sign_s = time.monotonic()
        self._sign = sign
        if sign is not None and self._searcher is None:
            self._searcher = self._make_searcher(self._dirpath)

    def _open(self) -> list[Path]:
        """Return the due searches without a result."""
        done = result_names(self._dirpath)
        return [due for due in list_due(self._dirpath) if due.name not in done]

    def _next(self) -> DueSearch | None:
        """Return the oldest due search that this follower can work on."""
        for path in self._open():
            lease = find_lease(path)
            helps = lease is not None and lease.shares and self._options.shares and path.name not in self._helped
            if lease is None or helps:
                due = read_due(path)
                if due is not None and self._searcher is not None:
                    return due
        return None

    def _work_on(self, due: DueSearch) -> None:
        assert self._searcher is not None
        lease = Lease.acquire(due.path, shares=self._options.shares, duration_s=self._options.lease_s)
        if lease is not None:
            with lease:
                result = self._searcher.search(due, lease)
            if result is not None:
                self._done.results.append(result)
                self._on_result(result)
        elif self._options.shares and find_lease(due.path) is not None:
            self._helped.add(due.name)
            with contextlib.suppress(SnapshotError, OSError):  # it is done, and has been taken away
                self._done.num_helped += self._searcher.help_on(due)
        self._last_sign_s = time.monotonic()

    def _give_up(self, incomplete: list[Path]) -> None:
        """Say what came of due searches that are not whole, and never will be."""
        for path in incomplete:
            if self._searcher is None or find_lease(path) is not None:
                continue
            num = len([p for p in path.glob("rank=*") if PART_NAME.fullmatch(p.name)])
            assert self._sign is not None
            reason = f"the run has ended, and {num} ranks have left their part. Look at their logs."
            result = DueResult(
                due=path.name, run_id=self._sign.run_id, step=due_step(path), status="skipped", reason=reason
            )
            result.write(self._dirpath)
        if incomplete and self._searcher is not None:
            self._searcher.enter_skips()

    def _tidy(self) -> None:
        """Once training is over, take away what it has left, unless another follower reads it."""
        sign = RunSign.read(self._dirpath)
        over = sign is not None and sign.state != "training"
        if sign is None or not over or self._open() or any(find_lease(d) is not None for d in list_due(self._dirpath)):
            return
        for due in list_due(self._dirpath):
            shutil.rmtree(due, ignore_errors=True)
        for directory, names in sign.names.items():
            storage = DiskStorage(self._dirpath / directory)
            with contextlib.suppress(OSError, SnapshotError):
                for name in names:
                    storage.delete(name)
