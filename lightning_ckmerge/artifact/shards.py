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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol

from lightning_ckmerge.artifact.files import INDEX_NAME, SINGLE_NAME, FileRecord, file_record
from lightning_ckmerge.core.specs import TENSOR_TYPES, TensorSpec
from lightning_ckmerge.errors import ArtifactError


class Described(Protocol):
    """What is known of a model's ``state_dict`` before a tensor is at hand."""

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
        weights: What to write.
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
    """Write the index of several files, and return what is known of it; a single file has none."""
    if len(shards) == 1:
        return {}
    weight_map = {name: file for file, held in shards.items() for name in held}
    total_size = sum(weights.specs[name].nbytes for name in weight_map)
    index = {"metadata": {"total_size": total_size, **weights.aliases}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {INDEX_NAME: file_record(directory / INDEX_NAME)}


class ShardWriter:
    """One safetensors file, written and hashed piece by piece, in the order of ``names``.

    Args:
        path: The file.
        weights: What the header says of the tensors.
        names: The tensors that it holds.
        metadata: Texts for the header.
        patient: Let ``record`` raise what went wrong before: other ranks need this one to go on gathering.
    """

    def __init__(
        self,
        path: Path,
        weights: Described,
        names: Sequence[str],
        metadata: Mapping[str, str],
        *,
        patient: bool = False,
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
            end = offset + spec.nbytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._num_bytes = len(self._prefix) + offset
        self._sha256 = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="ckmerge-hash")

    def __enter__(self) -> ShardWriter:
        with self._patience():
            self._file = self._path.open("wb", buffering=0)
            self._append(self._prefix)
        return self

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()
        if self._file is not None:
            self._file.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Append the next bytes; they are no longer needed when this returns."""
        if self._failure is not None:
            return
        with self._patience():
            self._append(piece)

    @property
    def record(self) -> FileRecord:
        """Bytes and SHA-256 of the complete file.

        Raises:
            Exception: What writing has raised.
        """
        if self._failure is not None:
            raise self._failure
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}

    def _append(self, piece: bytes | memoryview) -> None:
        assert self._file is not None
        hashed = self._hashing.submit(self._sha256.update, piece)
        try:
            rest = memoryview(piece)
            while rest:
                rest = rest[self._file.write(rest) :]
        finally:
            hashed.result()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._patient:
                raise
            self._failure = error
