"""The short form of ``make crash``: a process is killed at some points, and one of two ranks at a few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def crash(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the driver in a process of its own, which may fork as this one has threads; return its round's figures."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash", *arguments, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["rounds"]
    return dict(found)


@pytest.mark.timeout(1000)
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """Goes red, a few runs in a hundred, if anything is written in another order; ``make crash`` makes sure."""
    figures = crash(tmp_path, "--points", "8", "--again", "0.8", "--rank-points", "0", "--stops", "0")
    assert figures["points"] >= 8
    assert figures["failures"] == []


@pytest.mark.timeout(1000)
def test_a_killed_rank_ends_the_other_and_both_go_on(tmp_path: Path) -> None:
    figures = crash(tmp_path, "--points", "0", "--rank-points", "2", "--stops", "0")
    assert figures["points"] == 2
    assert figures["failures"] == []
