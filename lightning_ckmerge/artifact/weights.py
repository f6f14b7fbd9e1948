"""A model's weights on disk, gathered from its ranks and written a tensor at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lightning_ckmerge.core.layout import raw_bytes
from lightning_ckmerge.distributed.comm import Alone, Comm
from lightning_ckmerge.tensorfiles.durable import FileRecord
from lightning_ckmerge.tensorfiles.writer import SINGLE_NAME, Described, ShardWriter, plan_shards, write_index


class Weights(Described, Protocol):
    """A model's ``state_dict`` that is written a tensor at a time."""

    def gather(self, name: str) -> Tensor:
        """Return a whole tensor. A collective: all ranks ask for the same names in the same order."""


def write_weights(
    directory: Path,
    weights: Weights,
    max_shard_size: int,
    comm: Comm | None = None,
    metadata: Mapping[str, str] | None = None,
    single_name: str = SINGLE_NAME,
) -> dict[str, FileRecord]:
    """Write ``weights`` into ``directory``, and return each written file's bytes and SHA-256, on every rank.

    The files are the same for any number of ranks. Each is written by one of the ranks that see the directory, and a
    rank holds one gathered tensor at a time.

    Args:
        directory: Exists where rank 0 is; elsewhere too, if the file system is shared.
        weights: The weights.
        max_shard_size: Bytes above which the model is split; a larger tensor has a shard of its own.
        comm: The ranks; ``None``: a process alone.
        metadata: Texts for the header of each file.
        single_name: Of the file, if there is only one.

    Raises:
        ArtifactError: safetensors cannot hold one of the tensors.
    """
    comm = comm or Alone()
    shards = plan_shards(weights, max_shard_size, single_name)
    files = list(shards)
    writers = [rank for rank, sees in enumerate(comm.exchange(directory.is_dir())) if sees]
    records: dict[str, FileRecord] = {}
    for start in range(0, len(files), len(writers)):
        wave = {file: shards[file] for file in files[start : start + len(writers)]}
        own = _write_wave(directory, weights, wave, writers, comm, metadata or {})
        for written in comm.exchange(own):
            records.update(written)
    index = write_index(directory, weights, shards) if comm.rank == 0 else {}
    return {**records, **comm.exchange(index)[0]}


def _write_wave(
    directory: Path,
    weights: Weights,
    shards: Mapping[str, Sequence[str]],
    writers: Sequence[int],
    comm: Comm,
    metadata: Mapping[str, str],
) -> dict[str, FileRecord]:
    """Write one shard a writer, side by side; every rank takes part in gathering every tensor."""
    own = dict(zip(writers, shards, strict=False)).get(comm.rank)
    with contextlib.ExitStack() as stack:
        output: ShardWriter | None = None
        if own is not None:
            defer_errors = comm.world_size > 1
            output = ShardWriter(directory / own, weights, shards[own], metadata, defer_errors=defer_errors)
            stack.enter_context(output)
        for row in itertools.zip_longest(*shards.values()):
            for file, name in zip(shards, row, strict=True):
                if name is None:
                    continue
                tensor = weights.gather(name)
                if output is not None and file == own:
                    output.write(raw_bytes(tensor))
                del tensor
    return {own: output.record} if output is not None and own is not None else {}
