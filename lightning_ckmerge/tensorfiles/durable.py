"""Files that survive a crash, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_ckmerge.errors import ArtifactError

CHUNK_BYTES = 1 << 18

FileRecord = dict[str, Any]


def file_record(path: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> FileRecord:
    """Return a file's ``bytes`` and ``sha256``, as the manifest lists them.

    Args:
        path: The file.
        on_bytes: Called with the bytes of each piece that was read; its exception ends the reading.
    """
    sha256 = hashlib.sha256()
    total = 0
    # One piece of memory for all: fresh memory costs as much as the hashing.
    chunk = memoryview(bytearray(CHUNK_BYTES))
    if not path.is_file():
        # Reading a pipe may never end.
        raise OSError(errno.EINVAL if path.exists() else errno.ENOENT, "no regular file", str(path))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(chunk):
            sha256.update(chunk[:num_bytes])
            total += num_bytes
            on_bytes(num_bytes)
    return {"bytes": total, "sha256": sha256.hexdigest()}


def records(directory: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return bytes and SHA-256 of all files in ``directory``; ``known`` ones are not read again."""
    return {name: known.get(name) or file_record(directory / name) for name in list_files(directory)}


def list_files(directory: Path) -> list[str]:
    """Return the names of all files below ``directory``, sorted, relative to it, with forward slashes.

    Raises:
        ArtifactError: One of them is a link.
    """
    names = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(
                f"an artifact must hold its files itself, got the link {path.name}. Replace it by a copy."
            )
        if not path.is_dir():
            names.append(path.relative_to(directory).as_posix())
    return names


def temporary(directory: Path, name: str) -> Path:
    """Return a fresh path for the file or directory that will be called ``name``."""
    return directory / f".tmp-{name}-{uuid.uuid4().hex[:8]}"


def replace_json(path: Path, value: object) -> None:
    """Write a small JSON file in one rename."""
    replace_text(path, json.dumps(value) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one rename."""
    with replacing(path, temporary(path.parent, path.name)) as staged:
        staged.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path, staged: Path) -> Iterator[Path]:
    """Yield ``staged``, whose file becomes ``path`` by one rename; whatever goes wrong, it is removed instead."""
    try:
        yield staged
        fsync(staged)
        os.replace(staged, path)
    finally:
        if staged.is_file():
            staged.unlink()


def require_absent(out: Path, name: str = "the output") -> None:
    """Raise ``ArtifactError`` if there is something at ``out``: before hours of work, not after them."""
    if os.path.lexists(out):
        raise ArtifactError(f"{name} must not exist yet, got {out}. Name another directory, or remove this one.")


@contextlib.contextmanager
def new_directory(out: Path, *, only: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``out`` by one rename; whatever goes wrong, it is removed instead.

    Args:
        out: The final path.
        only: Name of a file in the directory that becomes ``out`` alone, in the directory's place.

    Raises:
        ArtifactError: ``out`` exists.
    """
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = temporary(out.parent, out.name)
    staging.mkdir()
    try:
        yield staging
        fsync_tree(staging)
        os.rename(staging / only if only else staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if only:
        staging.rmdir()
    fsync(out.parent)


def fsync_tree(directory: Path) -> None:
    """Bring every file and directory below ``directory``, and itself, to the disk."""
    for path in directory.rglob("*"):
        fsync(path)
    fsync(directory)


def fsync(path: Path) -> None:
    """Bring one file, or the names in one directory, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
