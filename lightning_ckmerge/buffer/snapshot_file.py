"""A snapshot as one safetensors file, whose data region is the snapshot's flat memory.

Written as a stream and read as a memory map, so neither needs memory of the model's size.

Source:
    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data without gaps).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ckmerge.core.layout import DTYPE_NAMES, Flats, TensorLayout
from lightning_ckmerge.errors import SnapshotError

# A multiple of every itemsize, and a cache line: mapped tensors are aligned as allocated ones are.
ALIGNMENT = 64
CHUNK_BYTES = 1 << 20


def write_file(path: Path, layout: TensorLayout, blocks: Iterable[Tensor]) -> tuple[int, str]:
    """Write a snapshot to a temporary name beside ``path``, flush it to the disk, and rename it: all or nothing.

    Args:
        path: Its final name; an older file of that name is replaced.
        layout: What the snapshot holds.
        blocks: The snapshot's flat memory in order, in one-dimensional pieces of the stored dtypes, on any device.

    Returns:
        Size in bytes, and SHA-256 in hexadecimal.

    Raises:
        OSError: The file system refuses; nothing is left behind.
    """
    temporary = temporary_path(path)
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            pieces: Iterable[bytes | memoryview] = chain([header_bytes(layout)], map(raw_bytes, blocks))
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            num_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise
    return num_bytes, digest.hexdigest()


def map_file(path: Path, layout: TensorLayout) -> Flats:
    """Return the file's data region as flat tensors. Nothing is read yet; writes to them go nowhere."""
    if not layout.num_bytes:
        return layout.allocate()
    data = torch.from_numpy(
        np.memmap(path, np.uint8, mode="c", offset=len(header_bytes(layout)), shape=layout.num_bytes)
    )
    flats, start = {}, 0
    for dtype, numel in layout.sizes.items():
        stop = start + numel * dtype.itemsize
        flats[dtype] = data[start:stop].view(dtype)
        start = stop
    return flats


def check_file(path: Path, layout: TensorLayout, sha256: str) -> None:
    """Read the whole file once.

    Raises:
        SnapshotError: It is not the file that was written, or holds other tensors than ``layout``.
        OSError: It cannot be read.
    """
    check_digest(path, sha256)
    with path.open("rb") as file:
        expected = header_bytes(layout)
        found = file.read(len(expected))
        if found != expected:
            file.seek(8)
            entries = json.loads(file.read(int.from_bytes(found[:8], "little")))
            raise SnapshotError(
                f"a snapshot must hold the model's tensors, got {path.name}, which differs in "
                f"{first_difference(entries, header(layout))}. "
                "Use another `dirpath` after changing the model or `buffer.dtype`."
            )


def check_digest(path: Path, sha256: str) -> None:
    """Read the whole file once.

    Raises:
        SnapshotError: It is not the file that was written.
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise SnapshotError(
            f"a snapshot's SHA-256 must be the recorded {sha256[:12]}..., got {digest.hexdigest()[:12]}... for "
            f"{path.name}. Something else wrote to the file; check the disk."
        )


def raw_bytes(block: Tensor) -> memoryview:
    """Return the bytes of a one-dimensional tensor; numpy knows no bfloat16, but every dtype is bytes."""
    return block.cpu().contiguous().view(torch.uint8).numpy().data


def header_bytes(layout: TensorLayout) -> bytes:
    """Return what stands before the data, its own length included."""
    text = json.dumps(header(layout), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def header(layout: TensorLayout) -> dict[str, Any]:
    """Return the header's JSON: one entry a slot, in the order of the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for slot in layout.slots:
        stop = start + slot.numel * slot.dtype.itemsize
        entries[slot.name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    return entries


def first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Name the first tensor that two headers describe differently, with what each says."""
    for name in (*expected, *found):
        is_, should_be = describe(found.get(name)), describe(expected.get(name))
        if is_ != should_be:
            return f"{name!r}: {is_} instead of {should_be}"
    return "the order of the tensors"


def describe(entry: dict[str, Any] | None) -> str:
    """Return a header entry's dtype and shape."""
    return f"{entry.get('dtype')} {entry.get('shape')}" if entry else "nothing"


def temporary_path(path: Path) -> Path:
    """Return the name under which ``path`` is written until it is complete."""
    return path.with_name(path.name + ".tmp")
