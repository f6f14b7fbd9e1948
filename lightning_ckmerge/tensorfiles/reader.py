"""Tensors in safetensors files: found without PyTorch, loaded or read as bytes when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lightning_ckmerge.core.specs import TENSOR_TYPES, TensorSpec
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor

METADATA_NAME = ".metadata"  # of a distributed checkpoint
MAX_HEADER_BYTES = 100_000_000  # as the library has it


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The start of a tensor's bytes, and the header's entry for it."""

    path: Path
    start: int
    entry: Mapping[str, Any]


class StoredWeights(Mapping[str, "Tensor"]):
    """Tensors by name, left-out names included, each mapped from its file when it is asked for.

    Args:
        paths: The safetensors files of one artifact.

    Raises:
        ArtifactError: A file is no safetensors, or two files hold one name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, _Place] = {}
        self._aliases: dict[str, str] = {}
        # Closed with this object.
        self._mapped: dict[Path, Any] = {}
        self._files: dict[Path, FileIO] = {}
        for path in paths:
            metadata, places = _read_header(path)
            if twice := self._places.keys() & places.keys():
                raise ArtifactError(
                    f"a tensor must lie in one file, got {min(twice)!r} in {path} too. Remove a stale shard."
                )
            self._places.update(places)
            self._aliases.update(metadata)
        # The metadata says other things too, such as the framework's name.
        self._aliases = {a: k for a, k in self._aliases.items() if a not in self._places and k in self._places}

    def __getitem__(self, name: str) -> Tensor:
        kept = self._aliases.get(name, name)
        path = self._places[kept].path
        try:
            if path not in self._mapped:
                self._mapped[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._mapped[path].get_tensor(kept)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"a tensor must be readable, got {error} for {name!r} in {path}. Restore the file from a copy."
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._places) + len(self._aliases)

    def read_into(self, name: str, start: int, block: memoryview) -> None:
        """Fill a block with a tensor's bytes from ``start`` on.

        Raises:
            ArtifactError: The file has become shorter.
        """
        place = self._places[self._aliases.get(name, name)]
        if place.path not in self._files:
            self._files[place.path] = FileIO(place.path)
        file = self._files[place.path]
        file.seek(place.start + start)
        done = 0
        while done < len(block):
            num_bytes = file.readinto(block[done:])
            if not num_bytes:
                raise ArtifactError(f"a checkpoint must stay as it is while it is read, got a shorter {place.path}.")
            done += num_bytes

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's shape and type.

        Raises:
            ArtifactError: It is a type that is not written here.
        """
        entry = self._places[self._aliases.get(name, name)].entry
        found = entry["dtype"]
        if found not in TENSOR_TYPES:
            raise ArtifactError(
                f"a tensor must be of a dtype among {', '.join(TENSOR_TYPES)}, got {found} for {name!r}. "
                "Convert it first."
            )
        return TensorSpec(tuple(entry["shape"]), found, TENSOR_TYPES[found][1])

    @property
    def aliases(self) -> Mapping[str, str]:
        """The left-out names, each with the one kept."""
        return self._aliases


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in a safetensors file's header.

    Raises:
        ArtifactError: The file is no safetensors.
    """
    return _read_header(path)[0]


def parse_header(data: bytes) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return the texts and the tensors' entries in the header of a safetensors file, which may come from anyone.

    Args:
        data: The header alone: JSON, without the eight bytes that tell its length.

    Raises:
        ValueError: It is no header.

    >>> parse_header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}')
    ({}, {'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}})
    """
    header = parse_json(data, max_bytes=MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(f"the entry for {name[:80]!r} is none of a tensor")
    return metadata, header


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    is_counted = all(type(n) is int and n >= 0 for n in numbers)
    return isinstance(entry["dtype"], str) and is_counted and len(offsets) == 2 and offsets[0] <= offsets[1]


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, _Place]]:
    """Return a file's metadata, and the place of each of its tensors."""
    try:
        if not path.is_file():
            raise OSError("no such file")  # a pipe's end may never come
        # The library checks that tensors fill the file without gaps, but does not say where each of them is.
        with safe_open(path, framework="np"), path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            metadata, header = parse_header(file.read(min(num_bytes, MAX_HEADER_BYTES + 1)))
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"weights must be safetensors, got {path}: {error}. Restore the file from a copy, or use another artifact."
        ) from error
    places = {
        name: _Place(path=path, start=8 + num_bytes + entry["data_offsets"][0], entry=entry)
        for name, entry in header.items()
    }
    return metadata, places
