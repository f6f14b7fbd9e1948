"""A pytest plugin: appends each test's outcome to the file that ``CKMERGE_SUITE_OUTCOMES`` names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "CKMERGE_SUITE_OUTCOMES"
# From worst to best; a test has several phases.
WORST_FIRST = ("failed", "skipped", "passed")


def pytest_configure(config: Any) -> None:
    # Of a plugin that retries a few tests; here they have one try.
    config.addinivalue_line("markers", "flaky(reruns, reruns_delay): ignored")


def pytest_runtest_logreport(report: Any) -> None:
    text = str(report.longrepr).strip() if report.failed else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "why": text[-3000:]}
    with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """Return the worst outcome of each test, and its traceback."""
    found: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        now = (record["outcome"], record["why"])
        found[record["test"]] = min(found.get(record["test"], now), now, key=lambda o: WORST_FIRST.index(o[0]))
    return found
