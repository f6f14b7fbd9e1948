"""A PostgreSQL server for a test, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Debian keeps them off the path.
PROGRAMS = [shutil.which("pg_ctl"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")))]
PG_CTL = next(filter(None, PROGRAMS), None)


@contextmanager
def postgres() -> Iterator[str]:
    """Start a server on a socket of its own, without a port, and yield the URL of its empty database."""
    assert PG_CTL is not None
    owner: dict[str, Any] = {}
    # In no directory of pytest's: a socket's path must be short, and the server refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="ckmerge-") as root:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(root, nobody.pw_uid, nobody.pw_gid)

        def control(*arguments: str) -> None:
            command = [PG_CTL, "-D", f"{root}/data", "-s", *arguments]
            subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=True, timeout=120, **owner)

        control("init", "-o", "-U ckmerge -A trust --no-sync")
        control("start", "-w", "-l", f"{root}/log", "-o", f"-k {root} -h '' -F")
        try:
            yield f"postgresql+psycopg://ckmerge@/postgres?host={root}"
        finally:
            control("stop", "-w", "-m", "immediate")
