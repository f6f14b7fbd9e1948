"""Run ``ckmerge`` in this process, or as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from lightning_ckmerge.cli.main import app


def ckmerge(*args: object, code: int = 0) -> Result:
    """Run a command in this process; its exit code must be ``code``."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}{result.exception!r}"
    if code == 2:
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1 or "Usage" in result.stderr
    return result


def ckmerge_json(*args: object, code: int = 0) -> Any:
    """Run a command with ``--json``, and return what it prints."""
    return json.loads(ckmerge(*args, "--json", code=code).stdout)


def ckmerge_process(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    program = "from lightning_ckmerge.cli.main import app; app()"
    path = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {program}", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
    )
