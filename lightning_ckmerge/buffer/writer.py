"""Work behind training: a thread that takes one task at a time, and on a GPU a stream of its own."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import Queue

import torch


class Writer:
    """Runs jobs one after another in a daemon thread.

    A job that fails ends nothing: its exception waits in ``take_failures`` for the owner to report. The thread starts
    with the first job, so that a writer may be built before a launcher forks.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str = "ckmerge-writer") -> None:
        self._name = name
        self._jobs: Queue[Callable[[], None] | None] = Queue()
        # One job runs and one waits; a third waits in `submit`: a slow disk slows training instead of filling memory.
        self._free = threading.Semaphore(2)
        self._failures: deque[Exception] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` after those before it; wait while one is already waiting."""
        self._free.acquire()

        def bounded() -> None:
            try:
                job()
            finally:
                self._free.release()

        self.offer(bounded)

    def offer(self, job: Callable[[], None]) -> None:
        """Run ``job`` after those before it, and never wait. The caller sees to it that few are under way."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until every job is done."""
        self._jobs.join()

    def take_failures(self) -> list[Exception]:
        """Return the errors of jobs since the last call, in order, without waiting."""
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


def reached(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that a GPU reaches once its queued work is done; ``None`` for the CPU, where it already is."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def beside_training(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Work on a stream of its own, once ``ready`` has happened; all of it is done in the end. ``None``: on the host.

    Neither thread waits for the other: training's stream continues, and copies to the host overlap with it.
    """
    if device.type == "cuda":
        # A new thread starts on GPU 0, and pinning memory from there would open a context on it.
        torch.cuda.set_device(device)
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
