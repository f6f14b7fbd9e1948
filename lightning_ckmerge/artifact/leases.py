"""Leases on due searches: one follower works on each, and the run keeps what it reads.

A lease is a file that its follower renews while it lives. Of several the one of the highest number counts, and a number
can be taken once only, so that two followers that find a dead one's lease cannot both take its place.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from lightning_ckmerge.search.study import is_process_alive
from lightning_ckmerge.tensorfiles.durable import replace_json
from lightning_ckmerge.tensorfiles.untrusted import read_json

# Clocks of machines may differ by a part of it.
LEASE_S = 300.0
LEASE_NAME = re.compile(r"lease-(\d{3,})\.json")


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """The contents of a lease.

    Args:
        owner: Unique for each follower.
        host: Its machine.
        pid: Its process there.
        shares: Whether other followers may help.
        expires: Seconds since the epoch.
    """

    owner: str
    host: str
    pid: int
    shares: bool
    expires: float

    @property
    def is_live(self) -> bool:
        """Whether it counts: neither has it run out, nor is its process known to be dead."""
        if self.expires <= time.time():
            return False
        return self.host != socket.gethostname() or is_process_alive(self.pid)


def find_lease(due: Path) -> LeaseRecord | None:
    """Return the live lease on a due search; ``None`` if there is none."""
    newest = _newest(due)
    if newest is None:
        return None
    path = due / f"lease-{newest:03d}.json"
    try:
        record = LeaseRecord(**read_json(path))
    except (ValueError, TypeError):
        # Being written; where its follower has died over that, it counts as long as any.
        record = LeaseRecord(owner="", host="", pid=0, shares=False, expires=_age_limit(path))
    except OSError:
        return None
    return record if record.is_live else None


class Lease:
    """A follower's lease on a due search, renewed until ``release``. Made by ``acquire``.

    Attributes:
        was_lost: Whether it was found to be lost when it was to be renewed.
    """

    def __init__(self, path: Path, owner: str, *, shares: bool, duration_s: float) -> None:
        self._path = path
        self._owner = owner
        self._shares = shares
        self._duration_s = duration_s
        self.was_lost = False
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="ckmerge-lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, due: Path, *, shares: bool, duration_s: float = LEASE_S) -> Lease | None:
        """Return the lease on a due search; ``None`` if another follower has it, or the search is gone.

        Args:
            due: Directory of the due search.
            shares: Whether other followers may help.
            duration_s: For how long it counts after its follower's last sign of life.
        """
        newest = _newest(due)
        if find_lease(due) is not None:
            return None
        path = due / f"lease-{0 if newest is None else newest + 1:03d}.json"
        owner = uuid.uuid4().hex
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:  # another follower was faster, or the run has taken the search away
            return None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(_record(owner, shares=shares, duration_s=duration_s))))
            file.flush()
            os.fsync(file.fileno())
        return cls(path, owner, shares=shares, duration_s=duration_s)

    def is_lost(self) -> bool:
        """Whether it counts no more: its follower was away for too long, and another has taken its place."""
        found = find_lease(self._path.parent)
        return found is None or found.owner != self._owner

    def release(self) -> None:
        """Give it back."""
        if not self._is_released.is_set():
            self._is_released.set()
            self._thread.join()
            self._write(0.0)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._is_released.wait(self._duration_s / 4):
            if self.is_lost():
                self.was_lost = True
                return
            self._write(self._duration_s)

    def _write(self, duration_s: float) -> None:
        try:
            if self._path.exists():
                replace_json(self._path, asdict(_record(self._owner, shares=self._shares, duration_s=duration_s)))
        except OSError:  # with the search, or for the moment
            return


def _record(owner: str, *, shares: bool, duration_s: float) -> LeaseRecord:
    expires = time.time() + duration_s if duration_s else 0.0
    return LeaseRecord(owner=owner, host=socket.gethostname(), pid=os.getpid(), shares=shares, expires=expires)


def _newest(due: Path) -> int | None:
    try:
        numbers = [int(match[1]) for path in due.iterdir() if (match := LEASE_NAME.fullmatch(path.name))]
    except OSError:
        return None
    return max(numbers, default=None)


def _age_limit(path: Path) -> float:
    try:
        return path.stat().st_mtime + LEASE_S
    except OSError:
        return 0.0
