"""Directories that ``torch.distributed.checkpoint`` wrote, read a tensor at a time by one process, without a group.

torch's reader unpickles the metadata file without limits, so it is read here: only the classes that describe tensors
are let through. The tensors themselves torch loads with ``weights_only=True``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_ckmerge.core.layout import tensor_spec
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.reader import METADATA_NAME

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
        state: dict[str, Any] = {full: torch.empty(spec.shape, dtype=self._dtypes[name])}
        try:
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
    """Builds descriptions of tensors and nothing else: a name that is not listed is never looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a listed class."""
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    try:
        with (path / METADATA_NAME).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"the metadata of a distributed checkpoint must describe tensors alone, got {error} in {path}. "
            "Do not load this checkpoint unless you trust it; then save it again with plain contents."
        ) from error
    except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(
            f"a distributed checkpoint must have a readable {METADATA_NAME}, got {type(error).__name__} for {path}. "
            "Restore it from a copy."
        ) from error
    if not isinstance(metadata, Metadata):
        raise ArtifactError(
            f"{METADATA_NAME} must hold a checkpoint's metadata, got {type(metadata).__name__}. Restore it from a copy."
        )
    # A shard's path is data too: it must not leave the directory.
    for stored in metadata.storage_data.values():
        if Path(stored.relative_path).name != stored.relative_path:
            raise ArtifactError(
                f"the files of a checkpoint must lie inside it, got {stored.relative_path!r} in {path}. "
                "Do not use this checkpoint: it may have been tampered with."
            )
    return metadata
