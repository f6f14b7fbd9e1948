"""Where snapshots live: safetensors files in one directory, or memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_ckmerge.core.layout import Flats, TensorLayout, raw_bytes, tensor_spec
from lightning_ckmerge.errors import SnapshotError
from lightning_ckmerge.tensorfiles.durable import file_record, replacing
from lightning_ckmerge.tensorfiles.reader import MAX_HEADER_BYTES
from lightning_ckmerge.tensorfiles.untrusted import parse_json
from lightning_ckmerge.tensorfiles.writer import HashedFile, encode_header

# A multiple of every itemsize, and a cache line: mapped tensors are aligned as allocated ones are.
ALIGNMENT = 64

FILE_NAME = re.compile(r"[0-9a-f]{8}-[0-9]{9,18}-[0-9]{9,18}-(?:mean|point|open|latest)\.safetensors(?:\.tmp)?")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A snapshot in a storage; ``sha256`` is ``None`` for one that is not a file."""

    name: str
    num_bytes: int
    sha256: str | None

    def renamed(self, old_id: str, new_id: str) -> Stored:
        """Return the same snapshot under a name that starts with another buffer's number."""
        return replace(self, name=new_id + self.name.removeprefix(old_id))


class Storage(Protocol):
    """Keeps snapshots by name. Which ones to keep, pool and delete is the buffer's decision; where they are, how they
    are written whole or not at all, and how they are checked before use is the storage's.
    """

    durable: bool
    """Whether snapshots survive the process."""

    def write(self, name: str, layout: TensorLayout, blocks: Iterable[Tensor]) -> Stored:
        """Keep a snapshot, given as its flat memory in one-dimensional pieces. Raises ``OSError``, leaving nothing."""

    def read(self, stored: Stored, layout: TensorLayout) -> Flats:
        """Return a snapshot's memory, to be read only. Raises ``SnapshotError`` if it differs from the written one."""

    def delete(self, name: str) -> None:
        """Forget a snapshot; nothing happens if it is gone."""

    def contents(self, run_id: str) -> dict[str, int]:
        """Return the files that an earlier process of the run left here: name -> bytes, half-written ones included."""


class DiskStorage:
    """Safetensors files in ``dirpath``, which is made by the first write. Files of others in it are left alone."""

    durable = True

    def __init__(self, dirpath: str | os.PathLike[str]) -> None:
        self.dirpath = Path(dirpath)
        # Files that this process has written or hashed, by attributes that change when something else writes to them.
        self._known: dict[str, tuple[int, ...]] = {}

    def write(self, name: str, layout: TensorLayout, blocks: Iterable[Tensor]) -> Stored:
        """Write one file, and let it appear under its name when it is complete."""
        path = self.path(name)
        num_bytes, sha256 = write_file(path, layout, blocks)
        self._known[name] = _identity(path.stat())
        return Stored(name=name, num_bytes=num_bytes, sha256=sha256)

    def read(self, stored: Stored, layout: TensorLayout) -> Flats:
        """Map the file. Size is checked always; content and header unless the file is known and has not changed."""
        path = self.path(stored.name)
        try:
            status = path.stat()
            num_bytes = status.st_size
            if num_bytes != stored.num_bytes or stored.sha256 is None:
                raise SnapshotError(
                    f"a snapshot's size must be the recorded {stored.num_bytes} bytes, got {num_bytes} for "
                    f"{path.name}. Something else wrote to the file; check the disk."
                )
            if self._known.get(stored.name) != _identity(status):
                check_file(path, layout, stored.sha256)
                self._known[stored.name] = _identity(status)
            return map_file(path, layout)
        except (OSError, ValueError) as error:  # a ValueError for a file that is too short
            raise SnapshotError(
                f"a snapshot's file must be readable, got {error} for {path.name}. Leave {self.dirpath} to the run."
            ) from error

    def delete(self, name: str) -> None:
        """Remove the file."""
        self.path(name).unlink(missing_ok=True)
        self._known.pop(name, None)

    def contents(self, run_id: str) -> dict[str, int]:
        """Return the run's own files; all others in the directory are none of its business."""
        paths = [path for path in self.dirpath.glob(f"{run_id}-*") if FILE_NAME.fullmatch(path.name)]
        return {path.name: path.stat().st_size for path in sorted(paths)}

    def path(self, name: str) -> Path:
        """Return where a snapshot's file is, or would be.

        Raises:
            SnapshotError: This is no name of a snapshot.
        """
        # Names come back from checkpoints: one that could leave the directory must not be opened, let alone removed.
        if not FILE_NAME.fullmatch(name):
            raise SnapshotError(
                f"a snapshot's name must be <run_id>-<first_step>-<last_step>-<kind>.safetensors, got {name!r}. "
                "Resume from a checkpoint that this package wrote."
            )
        return self.dirpath / name


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class MemoryStorage:
    """Snapshots on ``device``; host memory is pinned where there is a GPU to copy to."""

    durable = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._snapshots: dict[str, Flats] = {}

    def write(self, name: str, layout: TensorLayout, blocks: Iterable[Tensor]) -> Stored:
        """Copy the blocks into fresh memory."""
        flats = layout.allocate(self.device, pinned=self.device.type == "cpu" and torch.cuda.is_available())
        filled = dict.fromkeys(flats, 0)
        for block in blocks:
            start = filled[block.dtype]
            filled[block.dtype] = start + block.numel()
            flats[block.dtype][start : filled[block.dtype]].copy_(block)
        if self.device.type == "cuda":
            # The caller's memory may be overwritten, and ours read, on another thread's stream.
            torch.cuda.current_stream(self.device).synchronize()
        self._snapshots[name] = flats
        return Stored(name=name, num_bytes=layout.num_bytes, sha256=None)

    def read(self, stored: Stored, layout: TensorLayout) -> Flats:
        """Return the memory itself."""
        return self._snapshots[stored.name]

    def delete(self, name: str) -> None:
        """Free the memory once no reader holds it."""
        self._snapshots.pop(name, None)

    def contents(self, run_id: str) -> dict[str, int]:
        """Return nothing: memory does not survive."""
        return {}


def write_file(path: Path, layout: TensorLayout, blocks: Iterable[Tensor]) -> tuple[int, str]:
    """Write a snapshot to a temporary name beside ``path``, flush it to the disk, and rename it: all or nothing.

    The data region of the file is the snapshot's flat memory, so it can be mapped instead of read.

    Args:
        path: Its final name; an older file of that name is replaced.
        layout: The snapshot's tensors.
        blocks: The snapshot's flat memory in order, in one-dimensional pieces of the stored dtypes, on any device.

    Returns:
        Size in bytes, and SHA-256 in hexadecimal.

    Raises:
        OSError: The file system refuses; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, path.with_name(path.name + ".tmp")) as staged, HashedFile(staged) as output:
        output.write(header_bytes(layout))
        for block in blocks:
            output.write(raw_bytes(block))
    return output.record["bytes"], output.record["sha256"]


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
            file.seek(0)
            entries = _entries(file.read(8 + min(int.from_bytes(found[:8], "little"), MAX_HEADER_BYTES)))
            raise SnapshotError(
                f"a snapshot must hold the model's tensors, got {path.name}, which differs in "
                f"{_first_difference(entries, _entries(expected))}. "
                "Use another `dirpath` after changing the model or `buffer.dtype`."
            )


def check_digest(path: Path, sha256: str) -> None:
    """Read the whole file once.

    Raises:
        SnapshotError: It is not the file that was written.
        OSError: It cannot be read.
    """
    found = file_record(path)["sha256"]
    if found != sha256:
        raise SnapshotError(
            f"a snapshot's SHA-256 must be the recorded {sha256[:12]}..., got {found[:12]}... for "
            f"{path.name}. Something else wrote to the file; check the disk."
        )


def header_bytes(layout: TensorLayout) -> bytes:
    """Return the header before the data: one entry a slot, in the order of the data."""
    specs = {slot.name: tensor_spec(slot.shape, slot.dtype) for slot in layout.slots}
    return encode_header(specs, {}, alignment=ALIGNMENT, separators=(",", ":"))


def _entries(header: bytes) -> dict[str, Any]:
    try:
        entries = parse_json(header[8:])
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Name the first tensor that two headers describe differently, with both descriptions."""
    for name in (*expected, *found):
        is_, should_be = _described(found.get(name)), _described(expected.get(name))
        if is_ != should_be:
            return f"{name!r}: {is_} instead of {should_be}"
    return "the order of the tensors"


def _described(entry: dict[str, Any] | None) -> str:
    """Return a header entry's dtype and shape."""
    return f"{entry.get('dtype')} {entry.get('shape')}" if isinstance(entry, dict) else "nothing"
