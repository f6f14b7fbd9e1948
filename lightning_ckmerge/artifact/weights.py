"""Weights on disk: one safetensors file, or several as Hugging Face shards them.

safetensors' own ``save_file`` wants all tensors on the CPU and contiguous at once: a copy of a model that lives on an
accelerator. Here they are written and hashed one at a time.

Tensors that share one memory (tied weights) are written once. As in ``safetensors.torch.save_model``, the file's
metadata maps each left-out name to the one kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_ckmerge.artifact.files import FileRecord, file_record
from lightning_ckmerge.errors import ArtifactError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

# The names of the safetensors format.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(directory: Path, weights: Mapping[str, Tensor], max_shard_size: int) -> dict[str, FileRecord]:
    """Write ``weights`` into ``directory``, and return each written file's bytes and SHA-256.

    Args:
        directory: An existing directory.
        weights: Dense tensors by ``state_dict`` name, on any device, with any strides; left unchanged.
        max_shard_size: Bytes above which the model is split; a larger tensor has a shard of its own.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise ArtifactError(
                f"safetensors must be able to hold every tensor, got {tensor.dtype}, {tensor.layout} for {name!r}. "
                "Register it with `persistent=False`, or convert it."
            )
    aliases = find_aliases(weights)
    shards = _split(weights, [name for name in weights if name not in aliases], max_shard_size)
    if len(shards) == 1:
        return {SINGLE_NAME: _write_file(directory / SINGLE_NAME, weights, shards[0], aliases)}
    records, weight_map = {}, {}
    for i, names in enumerate(shards, start=1):
        shard_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        records[shard_name] = _write_file(directory / shard_name, weights, names, aliases)
        weight_map.update(dict.fromkeys(names, shard_name))
    total_size = sum(weights[name].nbytes for name in weight_map)
    index = {"metadata": {"total_size": total_size, **aliases}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return {**records, INDEX_NAME: file_record(directory / INDEX_NAME)}


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


def _split(weights: Mapping[str, Tensor], names: Sequence[str], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name in names:
        if shards[-1] and num_bytes + weights[name].nbytes > max_shard_size:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += weights[name].nbytes
    return shards


def _write_file(
    path: Path, weights: Mapping[str, Tensor], names: Sequence[str], aliases: Mapping[str, str]
) -> FileRecord:
    # Wide types first, as safetensors sorts them, so that every tensor is aligned when the file is mapped.
    held = set(names)
    order = sorted(names, key=lambda name: (-weights[name].element_size(), name))
    left_out = {alias: kept for alias, kept in aliases.items() if kept in held}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **left_out}}
    offset = 0
    for name in order:
        tensor = weights[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    sha256 = hashlib.sha256(prefix)
    with path.open("wb") as file:
        file.write(prefix)
        for name in order:
            data = weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            sha256.update(data)
            file.write(data)
    return {"bytes": len(prefix) + offset, "sha256": sha256.hexdigest()}
