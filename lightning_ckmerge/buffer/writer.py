"""One background thread that does the buffer's slow work in order, behind training."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import Queue


class Writer:
    """Runs jobs one after another in a daemon thread.

    A job that fails ends nothing: its exception waits in ``take_failures`` for the owner to report. The thread starts
    with the first job, so that a writer may be built before a launcher forks.
    """

    def __init__(self) -> None:
        # One job runs and one waits; a third waits in `submit`: a slow disk slows training instead of filling memory.
        self._jobs: Queue[Callable[[], None] | None] = Queue(maxsize=1)
        self._failures: deque[Exception] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` after those before it; wait while one is already waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ckmerge-writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until every job is done."""
        self._jobs.join()

    def take_failures(self) -> list[Exception]:
        """Return what jobs have raised since the last call, in order, without waiting."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def close(self) -> None:
        """Finish every job and end the thread; a later job starts a new one."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._failures.append(error)
            finally:
                # The job holds memory of the model's size; the next get() may wait for a whole segment.
                del job
                self._jobs.task_done()
        self._jobs.task_done()
