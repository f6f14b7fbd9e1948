"""Where a run's artifacts go, whether they can, and where they are for a process that only launched the run."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_ckmerge.artifact.runs import Claim, Place, likely
from lightning_ckmerge.errors import ConfigError, explain

# `Path` makes `s3:/` of `s3://`. One letter before the colon is a drive.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:[:/]")
# About as long as a rank's file names below it, so that a path that barely fits is found out now.
PROBE_NAME = f".ckmerge-probe-{'0' * 64}"


def resolve_dirpath(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Return where the artifacts of a run go, if the directory is its own.

    Raises:
        ConfigError: It is a URL.
    """
    root = root_of(trainer, dirpath)
    if dirpath is not None:
        return root
    if not trainer.loggers:
        return root / "merges"
    # As ModelCheckpoint does: beside its `checkpoints`.
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return root / str(logger.name) / version / "merges"


def root_of(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Return ``dirpath``, or the parent of the default one; no logger is asked to start its run.

    Raises:
        ConfigError: It is a URL.
    """
    if dirpath is not None:
        return _local("dirpath", dirpath)
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is not None and logger.save_dir is not None:
        return _local(f"{type(logger).__name__}.save_dir", logger.save_dir)
    return _local("default_root_dir", trainer.default_root_dir)


def find_fault(dirpath: Path) -> str | None:
    """Say why nothing can be written into ``dirpath``, by trying; nothing is left behind."""
    made: list[Path] = []
    try:
        for path in reversed([p for p in (dirpath, *dirpath.parents) if not os.path.lexists(p)]):
            path.mkdir()
            made.append(path)
        probe = dirpath / PROBE_NAME
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
        reason = getattr(error, "strerror", None) or error
        return (
            f"`dirpath` must be a directory that can be written to, got {dirpath}: {reason}. Name another one, or fix "
            "its permissions."
        )
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has begun to use it
                path.rmdir()
    return None


def _claim(trainer: Trainer, base: Path, state: dict[str, Any] | None, *, moves: bool) -> Claim:
    if state is None:
        return Claim(base)
    checkpoint = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
    roots = itertools.chain(checkpoint.parents if checkpoint else (), [Path(trainer.default_root_dir), Path.cwd()])
    return Claim(base, state["run_id"], likely(Path(state["dirpath"]), roots), moves=moves)


def _local(name: str, path: str | os.PathLike[str]) -> Path:
    if URL.match(os.fspath(path)):
        raise ConfigError(
            f"`{name}` must be a local path, got the URL {os.fspath(path)!r}. Set `dirpath` to a local or mounted "
            "path, and copy the artifacts from there."
        )
    return Path(os.path.abspath(Path(path).expanduser()))


class ClaimedDirpath:
    """A run's directory, the same on all ranks, and the run's own until ``end``.

    Args:
        trainer: The Trainer, before its first step.
        base: As returned by ``resolve_dirpath``, on all ranks.
        state: The run's state in a checkpoint; ``None``: a new one.
        moves: Whether ``base`` was asked for, so that a run that has been elsewhere continues there.

    Raises:
        ConfigError: Nothing can be written there.

    Attributes:
        place: The directory, and where the run has been.
    """

    def __init__(self, trainer: Trainer, base: Path, state: dict[str, Any] | None, *, moves: bool) -> None:
        self._claim: Claim | None = None
        fault = None
        if trainer.is_global_zero:
            try:
                self._claim = _claim(trainer, base, state, moves=moves)
            except Exception as error:
                fault = f"`dirpath` must be a directory that can be written to, got {base}: {explain(error)}."
        found = None if self._claim is None else self._claim.place
        place, fault = trainer.strategy.broadcast((found, fault))
        if place is None:
            raise ConfigError(fault)
        self.place: Place = place

    def end(self) -> None:
        """Let others have the directory."""
        if self._claim is not None:
            self._claim.release()


class SpawnedDirpath:
    """A path that a launched process leaves for the launching one, in a file whose name both know."""

    def __init__(self) -> None:
        self._launcher = os.getpid()
        self._note = Path(tempfile.gettempdir()) / f"ckmerge-{uuid.uuid4().hex}"
        weakref.finalize(self, _remove, self._note, self._launcher)

    def leave(self, path: Path) -> None:
        """Write the path down, unless this process is the one that would read it."""
        if os.getpid() == self._launcher:
            self._note.unlink(missing_ok=True)
        else:
            self._note.write_text(str(path), encoding="utf-8")

    def find(self) -> Path | None:
        """Return the path that was left; ``None`` if none was."""
        return Path(self._note.read_text(encoding="utf-8")) if self._note.is_file() else None


def _remove(note: Path, launcher: int) -> None:
    if os.getpid() == launcher:  # a forked process has a copy of this object
        note.unlink(missing_ok=True)
