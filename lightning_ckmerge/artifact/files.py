"""Files that survive a crash, and names that stay inside their directory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

from lightning_ckmerge.errors import ArtifactError

CHUNK_BYTES = 1 << 18
MANIFEST_NAME = "manifest.json"
BEST_NAME = "best"
POINTER_NAME = "best.json"  # stands for it where links are refused
METADATA_NAME = ".metadata"  # of a distributed checkpoint
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
TEMPORARY_NAME = re.compile(r"\.tmp-(step=\d{9,}(-v\d+)?|best|(best|run|standing)\.json|report\.(html|md))-[0-9a-f]{8}")

FileRecord = dict[str, Any]


def file_record(path: Path, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> FileRecord:
    """Return a file's ``bytes`` and ``sha256``, as the manifest lists them.

    Args:
        path: The file.
        on_bytes: Told of the bytes of each piece that was read; what it raises ends the reading.
    """
    sha256 = hashlib.sha256()
    total = 0
    # One piece of memory for all: fresh memory costs as much as the hashing.
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(chunk):
            sha256.update(chunk[:num_bytes])
            total += num_bytes
            on_bytes(num_bytes)
    return {"bytes": total, "sha256": sha256.hexdigest()}


def list_files(directory: Path) -> list[str]:
    """Return the names of all files below ``directory``, sorted, relative to it, with forward slashes.

    Raises:
        ArtifactError: One of them is a link.
    """
    names = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(
                f"an artifact must hold its files itself, got the link {path.name}. Copy what it names."
            )
        if not path.is_dir():
            names.append(path.relative_to(directory).as_posix())
    return names


def inside(directory: Path, name: str) -> Path:
    """Return the path of the file ``name`` in ``directory``.

    Raises:
        ArtifactError: The name, or a link on its way, leaves the directory.
    """
    parts = name.split("/")
    path = directory / name
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in name
        or PureWindowsPath(name).drive
        or not path.resolve().is_relative_to(directory.resolve())
    ):
        raise ArtifactError(
            f"the files of an artifact must lie inside it, got {name!r} in {directory}. Do not use this artifact: it "
            "was tampered with."
        )
    return path


def temporary(directory: Path, name: str) -> Path:
    """Return a fresh path for what will be called ``name``; ``TEMPORARY_NAME`` recognises it after a crash."""
    return directory / f".tmp-{name}-{uuid.uuid4().hex[:8]}"


def replace_json(path: Path, value: object) -> None:
    """Write a small JSON file in one rename."""
    replace_text(path, json.dumps(value) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one rename."""
    staged = temporary(path.parent, path.name)
    try:
        staged.write_text(text, encoding="utf-8")
        fsync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


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
