"""The writer's thread: order, backpressure, failures, forks."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from lightning_ckmerge.buffer.writer import Writer
from tests.support.waiting import wait_until


def test_jobs_run_in_order_off_the_callers_thread() -> None:
    writer, seen = Writer(), []
    for i in range(20):
        writer.submit(lambda i=i: seen.append((i, threading.current_thread().name)))
    writer.flush()
    assert seen == [(i, "ckmerge-writer") for i in range(20)]
    writer.close()


def test_at_most_one_job_waits() -> None:
    writer, gate = Writer(), threading.Event()
    writer.submit(gate.wait)
    writer.submit(lambda: None)
    third = threading.Thread(target=writer.submit, args=[lambda: None])
    third.start()
    third.join(timeout=0.1)
    assert third.is_alive()
    gate.set()
    third.join(timeout=600)
    assert not third.is_alive()
    writer.close()


def test_failures_are_kept_and_later_jobs_run() -> None:
    writer, seen = Writer(), []
    errors = [OSError("first"), RuntimeError("second")]

    def fail(error: Exception) -> None:
        raise error

    for error in errors:
        writer.submit(lambda error=error: fail(error))
    writer.submit(lambda: seen.append("done"))
    writer.flush()
    assert seen == ["done"]
    assert writer.take_failures() == errors
    assert writer.take_failures() == []
    writer.close()


def test_closing_finishes_what_was_submitted_and_ends_the_thread() -> None:
    others = set(threading.enumerate())
    writer, seen = Writer(), []
    writer.submit(lambda: (time.sleep(0.05), seen.append(1)))
    writer.submit(lambda: seen.append(2))
    writer.close()
    assert seen == [1, 2]
    assert set(threading.enumerate()) <= others
    writer.close()
    writer.submit(lambda: seen.append(3))
    writer.close()
    assert seen == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_built_before_a_fork_works_in_the_child() -> None:
    """Goes red if the thread starts with the writer: threads do not survive a fork."""
    writer = Writer()
    pid = os.fork()
    if pid == 0:
        seen: list[int] = []
        writer.submit(lambda: seen.append(1))
        with contextlib.suppress(AssertionError):
            wait_until(lambda: seen)
        os._exit(0 if seen else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
