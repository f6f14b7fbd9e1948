"""Which tensors this rank keeps and merges, and how a merge becomes visible on the others.

Three kinds of tensors:

- Shards (``DTensor``: FSDP2, tensor parallelism, both; flat shards of FSDP1): a rank owns its local part. Merges are
  linear, so they need no communication.
- Parameters that every rank holds (DDP): the bytes are dealt out evenly, cut along dimension 0; owners merge, and
  broadcast the result in buckets.
- Buffers outside shards: each rank's own, since ranks need not agree on them (BatchNorm statistics).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_ckmerge.core.layout import OwnedTensor, Role, as_real
from lightning_ckmerge.distributed.boxes import Box, part_name, whole
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.errors import UnsupportedError

DEFAULT_BUCKET_BYTES = 64 << 20
# What wrappers put into names, and take out of ``state_dict``'s again.
WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Piece:
    """A part of one tensor that one rank owns.

    Args:
        name: The whole tensor's name.
        role: Parameter or buffer.
        rows: Range along dimension 0 of the tensor as this rank holds it; ``None``: all of it.
        part: The piece's name in the buffer, which tells its place in the whole tensor.
    """

    name: str
    role: Role
    rows: tuple[int, int] | None
    part: str

    def of(self, tensor: Tensor) -> Tensor:
        """Return the piece as a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


class Ownership:
    """The floating parameters and persistent buffers of a module, tied ones once, and who owns them.

    Integer and boolean entries are not among them: a merge leaves them as the latest weights have them. Places are kept
    instead of tensors, since a module may put a new tensor in a buffer's place.

    Args:
        module: The LightningModule; names are those of its ``state_dict``.
        comm: The ranks.
        bucket_bytes: Most extra memory that ``publish`` takes.
    """

    def __init__(self, module: nn.Module, comm: Comm, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self._comm = comm
        self._bucket_bytes = bucket_bytes
        self._fsdp2 = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self.settle()
        self._places = list(_places(module))
        flat = {s.name: s for s in flat_shards(module)}
        is_sharded = bool(flat) or any(isinstance(holder[key], DTensor) for _, _, holder, key in self._places)
        self.is_replicated = comm.world_size > 1 and not is_sharded
        self._pieces = [
            piece
            for name, role, holder, key in self._places
            if not (self.is_replicated and role == "parameter")
            for piece in _own_part(name, role, holder[key], flat.get(name))
        ]
        self._shares: list[list[Piece]] = []
        if self.is_replicated:
            self._shares = deal_out(self._replicated(), comm.world_size)
            self._pieces += self._shares[comm.rank]

    def settle(self) -> None:
        """Bring FSDP2's shards into place: after a forward pass without gradients the root's stay gathered."""
        for module in self._fsdp2:
            module.reshard()

    def local(self) -> list[OwnedTensor]:
        """Return all tensors, or this rank's shards of them, as they are now."""
        return [OwnedTensor(name=n, role=r, tensor=local_part(t)) for n, r, t in self._tensors()]

    def owned(self) -> list[OwnedTensor]:
        """Return the parts that this rank keeps and merges, as views of the live tensors."""
        return self.select({o.name: o.tensor for o in self.local()})

    def select(self, tensors: Mapping[str, Tensor]) -> list[OwnedTensor]:
        """Return the owned parts of ``tensors``, which are live ones or copies, by the names of ``local``."""
        return [OwnedTensor(name=p.part, role=p.role, tensor=p.of(tensors[p.name])) for p in self._pieces]

    @torch.no_grad()
    def publish(self) -> None:
        """Make what the owners wrote visible on all ranks. No communication where nothing is held twice."""
        if not self.is_replicated:
            return
        tensors = {name: tensor for name, _, tensor in self._tensors()}
        for rank, pieces in enumerate(self._shares):
            for bucket in _buckets([as_real(p.of(tensors[p.name])) for p in pieces], self._bucket_bytes):
                _broadcast(bucket, rank, is_source=rank == self._comm.rank)

    def _tensors(self) -> Iterator[tuple[str, Role, Tensor]]:
        for name, role, holder, key in self._places:
            tensor = holder[key]
            if tensor is not None:
                yield name, role, tensor

    def _replicated(self) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, role, tensor in self._tensors() if role == "parameter"]


def local_part(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clean_name(name: str) -> str:
    """Return a module path without what wrappers add to it.

    >>> clean_name("net._fsdp_wrapped_module.0.weight")
    'net.0.weight'
    """
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def deal_out(tensors: Sequence[tuple[str, Tensor]], world_size: int) -> list[list[Piece]]:
    """Return each rank's pieces of tensors that all ranks hold, of nearly equal bytes.

    The tensors are laid end to end and cut into ``world_size`` equal lengths, each cut moved to the nearest row.

    Args:
        tensors: Names and tensors, in an order on which all ranks agree.
        world_size: Number of ranks.
    """
    total = sum(t.nbytes for _, t in tensors)
    shares: list[list[Piece]] = [[] for _ in range(world_size)]
    position, rank = 0, 0
    for name, tensor in tensors:
        num_rows = tensor.shape[0] if tensor.dim() else 1
        row_bytes = tensor.nbytes / max(1, num_rows)
        start = 0
        while start < num_rows:
            boundary = total * (rank + 1) / world_size
            fitting = num_rows - start
            if rank < world_size - 1 and row_bytes:
                fitting = min(fitting, round((boundary - position) / row_bytes))
            if fitting <= 0:
                rank += 1
                continue
            shares[rank].append(_piece(name, tensor, start, start + fitting))
            position += int(row_bytes * fitting)
            start += fitting
    return shares


def _piece(name: str, tensor: Tensor, start: int, stop: int) -> Piece:
    if tensor.dim() == 0 or (start, stop) == (0, tensor.shape[0]):
        return Piece(name=name, role="parameter", rows=None, part=name)
    box = Box(((start, stop), *whole(tensor.shape).ranges_D[1:]))
    return Piece(name=name, role="parameter", rows=(start, stop), part=part_name(name, box, tensor.shape))


def _own_part(name: str, role: Role, tensor: Tensor | None, flat: FlatShard | None) -> list[Piece]:
    """This rank's part of a sharded tensor, or all of one that is its own; nothing for an empty shard."""
    if tensor is None or local_part(tensor).numel() == 0:
        return []
    part = name
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if tuple(shape) != tuple(tensor.to_local().shape):
            raise UnsupportedError(
                f"a shard must be one box of the whole tensor, got {tensor.placements} for {name!r}. "
                "Use FSDP2 or tensor parallelism along other dimensions."
            )
        box = Box(tuple((o, o + n) for o, n in zip(offset, shape, strict=True)))
        part = part_name(name, box, tensor.shape)
    elif flat is not None:
        part = part_name(name, Box(((flat.start, flat.stop),)), (math.prod(flat.shape),))
    return [Piece(name=name, role=role, rows=None, part=part)]


def _places(module: nn.Module) -> Iterator[tuple[str, Role, dict[str, Tensor | None], str]]:
    seen: set[int] = set()
    for path, submodule in module.named_modules():
        prefix = clean_name(f"{path}.") if path else ""
        persistent = [n for n in submodule._buffers if n not in submodule._non_persistent_buffers_set]
        holders: list[tuple[Role, Any, list[str]]] = [
            ("parameter", submodule._parameters, list(submodule._parameters)),
            ("buffer", submodule._buffers, persistent),
        ]
        for role, holder, keys in holders:
            for key in keys:
                tensor = holder[key]
                if tensor is None or id(tensor) in seen or not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                seen.add(id(tensor))
                yield f"{prefix}{key}", role, holder, key


@dataclass(frozen=True)
class FlatShard:
    """This rank's part of a parameter that FSDP1 flattened: elements ``start`` to ``stop`` of the whole's."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole parameter. A collective."""
        numel = math.prod(self.shape)
        # Each element lies on one rank, so a sum over zeros is the element itself, in any precision.
        whole = torch.zeros(numel, dtype=part.dtype, device=part.device)
        whole[self.start : self.stop] = part.reshape(-1)
        dist.all_reduce(whole)
        return whole.view(self.shape)


def flat_shards(module: nn.Module) -> Iterator[FlatShard]:
    """Return this rank's shards of the parameters that FSDP1 flattened, empty ones included."""
    for path, submodule in module.named_modules():
        handle = getattr(submodule, "_handle", None) if isinstance(submodule, FullyShardedDataParallel) else None
        if handle is None:
            continue
        flat = handle.flat_param
        prefix = f"{path}." if path else ""
        for fqn, shard, shape in zip(flat._fqns, flat._shard_param_infos, flat._shapes, strict=True):
            start = shard.intra_param_start_idx if shard.in_shard else 0
            stop = shard.intra_param_end_idx + 1 if shard.in_shard else 0
            yield FlatShard(clean_name(f"{prefix}{fqn}"), tuple(shape), start, stop)


def _buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Group tensors into lists of at most ``bucket_bytes``; larger ones are cut."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        for part in _cut(tensor, bucket_bytes):
            if bucket and size + part.nbytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(part)
            size += part.nbytes
    if bucket:
        yield bucket


def _cut(tensor: Tensor, max_bytes: int) -> Iterator[Tensor]:
    if tensor.nbytes <= max_bytes:
        yield tensor
    elif tensor.is_contiguous():
        size = max(1, max_bytes // tensor.element_size())
        flat = tensor.view(-1)
        yield from (flat[start : start + size] for start in range(0, flat.numel(), size))
    else:
        for row in tensor:
            yield from _cut(row, max_bytes)


def _broadcast(bucket: Sequence[Tensor], source: int, *, is_source: bool) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.broadcast(bucket[0].view(-1).view(torch.uint8), src=source)
        return
    # As bytes: backends differ in the types that they know, and a bucket may hold several.
    packed = torch.empty(sum(t.nbytes for t in bucket), dtype=torch.uint8, device=bucket[0].device)
    edges = list(itertools.accumulate((t.nbytes for t in bucket), initial=0))
    parts = [packed[a:b] for a, b in itertools.pairwise(edges)]
    if is_source:
        for part, tensor in zip(parts, bucket, strict=True):
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    dist.broadcast(packed, src=source)
    if not is_source:
        for part, tensor in zip(parts, bucket, strict=True):
            # A slice of bytes may start at any address; its clone is aligned.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
