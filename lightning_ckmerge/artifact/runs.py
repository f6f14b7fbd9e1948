"""Whose directory it is: one run's, as its ``run.json`` says, and held by a lock while that run is alive.

The first run in a ``dirpath`` has the directory itself, and a later one a directory below it: ``run=2``, ``run=3``. The
path of the first is ``run=1`` to tools, as though it lay below the directory, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from lightning_ckmerge.artifact.timeline import TIMELINE_NAME
from lightning_ckmerge.checks import TORCH_SUFFIXES
from lightning_ckmerge.core.wording import and_more
from lightning_ckmerge.tensorfiles.durable import replace_json
from lightning_ckmerge.tensorfiles.untrusted import read_json

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

RUN_NAME = "run.json"
BEST_NAME = "best"
POINTER_NAME = "best.json"  # stands for it where links are refused
LOCK_NAME = "run.lock"
FIRST_RUN = "run=1"
LATER_RUN = re.compile(r"run=([2-9]|[1-9]\d+)")
PUBLISHED = (TIMELINE_NAME, BEST_NAME, POINTER_NAME)
# Runs that are listed where none was named.
NUM_HELPED = 5
SMALL_BYTES = 1 << 16
HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of ``run.json``.

    Args:
        run_id: Eight hexadecimal digits.
        started: When the run began, or was resumed last, in seconds since the epoch.
        resumable: Whether a checkpoint may name its snapshots.
    """

    run_id: str
    started: float
    resumable: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place where a run continues.

    Args:
        dirpath: Its directory.
        run_id: Its own, which a run that branches off a living one does not share.
        source: Directory of the snapshots that its checkpoint names; ``None``: there are none to be found.
        file_id: Starts the names of its snapshots, those of its checkpoint included; ``None``: these keep their names.
            Only where the lock is sure does no other process write under them.
        notes: Messages for people.
        url: Where its artifacts are uploaded to; ``None``: nowhere.
    """

    dirpath: Path
    run_id: str
    source: Path | None
    file_id: str | None = None
    notes: tuple[str, ...] = ()
    url: str | None = None


class Claim:
    """A run's directory, held until ``release``. Made by one rank for all.

    Args:
        base: Where the run's artifacts go, if no other run's are there.
        run_id: Of the run that continues; ``None``: a new one.
        earlier: Where it may have been, likeliest first.
        moves: Whether it continues below ``base`` wherever it has been.

    Raises:
        OSError: No directory can be written.
    """

    def __init__(
        self, base: Path, run_id: str | None = None, earlier: Iterable[Path] = (), *, moves: bool = True
    ) -> None:
        home = _find_home(base, run_id, earlier) if run_id is not None else None
        self._lock: DirectoryLock | None = None
        if home is not None and not (moves and base not in (home, home.parent)) and self._take_home(home):
            assert run_id is not None
            shared = home.parent if LATER_RUN.fullmatch(home.name) else home
            notes = [] if base == shared else [f"This run continues in {home}."]
            notes += _others(shared, home)
            file_id = None if self._lock is not None and self._lock.is_sure else _new_id()
            self.place = Place(dirpath=home, run_id=run_id, source=home, file_id=file_id, notes=tuple(notes))
            return
        alive = home is not None and is_alive(home)
        own_id = _new_id() if run_id is None or alive else run_id
        dirpath = self._take_free(base, own_id)
        notes = [*_reasons(base, dirpath, home, run_id, alive=alive), *_others(base, dirpath)]
        self.place = Place(dirpath=dirpath, run_id=own_id, source=home, file_id=own_id, notes=tuple(notes))

    def release(self) -> None:
        """Let others have the directory."""
        if self._lock is not None:
            self._lock.release()

    def _take_home(self, home: Path) -> bool:
        """Continue where the run was, unless it is alive there or nothing can be written."""
        self._lock = DirectoryLock.acquire(home)
        record = read_run(home)
        if self._lock is None or record is None:
            return False
        try:
            _write(home, replace(record, started=time.time()))
        except OSError:
            self.release()
            return False
        return True

    def _take_free(self, base: Path, run_id: str) -> Path:
        for dirpath in _places(base):
            dirpath.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock.acquire(dirpath)
            if self._lock is None:
                continue
            record = read_run(dirpath)
            if _is_published(dirpath) or (record is not None and (record.resumable or not self._lock.is_sure)):
                self._lock.release()
                continue
            if record is not None:  # it left nothing but snapshots that no checkpoint names
                for path in _snapshots(dirpath, record.run_id):
                    path.unlink(missing_ok=True)
            _write(dirpath, RunRecord(run_id=run_id, started=time.time(), resumable=False))
            return dirpath
        raise AssertionError("there is always another number")


class DirectoryLock:
    """A lock that the system takes back when the process ends, however it does. Made by ``acquire``."""

    # The system does not hold a process's own locks against it.
    _held: ClassVar[set[Path]] = set()

    def __init__(self, dirpath: Path, descriptor: int | None, *, is_sure: bool) -> None:
        self.is_sure = is_sure
        self._dirpath = dirpath
        self._descriptor = descriptor
        self._held.add(dirpath)

    @classmethod
    def acquire(cls, dirpath: Path) -> DirectoryLock | None:
        """Return the lock of a directory; ``None`` if a living run has it.

        Where the file system knows no locks, or the directory cannot be written, it is not sure that no run is alive.
        """
        dirpath = dirpath.resolve()
        if dirpath in cls._held:
            return None
        try:
            descriptor = os.open(dirpath / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return cls(dirpath, None, is_sure=False)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                os.close(descriptor)
                return None
            return cls(dirpath, descriptor, is_sure=False)
        return cls(dirpath, descriptor, is_sure=True)

    def release(self) -> None:
        """Give it back."""
        self._held.discard(self._dirpath)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def home_of(base: Path, run_id: str) -> Path | None:
    """Return the directory of a run at or below ``base``; ``None`` if it has been nowhere there."""
    return _find_home(base, run_id, ())


def is_alive(dirpath: Path) -> bool:
    """Whether a living run has the directory."""
    lock = DirectoryLock.acquire(dirpath)
    if lock is None:
        return True
    lock.release()
    return False


def read_run(dirpath: Path) -> RunRecord | None:
    """Return the record of a directory's run; ``None`` without one. A damaged record is an unknown run's."""
    try:
        record = read_json(dirpath / RUN_NAME, max_bytes=SMALL_BYTES)
        return RunRecord(
            run_id=str(record["run_id"]), started=float(record["started"]), resumable=bool(record["resumable"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return RunRecord(run_id="", started=0.0, resumable=True)


def keep_snapshots(dirpath: Path, run_id: str | None = None) -> None:
    """Note that a checkpoint names the run's snapshots from now on.

    Args:
        dirpath: The run's directory.
        run_id: Of the run that writes there, which makes up for a record that has vanished; ``None``: leave it at that.
    """
    record = read_run(dirpath)
    if record is None and run_id is not None:
        record = RunRecord(run_id=run_id, started=time.time(), resumable=False)
    if record is not None and not record.resumable:
        with contextlib.suppress(OSError):  # a full disk has lost the snapshots too
            dirpath.mkdir(parents=True, exist_ok=True)
            _write(dirpath, replace(record, resumable=True))


def find_run(dirpath: Path) -> Path:
    """Return the directory of a run: of several in a ``dirpath``, of the one that began, or was resumed, last."""
    if is_first(dirpath):
        return dirpath.parent
    records = [(record.started, path) for path in _runs(dirpath) if (record := read_run(path)) is not None]
    return max(records)[1] if records else dirpath


def list_runs(dirpath: Path) -> dict[Path, Path]:
    """Return the runs of a ``dirpath``, in the order of their numbers: each one's name, a path, and its directory."""
    if is_first(dirpath):
        return {dirpath: dirpath.parent}
    found = [p for p in _runs(dirpath) if (p / RUN_NAME).exists() or (p / TIMELINE_NAME).exists()]
    return {(dirpath / FIRST_RUN if p == dirpath and len(found) > 1 else p): p for p in found}


def tell_choice(path: Path) -> str | None:
    """Return which of several runs a path stands for, and how to name another; ``None`` where it names one."""
    dirpath = run_of(path)
    runs = {run: name for name, run in list_runs(dirpath).items()}
    if len(runs) < 2:
        return None
    newest = find_run(dirpath)
    other = next(name for run, name in reversed(runs.items()) if run != newest)
    # The link is an earlier run's until the newest has an accepted merge.
    linked = path.resolve().parent if dirpath != path and path.is_dir() else newest.resolve()
    if linked == newest.resolve():
        return (
            f"Using {runs[newest].name}, the newest of {len(runs)} runs in {dirpath}. For another, pass its path, such "
            f"as {other}."
        )
    taken = next((name.name for run, name in runs.items() if run.resolve() == linked), "an earlier run")
    return f"{path} belongs to {taken}: the newest run, {runs[newest].name}, has no accepted merge yet."


def run_of(path: Path) -> Path:
    """Return the directory whose ``best`` a path names, else the path itself."""
    return path.parent if path.name in (BEST_NAME, POINTER_NAME) else path


def is_first(path: Path) -> bool:
    """Whether a path names the first run of the directory that it seems to lie in."""
    return path.name == FIRST_RUN and not path.exists()


def likely(old: Path, roots: Iterable[Path]) -> Iterator[Path]:
    """Yield where a directory may be now that a parent has been moved or copied; its old place comes last."""
    for root in roots:
        for num_parts in range(1, len(old.parts)):
            yield root.joinpath(*old.parts[-num_parts:])
    yield old


def _runs(dirpath: Path) -> list[Path]:
    """Return the directories of all runs below a ``dirpath``, in the order of their numbers."""
    try:
        later = [p for p in dirpath.iterdir() if LATER_RUN.fullmatch(p.name) and p.is_dir()]
    except OSError:
        later = []
    return [dirpath, *sorted(later, key=lambda p: int(p.name.partition("=")[2]))]


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _places(base: Path) -> Iterator[Path]:
    yield base
    number = 2
    while True:
        yield base / f"run={number}"
        number += 1


def _find_home(base: Path, run_id: str, earlier: Iterable[Path]) -> Path | None:
    own = (path for path in (*_runs(base), *earlier) if (record := read_run(path)) and record.run_id == run_id)
    return next(own, None)


def _is_published(dirpath: Path) -> bool:
    return any(os.path.lexists(dirpath / name) for name in PUBLISHED) or any(dirpath.glob("step=*"))


def _snapshots(dirpath: Path, run_id: str = "*") -> list[Path]:
    buffer = dirpath / "buffer"
    name = f"{run_id}-*.safetensors*"
    return [*buffer.glob(name), *buffer.glob(f"rank=*/{name}")]


def _reasons(base: Path, dirpath: Path, home: Path | None, run_id: str | None, *, alive: bool) -> Iterator[str]:
    if alive:
        yield (
            f"Run {run_id} is still running in {home}, so this one continues from its checkpoint as a new run in "
            f"{dirpath}."
        )
    elif home is not None:
        yield f"This run continues in {dirpath}; its earlier artifacts and snapshots stay in {home}."
    elif dirpath != base:
        yield (
            f"{base} already holds a run, so this one writes to {dirpath}; commands given {base} use this one. The "
            f"first run is named {base / FIRST_RUN}; the first accepted merge of this one moves {base / BEST_NAME}."
        )


def _others(base: Path, own: Path) -> Iterator[str]:
    """Name the snapshots of other runs, which their checkpoints may need."""
    paths = [p for run in _runs(base) if run != own for p in _snapshots(run)]
    if paths:
        with contextlib.suppress(OSError):  # a living run deletes some
            num_bytes = sum(p.stat().st_size for p in paths)
            yield (
                f"{base} holds {len(paths)} snapshots of other runs, {num_bytes / 1e6:.3g} MB, which their checkpoints "
                "may need. Remove their `buffer/` once they are not to be resumed."
            )


def _write(dirpath: Path, record: RunRecord) -> None:
    replace_json(dirpath / RUN_NAME, asdict(record))


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        # Not `flock`, which a dead run's loader workers would go on holding.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def help_on(path: Path) -> str | None:
    """Return a better path than one that is no run and no artifact, in a sentence; ``None`` if none is known."""
    if path.is_file() and path.suffix in (*TORCH_SUFFIXES, ".safetensors"):
        return (
            f"This is a checkpoint: `ckmerge merge {path} ...` merges it with others, and `ckmerge export` writes it "
            "for Hugging Face."
        )
    if not path.is_dir() or (path / TIMELINE_NAME).exists():
        return None
    # A run's own directory, or its logger's, lies a few levels below where people look.
    found = sorted({p.parent for depth in range(1, 5) for p in path.glob("/".join(["*"] * depth + [TIMELINE_NAME]))})
    if not found:
        return None
    if len(found) == 1:
        return f"It contains the run {found[0]}: pass that."
    named = and_more([str(run) for run in found[-NUM_HELPED:]], len(found))
    return f"It contains the runs {named}: pass one of them."
