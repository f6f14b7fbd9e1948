"""Where a run's artifacts go, whether they can, and where they are for a process that only launched the run.

What is to go to a URL is written to a local directory first, which is the run's own as any other is.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
import uuid
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_ckmerge.artifact.remote import as_url, is_url
from lightning_ckmerge.artifact.runs import Claim, Place, likely
from lightning_ckmerge.artifact.upload import bring_back, claim_url, find_remote_fault
from lightning_ckmerge.errors import ConfigError, explain

# About as long as a rank's file names below it, so that a path that barely fits is found out now.
PROBE_NAME = f".ckmerge-probe-{'0' * 64}"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where the artifacts of a run go.

    Args:
        dirpath: The local directory.
        url: Where they are uploaded to from there; ``None``: nowhere.
    """

    dirpath: Path
    url: str | None = None


def resolve_dirpath(trainer: Trainer, dirpath: str | Path | None, staging: str | Path | None = None) -> Destination:
    """Return where the artifacts of a run go, if the directory is its own.

    Args:
        trainer: The Trainer.
        dirpath: As the callback's: a path or a URL, or ``None``.
        staging: As ``buffer.dirpath``.

    Raises:
        ConfigError: ``staging`` is a URL, or there is none to go to from there.
    """
    root = root_of(trainer, dirpath)
    if dirpath is None:
        parts = ["merges"]
        if trainer.loggers:  # as ModelCheckpoint does: beside its `checkpoints`
            logger = trainer.loggers[0]
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            parts = [str(logger.name), version, "merges"]
        root = f"{root}/{'/'.join(parts)}" if isinstance(root, str) else root.joinpath(*parts)
    return _destination(trainer, root, staging)


def root_destination(trainer: Trainer, dirpath: str | Path | None, staging: str | Path | None) -> Destination:
    """Return what ``resolve_dirpath`` does, or the parent of a default one; no logger is asked to start its run."""
    return _destination(trainer, root_of(trainer, dirpath), staging)


def root_of(trainer: Trainer, dirpath: str | Path | None) -> Path | str:
    """Return ``dirpath``, or the parent of the default one; no logger is asked to start its run. A URL is a string."""
    if dirpath is None:
        logger = trainer.loggers[0] if trainer.loggers else None
        saves = logger is not None and logger.save_dir is not None
        dirpath = logger.save_dir if logger is not None and saves else trainer.default_root_dir
    assert dirpath is not None
    return as_url(dirpath) if is_url(dirpath) else Path(os.path.abspath(Path(dirpath).expanduser()))


def local_root_of(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Return what ``root_of`` does.

    Raises:
        ConfigError: It is a URL.
    """
    root = root_of(trainer, dirpath)
    if isinstance(root, str):
        raise ConfigError(
            f"`dirpath` must be a local path here, got the URL {root!r}. Set it to a local or mounted path, and copy "
            "the artifacts from there."
        )
    return root


def find_destination_fault(destination: Destination) -> str | None:
    """Say why nothing can be written to a destination, by trying; nothing is left behind."""
    fault = find_fault(destination.dirpath)
    return fault if fault is not None or destination.url is None else find_remote_fault(destination.url)


def find_fault(dirpath: Path) -> str | None:
    """Say why nothing can be written into ``dirpath``, by trying; nothing is left behind."""
    try:
        there = next(p for p in (dirpath, *dirpath.parents) if os.path.lexists(p))
        # Not the directories themselves: runs that begin at once would meet in them.
        with tempfile.TemporaryDirectory(prefix=".ckmerge-", dir=there) as scratch:
            path = scratch / dirpath.relative_to(there)
            path.mkdir(parents=True, exist_ok=True)
            (path / PROBE_NAME).touch()
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
        reason = getattr(error, "strerror", None) or error
        return (
            f"`dirpath` must be a directory that can be written to, got {dirpath}: {reason}. Name another one, or fix "
            "its permissions."
        )
    return None


def _claim(trainer: Trainer, base: Path, state: dict[str, Any] | None, *, moves: bool) -> Claim:
    if state is None:
        return Claim(base)
    checkpoint = Path(trainer.ckpt_path).absolute() if trainer.ckpt_path else None
    roots = itertools.chain(checkpoint.parents if checkpoint else (), [Path(trainer.default_root_dir), Path.cwd()])
    return Claim(base, state["run_id"], likely(Path(state["dirpath"]), roots), moves=moves)


def _destination(trainer: Trainer, root: Path | str, staging: str | Path | None) -> Destination:
    if isinstance(root, str):
        return Destination(dirpath=_staged(trainer, root, staging), url=root)
    if staging is not None:
        raise ConfigError(
            f"`buffer.dirpath` is for artifacts that go to a URL, got {os.fspath(staging)!r} and the local directory "
            f"{root}. Leave it out, or let `dirpath` be a URL."
        )
    return Destination(dirpath=root)


def _staged(trainer: Trainer, url: str, staging: str | Path | None) -> Path:
    """Return the local directory of what goes to a URL, the same for each ``fit``."""
    if staging is not None and is_url(staging):
        raise ConfigError(
            f"`buffer.dirpath` must be a local path, got the URL {os.fspath(staging)!r}. Name a local disk."
        )
    root = trainer.default_root_dir
    parent = Path(staging) if staging is not None else Path("." if is_url(root) else root) / "ckmerge"
    name = re.sub(r"\W+", "-", url)[-60:].strip("-")
    return Path(os.path.abspath(parent.expanduser() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"))


class ClaimedDirpath:
    """A run's directory, the same on all ranks, and the run's own until ``end``.

    Args:
        trainer: The Trainer, before its first step.
        destination: As returned by ``resolve_dirpath``, on all ranks.
        state: The run's state in a checkpoint; ``None``: a new one.
        moves: Whether ``base`` was asked for, so that a run that has been elsewhere continues there.

    Raises:
        ConfigError: Nothing can be written there.

    Attributes:
        place: The directory, and where the run has been.
    """

    def __init__(
        self, trainer: Trainer, destination: Destination, state: dict[str, Any] | None, *, moves: bool
    ) -> None:
        self._claim: Claim | None = None
        found, fault = None, None
        if trainer.is_global_zero:
            try:
                self._claim = _claim(trainer, destination.dirpath, state, moves=moves)
                found = _with_url(self._claim.place, destination.url)
            except Exception as error:
                self.end()
                wanted = destination.url or destination.dirpath
                fault = f"`dirpath` must be a directory that can be written to, got {wanted}: {explain(error)}."
        place, fault = trainer.strategy.broadcast((found, fault))
        if place is None:
            raise ConfigError(fault)
        self.place: Place = place

    def end(self) -> None:
        """Let others have the directory."""
        if self._claim is not None:
            self._claim.release()


def _with_url(place: Place, url: str | None) -> Place:
    """Let a run have a directory of its own at the URL, too; what is there and has been lost here comes back."""
    if url is None:
        return place
    own = claim_url(url, place.run_id)
    came_back = bring_back(own, place.dirpath)
    note = f"The artifacts of this run have been copied back from {own} to {place.dirpath}."
    return replace(place, url=own, notes=(*place.notes, note) if came_back else place.notes)


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
