"""The candidate under evaluation: in place while validation's batches run, whatever validation itself does to weights.

Hooks of a module, or an optimizer in them, may put other weights in when validation starts and take them out when it
ends: an average, Schedule-Free's evaluation point. What is scored would then not be what is published. So a candidate
is put back in place after the hooks that start validation, and what they had put there before the hooks that end it.
Weights that move in between end the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ckmerge.core.holders import parameters_of, persistent_buffers_of
from lightning_ckmerge.core.layout import as_real
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.flat_shards import flat_shards
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import FinalError

NUM_PROBED = 16
# Fewer different candidates may have one value by chance.
MIN_EQUAL = 3
# Of the weights' root mean square: what differs by less need not show in a loss of float32.
MIN_DIFFERENCE = 1e-3
# Ratios of smaller counts are values that different weights may well share.
MAX_COUNT = 512
SWAPPED = (
    "A validation hook swaps in other weights, such as an average. The search ignored them and scored each candidate "
    "as it is published; the latest weights are those that training works on."
)


class Candidate:
    """Weights that are scored.

    Args:
        module: The LightningModule.
        ownership: Knows this rank's tensors.
        comm: The ranks.

    Attributes:
        was_swapped: Whether hooks of the module have put other weights in its place.
    """

    def __init__(self, module: nn.Module, ownership: Ownership, comm: Comm) -> None:
        self._module = module
        self._ownership = ownership
        self._comm = comm
        self._norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        # These put their rows on a ball while they are read.
        embeddings = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        moving = {f"{n}.weight" for n, m in embeddings if m.max_norm is not None}
        # Not the frozen base of adapters, into which a module may fold a candidate's adapters to validate.
        self._probed = ownership.shapes.keys() - moving
        # The memory of shards is the strategy's business.
        self._memory = [] if ownership.is_sharded else list(_parameters(module))
        ownership.settle()
        # Beside shards, a strategy may leave parameters to each rank, and they drift apart.
        is_mixed = ownership.is_sharded and not any(True for _ in flat_shards(module))
        self._loose = [p for p in module.parameters() if not isinstance(p, DTensor) and p.numel()] if is_mixed else []
        self._write: Callable[[], None] = _nothing
        self._weights = torch.empty(0)
        self._statistics: list[Tensor] = []
        self._take_out: Callable[[], None] = _nothing
        self.was_swapped = False

    @property
    def weights(self) -> Tensor:
        """A sample of this rank's weights, as the candidate has them."""
        return self._weights

    def put(self, write: Callable[[], None]) -> None:
        """Put a candidate in.

        Args:
            write: Writes it into the live tensors, on all ranks; it may be called again.
        """
        self._write = write
        self._take_own_memory()
        self._write_all()
        self._weights = self._probe()
        self.keep_statistics()

    def keep_statistics(self) -> None:
        """Let BatchNorm's statistics, as they are now, belong to the candidate."""
        self._statistics = [s.clone() for s in self._live_statistics()]

    @torch.no_grad()
    def put_statistics(self) -> None:
        """Put BatchNorm's statistics back as they belong to the candidate."""
        for live, own in zip(self._live_statistics(), self._statistics, strict=True):
            live.copy_(own)
        self._agree_on_buffers()

    def _write_all(self) -> None:
        self._write()
        self._agree_on_buffers()

    @torch.no_grad()
    def _agree_on_buffers(self) -> None:
        """Give all ranks what an artifact holds of rank 0 alone: buffers, such as BatchNorm's, and loose parameters."""
        if self._comm.world_size == 1:
            return
        self._comm.exchange(None)  # nobody has failed
        buffers = [b for b in _persistent_buffers(self._module) if not isinstance(b, DTensor)]
        buffers += [p.detach() for p in self._loose]
        for kind in sorted({(str(b.device), str(b.dtype)) for b in buffers}):
            alike = [b for b in buffers if (str(b.device), str(b.dtype)) == kind]
            flat = torch.cat([b.reshape(-1) for b in alike])
            dist.broadcast(flat.view(torch.uint8), src=0)
            for buffer, values in zip(alike, torch.split(flat, [b.numel() for b in alike]), strict=True):
                buffer.copy_(values.view(buffer.shape))

    def started(self) -> None:
        """Put the candidate back in place, if hooks have put something else there since. A collective."""
        self._ownership.settle()
        are_same = map(_is_same, self._live_statistics(), self._statistics)
        moved = self._has_moved() or not all(are_same)
        if any(self._comm.exchange(moved)):
            self.was_swapped = True
            self._take_out = self._hold()
            self._put_back()

    def ran_batch(self) -> None:
        """Check that the candidate is in place still.

        Raises:
            FinalError: It is not.
        """
        self._ownership.settle()
        if self._has_moved():
            raise FinalError(
                "validation must not change weights while its batches run, got a change in `validation_step`, a batch "
                "hook or a forward hook. Change them in `on_validation_start`, whose weights a search ignores, or "
                "monitor a metric of the weights themselves."
            )

    def ending(self) -> None:
        """Check once more, and put back what hooks had put in its place, for the hooks that take it out."""
        self.ran_batch()
        self.keep_statistics()
        take_out, self._take_out = self._take_out, _nothing
        take_out()

    def close(self) -> None:
        """Leave the parameters in memory of their own."""
        self._take_own_memory()

    def _live_statistics(self) -> list[Tensor]:
        found = [s for m in self._norms for s in (m.running_mean, m.running_var, m.num_batches_tracked)]
        return [s for s in found if s is not None]

    def _has_moved(self) -> bool:
        return not _is_same(self._probe(), self._weights)

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Return some elements of each of this rank's parameters, exactly."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for owned in self._ownership.local():
            if owned.role == "parameter" and owned.name in self._probed and owned.tensor.numel():
                flat = _flat(owned.tensor.detach())
                chosen = flat[:: -(-flat.numel() // NUM_PROBED)]
                chosen = chosen.view(torch.uint8) if chosen.dtype.itemsize == 1 else chosen
                by_kind.setdefault((chosen.device, chosen.dtype), []).append(chosen)
        return torch.cat([torch.zeros(0).double(), *(torch.cat(p).double().cpu() for p in by_kind.values())])

    @torch.no_grad()
    def _put_back(self) -> None:
        buffers = [o.tensor for o in self._ownership.local() if o.role == "buffer"]
        # What hooks write to other buffers, such as counts that they begin anew, is no weight.
        written = [b.clone() for b in buffers]
        self._take_own_memory()
        self._write_all()
        for buffer, value in zip(buffers, written, strict=True):
            buffer.copy_(value)
        self.put_statistics()
        self._ownership.settle()

    def _take_own_memory(self) -> None:
        """Writing to another's, such as an average's, would change that."""
        for place, name, parameter, memory in self._memory:
            if place.get(name) is not parameter:
                place[name] = parameter
            if parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory

    @torch.no_grad()
    def _hold(self) -> Callable[[], None]:
        """Return what puts the weights back as they are now."""
        places = [(place, name, place.get(name)) for place, name, _, _ in self._memory]
        pointers = [(p, p.data) for _, _, p, own in self._memory if p.data_ptr() != own.data_ptr()]
        elsewhere = {id(p) for p, _ in pointers}
        local = [o.tensor for o in self._ownership.local() if o.role == "parameter"]
        values = [(t, t.detach().to("cpu", copy=True)) for t in local if id(t) not in elsewhere]

        @torch.no_grad()
        def take_out() -> None:
            for place, name, parameter in places:
                place[name] = parameter
            for parameter, memory in pointers:
                parameter.data = memory
            for tensor, value in values:
                tensor.copy_(value)

        return take_out


class EqualValues:
    """Notices that candidates with different weights have the same values: validation may not use the weights."""

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor
        self._scored: list[tuple[Tensor, Score]] = []
        self._differ = False

    def take(self, weights: Tensor, score: Score) -> None:
        """Take in a candidate's score on the search half.

        Args:
            weights: A sample of its weights.
            score: Its score.

        Raises:
            FinalError: Different candidates have one value on every batch, which is no ratio of small counts.
        """
        if self._differ or not all(_differ(weights, other) for other, _ in self._scored):
            return
        self._differ = any(not _are_equal(score, other) for _, other in self._scored)
        self._scored = [] if self._differ else [*self._scored, (weights, score)]
        if self._are_equal() and score.values_B is not None and not all(map(_is_ratio, score.values_B)):
            raise FinalError(f"{self._message()} Monitor a metric of the module's own weights.")

    def notes(self) -> list[str]:
        """Return what people should know of a metric that cannot tell candidates apart, be it a ratio of counts."""
        return [f"{self._message()} Or the metric is too coarse; then monitor a loss."] if self._are_equal() else []

    def _are_equal(self) -> bool:
        return len(self._scored) >= MIN_EQUAL

    def _message(self) -> str:
        return (
            f"All candidates score {self._monitor} {self._scored[0][1].value:.6g} on every batch: validation seems to "
            "use other weights, such as an average that the module or a callback keeps."
        )


def _parameters(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, nn.Parameter, Tensor]]:
    """Each parameter's place, name in it, object and memory."""
    for submodule in module.modules():
        own = parameters_of(submodule)
        for name, parameter in own.items():
            if parameter is not None and not isinstance(parameter, nn.parameter.UninitializedParameter):
                yield own, name, parameter, parameter.data


def _persistent_buffers(module: nn.Module) -> Iterator[Tensor]:
    for submodule in module.modules():
        yield from (buffer for _, buffer in persistent_buffers_of(submodule) if buffer.numel())


def _flat(tensor: Tensor) -> Tensor:
    """Return a view of all elements, in the order of memory where that has no holes."""
    real = as_real(tensor)
    order = sorted(range(real.dim()), key=real.stride, reverse=True)
    return real.permute(order).reshape(-1)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all()))


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two candidates differ by so much that a loss must show it."""
    if a.shape != b.shape:
        return True
    return bool(a.numel()) and bool((a - b).abs().max() > MIN_DIFFERENCE * b.square().mean().sqrt())


def _are_equal(a: Score, b: Score) -> bool:
    """Bit for bit, on the batches that both have seen."""
    return all(_have_one_value(x, y) for x, y in zip(a.objectives, b.objectives, strict=True))


def _have_one_value(a: Score, b: Score) -> bool:
    if a.values_B is None or b.values_B is None:
        return a.value == b.value
    return all(x == y for x, y in zip(a.values_B, b.values_B, strict=False))


def _is_ratio(value: float) -> bool:
    """Whether a value, which float32 may have rounded, is a ratio of small counts, as accuracies are."""
    return any(abs(value * n - round(value * n)) <= 1e-7 * abs(value * n) for n in range(1, MAX_COUNT))


def _nothing() -> None:
    return None
