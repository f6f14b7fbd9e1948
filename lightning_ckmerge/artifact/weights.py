"""Weights on disk: one safetensors file, or several as Hugging Face shards them.

safetensors' own ``save_file`` wants all tensors on the CPU and contiguous at once: a copy of a model that lives on an
accelerator. Here they are written and hashed one at a time.

Tensors that share one memory (tied weights) are written once. As in ``safetensors.torch.save_model``, the file's
metadata maps each left-out name to the one kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_ckmerge.artifact.files import FileRecord, file_record
from lightning_ckmerge.buffer.snapshot_file import FLOAT_NAMES
from lightning_ckmerge.core.layout import TensorSpec
from lightning_ckmerge.distributed.comm import Alone, Comm
from lightning_ckmerge.errors import ArtifactError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_NAMES = {
    **FLOAT_NAMES,
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Weights(Protocol):
    """A model's ``state_dict`` that is written a tensor at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """All names, on every rank in the same order."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that can be left out, each with the name of the same tensor that is kept."""

    def gather(self, name: str) -> Tensor:
        """Return a whole tensor. A collective: all ranks ask for the same names in the same order."""


class LocalWeights:
    """Weights of which this process holds all.

    Args:
        tensors: Dense tensors by name, on any device, with any strides; left unchanged.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided:
                raise ArtifactError(
                    f"safetensors must be able to hold every tensor, got {tensor.layout} for {name!r}. "
                    "Register it with `persistent=False`, or convert it."
                )
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.aliases = find_aliases(tensors)

    def gather(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name]


def write_weights(
    directory: Path,
    weights: Weights,
    max_shard_size: int,
    comm: Comm | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, FileRecord]:
    """Write ``weights`` into ``directory``, and return each written file's bytes and SHA-256, on every rank.

    The files are the same for any number of ranks. Each is written by one of the ranks that see the directory, and a
    rank holds one gathered tensor at a time.

    Args:
        directory: Exists where rank 0 is; elsewhere too, if the file system is shared.
        weights: What to write.
        max_shard_size: Bytes above which the model is split; a larger tensor has a shard of its own.
        comm: The ranks; ``None``: a process alone.
        metadata: Texts for the header of each file.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """
    for name, spec in weights.specs.items():
        if spec.dtype not in DTYPE_NAMES:
            raise ArtifactError(
                f"safetensors must be able to hold every tensor, got {spec.dtype} for {name!r}. "
                "Register it with `persistent=False`, or convert it."
            )
    comm = comm or Alone()
    shards = _split(weights, max_shard_size)
    count = len(shards)
    names = [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    writers = [rank for rank, sees in enumerate(comm.exchange(directory.is_dir())) if sees]
    records: dict[str, FileRecord] = {}
    for start in range(0, count, len(writers)):
        wave = slice(start, start + len(writers))
        own = _write_wave(directory, weights, names[wave], shards[wave], writers, comm, metadata or {})
        for written in comm.exchange(own):
            records.update(written)
    if count == 1:
        return records
    if comm.rank == 0:
        weight_map = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        total_size = sum(weights.specs[name].nbytes for name in weight_map)
        index = {"metadata": {"total_size": total_size, **weights.aliases}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    index_record = comm.exchange(file_record(directory / INDEX_NAME) if comm.rank == 0 else None)[0]
    assert index_record is not None
    return {**records, INDEX_NAME: index_record}


def find_aliases(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names that can be left out, each with the name, first by alphabet, of the same tensor.

    Two names mean one tensor if memory, dtype, shape and strides are all equal: views of one buffer stay apart.
    """
    kept: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name in sorted(weights):
        tensor = weights[name]
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = kept.setdefault(key, name) if tensor.numel() else name
        if first != name:
            aliases[name] = first
    return aliases


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by name, left-out names included, each mapped from its file when it is asked for.

    Args:
        paths: The safetensors files of one artifact.

    Raises:
        ArtifactError: A file is no safetensors, or two files hold one name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        self._aliases: dict[str, str] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ArtifactError(
                    f"weights must be safetensors, got {path}: {error}. Restore the file from a copy, or use another "
                    "artifact."
                ) from error
            names = list(file.keys())
            if twice := self._files.keys() & names:
                raise ArtifactError(
                    f"a tensor must lie in one file, got {min(twice)!r} in {path} too. Remove a stale shard."
                )
            self._files.update(dict.fromkeys(names, file))
            self._aliases.update(file.metadata() or {})
        # The metadata says other things too, such as the framework's name.
        self._aliases = {a: k for a, k in self._aliases.items() if a not in self._files and k in self._files}

    def __getitem__(self, name: str) -> Tensor:
        kept = self._aliases.get(name, name)
        tensor: Tensor = self._files[kept].get_tensor(kept)
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._aliases

    def __len__(self) -> int:
        return len(self._files) + len(self._aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, read from the file's header alone."""
        kept = self._aliases.get(name, name)
        return tuple(self._files[kept].get_slice(kept).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, likewise.

        Raises:
            ArtifactError: It is a dtype that is not written here.
        """
        kept = self._aliases.get(name, name)
        found = self._files[kept].get_slice(kept).get_dtype()
        if found not in DTYPES:
            raise ArtifactError(
                f"a tensor must be of a dtype among {', '.join(DTYPES)}, got {found} for {name!r}. Convert it first."
            )
        return DTYPES[found]

    @property
    def aliases(self) -> Mapping[str, str]:
        """The left-out names, each with the one kept."""
        return self._aliases


def _split(weights: Weights, max_shard_size: int) -> list[list[str]]:
    """Return the names of each shard, in the order in which the shard holds them."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in weights.specs.items():
        if name in weights.aliases:
            continue
        if shards[-1] and num_bytes + spec.nbytes > max_shard_size:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += spec.nbytes
    # Wide types first, as safetensors sorts them, so that every tensor is aligned when the file is mapped.
    return [sorted(names, key=lambda name: (-weights.specs[name].dtype.itemsize, name)) for names in shards]


def _write_wave(
    directory: Path,
    weights: Weights,
    files: Sequence[str],
    shards: Sequence[Sequence[str]],
    writers: Sequence[int],
    comm: Comm,
    metadata: Mapping[str, str],
) -> dict[str, FileRecord]:
    """Write one shard a writer, side by side; every rank takes part in gathering every tensor."""
    own = writers.index(comm.rank) if comm.rank in writers[: len(shards)] else None
    with contextlib.ExitStack() as stack:
        output: _ShardWriter | None = None
        if own is not None:
            patient = comm.world_size > 1
            output = _ShardWriter(directory / files[own], weights, shards[own], metadata, patient=patient)
            stack.enter_context(output)
        for row in itertools.zip_longest(*shards):
            for i, name in enumerate(row):
                if name is None:
                    continue
                tensor = weights.gather(name)
                if output is not None and i == own:
                    output.write(tensor)
                del tensor
    return {files[own]: output.record} if output is not None and own is not None else {}


class _ShardWriter:
    """One safetensors file, written and hashed a tensor at a time, in the order of ``names``.

    A patient one lets ``record`` raise what went wrong before: other ranks need this one to go on gathering.
    """

    def __init__(
        self, path: Path, weights: Weights, names: Sequence[str], metadata: Mapping[str, str], *, patient: bool
    ) -> None:
        self._path = path
        self._patient = patient
        self._file: IO[bytes] | None = None
        self._failure: Exception | None = None
        held = set(names)
        left_out = {alias: kept for alias, kept in weights.aliases.items() if kept in held}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, **left_out}}
        offset = 0
        for name in names:
            spec = weights.specs[name]
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._num_bytes = len(self._prefix) + offset
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> _ShardWriter:
        with self._patience():
            self._file = self._path.open("wb")
            self._append(self._prefix)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, tensor: Tensor) -> None:
        """Append the next tensor."""
        if self._failure is not None:
            return
        with self._patience():
            self._append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    @property
    def record(self) -> FileRecord:
        """Bytes and SHA-256 of the complete file.

        Raises:
            Exception: What writing has raised.
        """
        if self._failure is not None:
            raise self._failure
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}

    def _append(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._sha256.update(data)
        self._file.write(data)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._patient:
                raise
            self._failure = error
