"""Which tensors this rank keeps and merges, and how a merge becomes visible on the others.

Three kinds of tensors:

- Shards (``DTensor``: FSDP2, tensor parallelism, both; flat shards of FSDP1): a rank owns its local part. Merges are
  linear, so they need no communication.
- Parameters that every rank holds (DDP): the bytes are dealt out evenly, cut along dimension 0; owners merge, and
  broadcast the result in buckets.
- Buffers outside shards: each rank's own, since ranks need not agree on them (BatchNorm statistics).

No rank owns the frozen base of PEFT's adapters: it stays as it is, so snapshots and merges do without it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_ckmerge.core.adapters import frozen_base
from lightning_ckmerge.core.holders import buffers_of, parameters_of, persistent_buffers_of
from lightning_ckmerge.core.layout import OwnedTensor, Role, as_real, is_dense
from lightning_ckmerge.core.specs import Box, part_name, whole
from lightning_ckmerge.core.wording import quoted
from lightning_ckmerge.distributed.buckets import make_buckets
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.flat_shards import FlatShard, clean_name, flat_shards
from lightning_ckmerge.errors import FinalError, SnapshotError, UnsupportedError

DEFAULT_BUCKET_BYTES = 64 << 20
# BatchNorm's own counters: in every second model, but not weights.
COUNTER_NAME = "num_batches_tracked"


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


class Place(NamedTuple):
    """Where a module keeps one tensor: ``holder[key]``, a submodule's parameters or buffers."""

    name: str
    role: Role
    holder: MutableMapping[str, Any]
    key: str
    submodule: nn.Module


class Ownership:
    """The floating parameters and persistent buffers of a module, tied ones once, and who owns them.

    Integer and boolean entries are not among them, nor tensors that cannot be averaged, such as sparse and quantised
    ones: a merge leaves them as the latest weights have them. Places are kept instead of tensors, since a module may
    put a new tensor in a buffer's place.

    Args:
        module: The LightningModule; names are as in its ``state_dict``.
        comm: The ranks.
        bucket_bytes: Most extra memory that ``publish`` takes.
        changing: Names of buffers that go on changing their shapes, and are left out too.

    Attributes:
        left_out: Names of the entries that are not averaged, but for BatchNorm's counters.
        not_dense: Entries of ``left_out``, such as sparse ones, that a file of weights does not hold either.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Comm,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        changing: Collection[str] = (),
    ) -> None:
        self._changing = frozenset(changing)
        self._module = module
        self._comm = comm
        self._bucket_bytes = bucket_bytes
        self._fsdp2 = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self.settle()
        self._places, self.left_out = _find_places(module, self._changing)
        self.not_dense = sorted(
            place.name for place in _entries(module) if not is_dense(local_part(place.holder[place.key]))
        )
        self._kinds = [_kind(place.holder[place.key]) for place in self._places]
        base = {id(parameter) for parameter in frozen_base(module).values()}
        self._frozen = {p.name for p in self._places if id(p.holder[p.key]) in base}
        flat = {s.name: s for s in flat_shards(module)}
        self._flat_shapes = {s.name: s.shape for s in flat.values()}
        self.is_sharded = bool(flat) or any(isinstance(p.holder[p.key], DTensor) for p in self._places)
        self.is_replicated = comm.world_size > 1 and not self.is_sharded
        self._pieces = [
            piece
            for name, role, holder, key, _ in self._places
            if name not in self._frozen and not (self.is_replicated and role == "parameter")
            for piece in _own_part(name, role, holder[key], flat.get(name))
        ]
        self._shares: list[list[Piece]] = []
        if self.is_replicated:
            self._shares = deal_out(self._replicated(), comm.world_size)
            self._pieces += self._shares[comm.rank]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that any rank owns a part of, by name, with its whole shape as it is stored."""
        shapes = {n: (*t.shape, 2) if t.is_complex() else tuple(t.shape) for n, _, t in self._tensors()}
        shapes.update(self._flat_shapes)
        return {n: shape for n, shape in shapes.items() if math.prod(shape) and n not in self._frozen}

    def changes(self, *, everywhere: bool) -> list[str]:
        """Return the names of tensors that have changed: gone, of another shape, precision or device.

        Args:
            everywhere: Look at the whole module, and find tensors that are new, tied, or in another submodule, too.
        """
        changed = [
            place.name
            for place, kind in zip(self._places, self._kinds, strict=True)
            if _kind(place.holder.get(place.key)) != kind
        ]
        if changed or not everywhere:
            return changed
        before = {place.name: place for place in self._places}
        now = {place.name: place for place in _find_places(self._module, self._changing)[0]}
        moved = [n for n in before.keys() & now.keys() if not _same(before[n], now[n])]
        return sorted({*moved, *(before.keys() ^ now.keys())})

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is a buffer of a module, and no parameter."""
        return any(place.name == name and place.role == "buffer" for place in self._places)

    def check_alike(self) -> None:
        """Raise ``SnapshotError``, on all ranks, if their modules' tensors differ. A collective."""
        tensors = {p.name: p.holder[p.key] for p in _entries(self._module) if p.name not in self._changing}
        shapes = {n: tuple(t.shape) if is_dense(local_part(t)) else () for n, t in tensors.items()} | self._flat_shapes
        kinds = {n: (str(t.dtype), shapes[n]) for n, t in tensors.items()}
        first, *others = self._comm.exchange(kinds)
        names = {n for other in others for n in first.keys() | other.keys() if other.get(n) != first.get(n)}
        if names:
            raise SnapshotError(
                f"a model must have the same tensors on all ranks, got {quoted(sorted(names))} that differ. Change it "
                "on all of them."
            )

    def check_frozen(self) -> None:
        """Raise ``FinalError`` if a base that snapshots do without is being trained."""
        thawed = [n for n, _, t in self._tensors() if n in self._frozen and t.requires_grad]
        if thawed:
            raise FinalError(
                f"an adapter's base must stay frozen during `fit`, got {len(thawed)} trainable tensors, such as "
                f"{thawed[0]!r}, that no snapshot holds. Unfreeze them before `fit`."
            )

    def settle(self) -> None:
        """Bring FSDP2's shards into place: after a forward pass without gradients the root's stay gathered."""
        for module in self._fsdp2:
            module.reshard()

    def local(self) -> list[OwnedTensor]:
        """Return all tensors, a frozen base's too, or this rank's shards of them, as they are now."""
        return [OwnedTensor(name=n, role=r, tensor=local_part(t)) for n, r, t in self._tensors()]

    def others(self) -> list[OwnedTensor]:
        """Return the entries that are not averaged and hold values all the same, such as counters and masks.

        Not among them are the frozen base of adapters, shards, and what no file of weights holds.
        """
        averaged = {id(place.holder.get(place.key)) for place in self._places}
        base = {id(parameter) for parameter in frozen_base(self._module).values()}
        found: dict[int, OwnedTensor] = {}
        for place in _entries(self._module):
            tensor = place.holder[place.key]
            is_plain = not isinstance(tensor, DTensor) and is_dense(tensor) and not tensor.is_meta and tensor.numel()
            if is_plain and id(tensor) not in averaged | base:
                found.setdefault(id(tensor), OwnedTensor(name=place.name, role=place.role, tensor=tensor))
        return list(found.values())

    def owned(self) -> list[OwnedTensor]:
        """Return the parts that this rank keeps and merges, as views of the live tensors.

        Raises:
            SnapshotError: The model has changed.
        """
        if changed := self.changes(everywhere=False):
            raise SnapshotError(
                f"a model must keep its tensors while its snapshots are merged, got {quoted(changed)} changed. Change "
                "it between searches."
            )
        return self.select({o.name: o.tensor for o in self.local()})

    def select(self, tensors: Mapping[str, Tensor]) -> list[OwnedTensor]:
        """Return the owned parts of ``tensors``, which are live ones or copies, by the names of ``local``."""
        return [OwnedTensor(name=p.part, role=p.role, tensor=p.of(tensors[p.name])) for p in self._pieces]

    @torch.no_grad()
    def publish(self) -> None:
        """Make the owners' values visible on all ranks. No tensor is sent where nothing is held twice.

        Raises:
            PeerError: A rank has failed since the ranks last talked; nothing is published.
        """
        if not self.is_replicated:
            return
        tensors = {name: tensor for name, _, tensor in self._tensors()}
        buckets = [
            bucket
            for rank, pieces in enumerate(self._shares)
            for bucket in make_buckets(rank, [as_real(p.of(tensors[p.name])) for p in pieces], self._bucket_bytes)
        ]
        extra_bytes = max((b.extra_bytes for b in buckets), default=0)
        device = next(iter(tensors.values())).device if extra_bytes else None
        memory = torch.empty(extra_bytes, dtype=torch.uint8, device=device)
        # No rank has failed, and the rest needs no more memory: it will not be left half done.
        self._comm.exchange(None)
        for bucket in buckets:
            bucket.broadcast(memory, rank=self._comm.rank)

    def _tensors(self) -> Iterator[tuple[str, Role, Tensor]]:
        for name, role, holder, key, _ in self._places:
            tensor = holder.get(key)
            if tensor is not None:
                yield name, role, tensor

    def _replicated(self) -> list[tuple[str, Tensor]]:
        return [(n, t) for n, role, t in self._tensors() if role == "parameter" and n not in self._frozen]


def local_part(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_box(name: str, tensor: DTensor) -> Box:
    """Return which part of the whole tensor this rank holds.

    Raises:
        UnsupportedError: It is not one box.
    """
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != tuple(tensor.to_local().shape):
        raise UnsupportedError(
            f"a shard must be one box of the whole tensor, got {tensor.placements} for {name!r}. "
            "Use FSDP2 or tensor parallelism along other dimensions."
        )
    return Box(tuple((o, o + n) for o, n in zip(offset, shape, strict=True)))


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
        part = part_name(name, shard_box(name, tensor), tensor.shape)
    elif flat is not None:
        part = part_name(name, Box(((flat.start, flat.stop),)), (math.prod(flat.shape),))
    return [Piece(name=name, role=role, rows=None, part=part)]


def _find_places(module: nn.Module, changing: Collection[str]) -> tuple[list[Place], list[str]]:
    """Return the places of the tensors that can be averaged, tied ones once, and the names of those that cannot."""
    places, left_out = [], []
    seen: set[int] = set()
    for place in _entries(module):
        tensor = place.holder[place.key]
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if _is_averaged(tensor) and place.name not in changing:
            places.append(place)
        elif place.key != COUNTER_NAME:
            left_out.append(place.name)
    # A model that lies on `meta` as a whole is being planned; a part of one is unused, and has no values.
    on_meta = [p for p in places if p.holder[p.key].is_meta]
    if 0 < len(on_meta) < len(places):
        places = [p for p in places if not p.holder[p.key].is_meta]
        left_out += [p.name for p in on_meta]
    return places, left_out


def _entries(module: nn.Module) -> Iterator[Place]:
    for path, submodule in module.named_modules():
        prefix = clean_name(f"{path}.") if path else ""
        parameters = parameters_of(submodule)
        holders: list[tuple[Role, MutableMapping[str, Any], list[str]]] = [
            ("parameter", parameters, [n for n, p in parameters.items() if p is not None]),
            ("buffer", buffers_of(submodule), [n for n, _ in persistent_buffers_of(submodule)]),
        ]
        for role, holder, keys in holders:
            yield from (Place(f"{prefix}{key}", role, holder, key, submodule) for key in keys)


def _is_averaged(tensor: Tensor) -> bool:
    return is_dense(local_part(tensor)) and (tensor.is_floating_point() or tensor.is_complex())


def _kind(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return the layout that a snapshot, and this rank's part of it, must match."""
    if tensor is None or not _is_averaged(tensor):
        return None
    return tensor.dtype, tensor.device, tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None


def _same(before: Place, now: Place) -> bool:
    return before.submodule is now.submodule and (before.role, before.key) == (now.role, now.key)
