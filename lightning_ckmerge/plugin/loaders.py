"""Split validation loaders into a search half and a confirmation half, batch by batch, on copies."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

Half = Literal["search", "confirm"]


def confirms(batch: int, fraction: float) -> bool:
    """Whether a batch, counted from 0, belongs to the confirmation half: evenly interleaved, the first one never."""
    return math.floor((batch + 1) * fraction) > math.floor(batch * fraction)


@dataclass(frozen=True)
class Split:
    """One loader's batches in two halves.

    Args:
        loader: The run's own loader; it is never iterated itself where that could change it.
        limit: Batches to use; may be infinite for a loader without a length.
        fraction: Share of the confirmation half. 0: all batches are for the search.
    """

    loader: Iterable[Any]
    limit: float
    fraction: float

    def num_batches(self, half: Half) -> int | None:
        """Return how many batches a half has; ``None`` for a loader without a length."""
        if math.isinf(self.limit):
            return None
        return sum(confirms(b, self.fraction) == (half == "confirm") for b in range(int(self.limit)))

    def part(self, half: Half) -> Part:
        """Return one half's batches.

        Only these are loaded, where the loader draws batches of indices from a sampler; else the others are skipped.
        """
        own: Any = private_copy(self.loader)
        if not can_select(own):
            return Part(_Selected(own, half, self.limit, self.fraction))
        attribute = "sampler" if own.batch_sampler is None else "batch_sampler"
        drawn = itertools.islice(getattr(own, attribute), None if math.isinf(self.limit) else int(self.limit))
        batches = without_padding(list(drawn), own.sampler)
        chosen = [b for i, b in enumerate(batches) if confirms(i, self.fraction) == (half == "confirm")]
        # DataLoader refuses to have its sampler set after it was built; this copy has not been used yet.
        own.__dict__[attribute] = [indices for indices, _ in chosen]
        return Part(own, frozenset(i for i, (_, counts) in enumerate(chosen) if not counts))


@dataclass(frozen=True)
class Part:
    """Batches of one loader.

    Args:
        batches: The batches.
        padding: Places of batches that repeat other ranks' samples. They are run, since a sharded model's forward pass
            needs all ranks, and do not count.
    """

    batches: Iterable[Any]
    padding: frozenset[int] = frozenset()


def without_padding(batches: Sequence[Any], sampler: Any) -> list[tuple[Any, bool]]:
    """Return batches of indices without the samples that only fill up a rank's share, and whether any is left.

    A batch of nothing else keeps one of them.

    Args:
        batches: Lists of indices, or single indices, in the sampler's order.
        sampler: Where they were drawn from. Only a ``DistributedSampler`` adds samples, at the end of its order.
    """
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return [(indices, True) for indices in batches]
    own = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
    left, result = len(own), list[tuple[Any, bool]]()
    for indices in batches:
        size = len(indices) if isinstance(indices, (list, tuple)) else 1
        counts = left > 0
        whole = left >= size or size == 1
        result.append((indices if whole else indices[: max(1, left)], counts))
        left -= size
    return result


class Stoppable:
    """Batches of one loader until ``stopped()``; sized if the loader is. Not a list: Lightning would flatten that."""

    def __init__(self, batches: Iterable[Any], stopped: Callable[[], bool]) -> None:
        self._batches = batches
        self._stopped = stopped

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        while not self._stopped():
            try:
                yield next(iterator)
            except StopIteration:
                return


class SizedStoppable(Stoppable):
    """The same with a length, so that Lightning knows the last batch without fetching ahead."""

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


def stoppable(batches: Iterable[Any], stopped: Callable[[], bool]) -> Stoppable:
    """Return ``batches``, which end early once ``stopped()`` says so."""
    return (SizedStoppable if has_length(batches) else Stoppable)(batches, stopped)


def private_copy(loader: Any) -> Any:
    """Return a loader over the same dataset that shares no worker and no iterator with ``loader``.

    Persistent workers keep random state of their own: an extra pass through them would change the run's later batches.
    """
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    own.__dict__.update(_iterator=None, persistent_workers=False)
    return own


def can_select(loader: Any) -> bool:
    """Whether single batches can be loaded without the ones before them."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def has_length(loader: Any) -> bool:
    """Whether ``len(loader)`` works."""
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def limited(num_batches: float, limit: float | None) -> float:
    """Return how many of ``num_batches`` to use under a limit: a count (int), a share (float), or none."""
    if limit is None:
        return num_batches
    if isinstance(limit, int) or math.isinf(num_batches):
        return min(num_batches, limit)
    return max(1, int(num_batches * limit)) if num_batches else 0


def length_of(loader: Any) -> float:
    """Return a loader's length, infinity if it has none."""
    return len(loader) if has_length(loader) else math.inf


class _Selected:
    """One half of the batches of a loader that must be read through."""

    def __init__(self, loader: Iterable[Any], half: Half, limit: float, fraction: float) -> None:
        self._loader = loader
        self._half = half
        self._limit = limit
        self._fraction = fraction

    def __iter__(self) -> Iterator[Any]:
        return self._select(iter(self._loader))

    def _select(self, batches: Iterator[Any]) -> Iterator[Any]:
        for b, batch in enumerate(batches):
            if b >= self._limit:
                return
            if confirms(b, self._fraction) == (self._half == "confirm"):
                yield batch


def blocks(batches: Iterable[Any], num_blocks: int) -> list[Sequence[Any]]:
    """Return the batches in at most ``num_blocks`` consecutive runs of nearly equal length, none empty."""
    fetched = list(batches)
    num_blocks = min(num_blocks, len(fetched))
    edges = [len(fetched) * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else [0]
    return [fetched[a:b] for a, b in itertools.pairwise(edges)]
