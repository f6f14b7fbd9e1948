"""The run's side of a search elsewhere, on rank 0: a sign of life for followers, and a look at what they have found.

A thread does both, so that no step waits for a file system.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_ckmerge.artifact.due import DueResult, RunSign, RunState, list_due, read_result, result_names

BEAT_S = 5.0


class Followed:
    """Tells followers that a run lives, and the run what followers have found.

    Args:
        dirpath: The run's directory.
        run_id: The run's.
        session: This session of training.
        step: Optimizer steps so far.
        beat_s: Seconds between two signs of life.

    Attributes:
        step: Optimizer steps so far; to be kept up to date.
        left: Due searches left so far; to be kept up to date.
    """

    def __init__(self, dirpath: Path, run_id: str, session: str, step: int, *, beat_s: float = BEAT_S) -> None:
        self.step = step
        self.left = 0
        self._dirpath = dirpath
        self._sign = RunSign(run_id=run_id, session=session, state="training", beat=0, step=0, left=0)
        self._beat_s = beat_s
        self._seen = result_names(dirpath)
        self._found: deque[DueResult] = deque()
        self._has_ended = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._work, name="ckmerge-followed", daemon=True)
        self._thread.start()

    def take(self) -> list[DueResult]:
        """Return the results since the last call, as far as they have been seen. Does not wait."""
        return [self._found.popleft() for _ in range(len(self._found))]

    @property
    def num_open(self) -> int:
        """Searches of the run that are due, as far as that has been seen."""
        return len([due for due in list_due(self._dirpath) if due.name not in self._seen])

    def end(self, state: RunState, names: Mapping[str, Sequence[str]] | None = None) -> None:
        """Tell followers that training is over, and look once more.

        Args:
            state: How it ended.
            names: Files that only followers need still, by their directory.
        """
        if self._has_ended.is_set():
            return
        self._has_ended.set()
        self._thread.join()
        self._sign = replace(self._sign, state=state, names={k: list(v) for k, v in (names or {}).items()})
        self._beat()
        self._look()

    def _work(self) -> None:
        while not self._has_ended.wait(self._beat_s):
            self._beat()
            self._look()

    def _beat(self) -> None:
        self._sign = replace(self._sign, beat=self._sign.beat + 1, step=self.step, left=self.left)
        with contextlib.suppress(OSError):  # the next one may come through
            self._sign.write(self._dirpath)

    def _look(self) -> None:
        for name in sorted(result_names(self._dirpath) - self._seen):
            result = read_result(self._dirpath, name)
            if result is not None:
                self._seen.add(name)
                self._found.append(result)
