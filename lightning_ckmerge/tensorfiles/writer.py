"""safetensors files as Hugging Face shards them, written and hashed in pieces.

safetensors' own ``save_file`` wants all tensors on the CPU and contiguous at once: a copy of a model that lives on an
accelerator.

Tensors that share one memory (tied weights) are written once. As in ``safetensors.torch.save_model``, the file's
metadata maps each left-out name to the one kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, TypeVar

from lightning_ckmerge.core.specs import TENSOR_TYPES, TensorSpec
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import FileRecord, file_record

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class Described(Protocol):
    """The facts about a model's ``state_dict`` before a tensor is at hand."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """All names, on every rank in the same order."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that can be left out, each with the name of the same tensor that is kept."""


class Blocks(Described, Protocol):
    """Weights that come in blocks of bytes."""

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order. Asking for the next block may overwrite the last one."""


def write_blocks(
    directory: Path, weights: Blocks, max_shard_size: int, metadata: Mapping[str, str]
) -> dict[str, FileRecord]:
    """Write ``weights`` into ``directory``, and return each written file's bytes and SHA-256.

    Args:
        directory: Exists.
        weights: The weights.
        max_shard_size: Bytes above which the model is split; a larger tensor has a shard of its own.
        metadata: Texts for the header of each file.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """
    shards = plan_shards(weights, max_shard_size)
    records = {}
    for file, names in shards.items():
        with ShardWriter(directory / file, weights, names, metadata) as output:
            for name in names:
                for block in weights.blocks(name):
                    output.write(block)
        records[file] = output.record
    return {**records, **write_index(directory, weights, shards)}


def plan_shards(weights: Described, max_shard_size: int, single_name: str = SINGLE_NAME) -> dict[str, list[str]]:
    """Return the tensors' names by file, in the order in which the file holds them; one file is ``single_name``.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, spec in weights.specs.items():
        if spec.dtype not in TENSOR_TYPES:
            raise ArtifactError(
                f"safetensors must be able to hold every tensor, got {spec.dtype} for {name!r}. "
                "Register it with `persistent=False`, or convert it."
            )
        if name in weights.aliases:
            continue
        if shards[-1] and num_bytes + spec.nbytes > max_shard_size:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += spec.nbytes
    count = len(shards)
    files = [single_name] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    # Wide types first, as safetensors sorts them, so that every tensor is aligned when the file is mapped.
    return {
        file: sorted(names, key=lambda name: (-weights.specs[name].itemsize, name))
        for file, names in zip(files, shards, strict=True)
    }


def write_index(directory: Path, weights: Described, shards: Mapping[str, Sequence[str]]) -> dict[str, FileRecord]:
    """Write the index of several files, and return its record; a single file has none."""
    if len(shards) == 1:
        return {}
    weight_map = {name: file for file, held in shards.items() for name in held}
    total_size = sum(weights.specs[name].nbytes for name in weight_map)
    index = {"metadata": {"total_size": total_size, **weights.aliases}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {INDEX_NAME: file_record(directory / INDEX_NAME)}


def encode_header(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    *,
    alignment: int = 8,
    separators: tuple[str, str] | None = None,
) -> bytes:
    """Return the bytes before the tensors' in a safetensors file, its own length included.

    Args:
        specs: The tensors that the file holds, in the order of their bytes.
        metadata: Texts for people and tools.
        alignment: The first tensor begins at a multiple of it, a multiple of 8.
        separators: Between the items of the JSON, and between key and value.

    Source:
        https://huggingface.co/docs/safetensors (8 bytes of header length, JSON, data without gaps).
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=separators).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


class HashedFile:
    """A new file, written and hashed piece by piece; hashing runs beside the writing.

    Args:
        path: The file; an older one is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="ckmerge-hash")

    def __enter__(self: F) -> F:
        self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hashing.shutdown()
        if self._file is not None:
            self._file.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Append the next bytes; they are no longer needed when this returns."""
        assert self._file is not None
        hashed = self._hashing.submit(self._sha256.update, piece)
        try:
            rest = memoryview(piece)
            while rest:
                rest = rest[self._file.write(rest) :]
        finally:
            hashed.result()
        self._num_bytes += len(piece)

    @property
    def record(self) -> FileRecord:
        """Bytes and SHA-256 written so far."""
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}


F = TypeVar("F", bound=HashedFile)


class ShardWriter(HashedFile):
    """One safetensors file; the tensors' bytes follow in the order of ``names``.

    Args:
        path: The file.
        weights: The header's entries for the tensors.
        names: The tensors that it holds.
        metadata: Texts for the header.
        defer_errors: Raise write errors from ``record``, so that other ranks can finish gathering.
    """

    def __init__(
        self,
        path: Path,
        weights: Described,
        names: Sequence[str],
        metadata: Mapping[str, str],
        *,
        defer_errors: bool = False,
    ) -> None:
        super().__init__(path)
        self._defer_errors = defer_errors
        self._failure: Exception | None = None
        held = set(names)
        left_out = {alias: kept for alias, kept in weights.aliases.items() if kept in held}
        self._header = encode_header({name: weights.specs[name] for name in names}, {**metadata, **left_out})

    def __enter__(self) -> ShardWriter:
        with self._deferred():
            super().__enter__()
            self._append(self._header)
        return self

    def write(self, piece: bytes | memoryview) -> None:
        """Append the next bytes; they are no longer needed when this returns."""
        if self._failure is None:
            with self._deferred():
                self._append(piece)

    @property
    def record(self) -> FileRecord:
        """Bytes and SHA-256 of the complete file.

        Raises:
            Exception: Writing has failed, with this error.
        """
        if self._failure is not None:
            raise self._failure
        return super().record

    def _append(self, piece: bytes | memoryview) -> None:
        super().write(piece)

    @contextlib.contextmanager
    def _deferred(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._defer_errors:
                raise
            self._failure = error
