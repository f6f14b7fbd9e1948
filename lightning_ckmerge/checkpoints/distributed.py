"""Directories that ``torch.distributed.checkpoint`` wrote, read a tensor at a time by one process, without a group.

torch's reader unpickles the metadata file without limits, so it is read here: only the classes that describe tensors
are let through. The tensors themselves torch loads with ``weights_only=True``.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_ckmerge.core.layout import tensor_spec
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.reader import METADATA_NAME
from lightning_ckmerge.tensorfiles.untrusted import inside, read_bytes

# A checkpoint of 100,000 tensors on 1,000 ranks.
MAX_METADATA_BYTES = 1 << 30

ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}


class DistributedWeights(Mapping[str, Tensor]):
    """The tensors below one entry of a distributed checkpoint, by name.

    Args:
        path: The directory.
        keys: Entries to look under, in this order; an empty one is the whole checkpoint.

    Raises:
        ArtifactError: The metadata is damaged or no description of tensors, or there are no tensors below ``keys``.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self._path = path
        self._reader = _Reader(path, _read_metadata(path))
        entries = self._reader.metadata.state_dict_metadata
        tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        for key in keys:
            self._prefix = f"{key}." if key else ""
            found = {name: entry for name, entry in tensors.items() if name.startswith(self._prefix)}
            if found:
                break
        else:
            entries_found = ", ".join(sorted({name.partition(".")[0] for name in entries})) or "nothing"
            raise ArtifactError(
                f"a distributed checkpoint must hold its weights under {' or '.join(map(repr, keys))}, got "
                f"{entries_found} in {path}. Name the entry with `--key`."
            )
        self.specs = {
            name.removeprefix(self._prefix): tensor_spec(entry.size, entry.properties.dtype)
            for name, entry in found.items()
        }
        self._dtypes = {name.removeprefix(self._prefix): entry.properties.dtype for name, entry in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        full = f"{self._prefix}{name}"
        state: dict[str, Any] = {}
        try:
            state[full] = torch.empty(spec.shape, dtype=self._dtypes[name])  # of any size that the metadata says
            with warnings.catch_warnings():
                # torch remarks on the missing process group, which `no_dist` asks for.
                warnings.simplefilter("ignore", UserWarning)
                load(state, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, Exception) as error:  # the first is no `Exception`
            raise ArtifactError(
                f"a distributed checkpoint must hold every shard of its tensors, got {type(error).__name__} for "
                f"{full!r} in {self._path}. Restore its files from a copy."
            ) from error
        tensor: Tensor = state[full]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class _Reader(FileSystemReader):
    """torch's reader, given the metadata that was read once and safely."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata as torch's own method does."""
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors and nothing else: a name that is not listed is never looked up.

    A pickle may set attributes of whatever it has named. So what it gets is made for it alone, and forgotten with it.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a listed class, and a listed value itself."""
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        found = super().find_class(module, name)
        if not callable(found):
            return found
        is_described = isinstance(found, type) and dataclasses.is_dataclass(found)
        return type(name, (cast("type", found),), {}) if is_described else functools.partial(found)


def _read_metadata(path: Path) -> Metadata:
    try:
        found = _MetadataUnpickler(io.BytesIO(read_bytes(path / METADATA_NAME, max_bytes=MAX_METADATA_BYTES))).load()
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"the metadata of a distributed checkpoint must describe tensors alone, got {error} in {path}. "
            "Do not load this checkpoint unless you trust it; then save it again with plain contents."
        ) from error
    except Exception as error:  # a pickle may end in any of them
        raise _unreadable(path, error) from error
    if not isinstance(found, Metadata):
        raise ArtifactError(
            f"{METADATA_NAME} must hold a checkpoint's metadata, got {type(found).__name__}. Restore it from a copy."
        )
    try:
        metadata = _rebuilt(found)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    # A shard's path is data too: it must not leave the directory.
    for stored in metadata.storage_data.values():
        shard = inside(path, stored.relative_path)
        if shard.parent != path or (shard.exists() and not shard.is_file()):
            raise ArtifactError(
                f"the files of a checkpoint must lie inside it, got {stored.relative_path!r} in {path}. Restore it "
                "from a copy."
            )
    return metadata


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"a distributed checkpoint must have a readable {METADATA_NAME}, got {type(error).__name__} for {path}. "
        "Restore it from a copy."
    )


def _rebuilt(found: Metadata) -> Metadata:
    """Return the same metadata of torch's own classes, each part of it of the type that it must be."""
    entries: dict[str, Any] = {}
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            entries[_text(name)] = TensorStorageMetadata(
                properties=TensorProperties(dtype=_dtype(entry.properties.dtype)),
                size=_size(entry.size),
                chunks=[ChunkStorageMetadata(_size(c.offsets), _size(c.sizes)) for c in entry.chunks],
            )
        else:
            entries[_text(name)] = BytesStorageMetadata()
    storage = {}
    for place, stored in found.storage_data.items():
        offset = None if place.offset is None else _size(place.offset)
        index = None if place.index is None else int(place.index)
        own = {f.name: getattr(stored, f.name) for f in dataclasses.fields(_StorageInfo) if hasattr(stored, f.name)}
        own.update(relative_path=_text(stored.relative_path), offset=int(stored.offset), length=int(stored.length))
        storage[MetadataIndex(_text(place.fqn), offset, index)] = _StorageInfo(**own)
    return Metadata(state_dict_metadata=entries, storage_data=storage)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is no text")
    return value


def _dtype(value: object) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError("a dtype is none")
    return value


def _size(value: Any) -> torch.Size:
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise TypeError("a size is none")
    return torch.Size(value)
