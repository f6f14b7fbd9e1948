"""Waiting for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMEOUT_S = 600


def wait_until(condition: Callable[[], object], *, timeout_s: float = TIMEOUT_S, every_s: float = 0.001) -> None:
    """Return once ``condition()`` holds.

    Raises:
        AssertionError: It has not held for ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{condition} has not come true in {timeout_s} s"
        time.sleep(every_s)
