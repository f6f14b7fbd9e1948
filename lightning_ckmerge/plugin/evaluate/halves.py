"""Split validation loaders into a search half and a confirmation half, batch by batch, on copies."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.search.problem import Half


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
        found: How many batches there were, where the loader had to be read through to know.
    """

    loader: Iterable[Any]
    limit: float
    fraction: float
    found: list[int] = field(default_factory=list, compare=False)

    def num_batches(self, half: Half) -> int | None:
        """Return how many batches a half has; ``None`` for a loader without a length that has not been read yet."""
        limit = self.found[0] if self.found else self.limit
        if math.isinf(limit):
            return None
        return sum(confirms(b, self.fraction) == (half == "confirm") for b in range(int(limit)))

    def part(self, half: Half) -> Part:
        """Return one half's batches.

        Only these are loaded, where the loader draws batches of indices from a sampler; else the others are skipped.
        """
        own: Any = private_copy(self.loader)
        if not can_select(own):
            return Part(_selected(own, half, self.limit, self.fraction, self.found))
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


class Batches:
    """Batches of one loader. Not a list, which Lightning would take for several loaders.

    Args:
        begin: Returns an iterator over them; called each time that they are iterated.
        length: How many there are; ``None``: that is not known. Where it is, Lightning knows the last batch without
            fetching ahead.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]], length: int | None) -> None:
        self._begin = begin
        self._length = length

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("these batches have no known length")
        return self._length


def stoppable(batches: Iterable[Any], stopped: Callable[[], bool]) -> Batches:
    """Return ``batches``, which end early once ``stopped()`` says so."""

    def until_stopped() -> Iterator[Any]:
        iterator = iter(batches)
        while not stopped():
            try:
                yield next(iterator)
            except StopIteration:
                return

    return Batches(until_stopped, known_length(batches))


def taken(batches: Iterable[Any], num_batches: int) -> Batches:
    """Return the next ``num_batches`` of ``batches``."""
    return Batches(lambda: itertools.islice(batches, num_batches), num_batches)


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


def known_length(loader: Any) -> int | None:
    """Return a loader's length, if it has one."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def limited(num_batches: float, limit: float | None) -> float:
    """Return how many of ``num_batches`` to use under a limit: a count (int), a share (float), or none.

    Raises:
        ConfigError: A share of an unknown number, unless it is all of them.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return num_batches
    if isinstance(limit, int):
        return min(num_batches, limit)
    if math.isinf(num_batches):
        raise ConfigError(
            f"a share of the batches needs loaders with a length, got a limit of {limit} for one without. Give "
            "`evaluation.limit_batches` as an int, which counts batches, or 1.0 for all of them."
        )
    return max(1, int(num_batches * limit)) if num_batches else 0


def length_of(loader: Any) -> float:
    """Return a loader's length, infinity if it has none."""
    length = known_length(loader)
    return math.inf if length is None else length


def _selected(loader: Iterable[Any], half: Half, limit: float, fraction: float, found: list[int]) -> Batches:
    """Return one half of the batches of a loader that must be read through."""

    def select(batches: Iterator[Any]) -> Iterator[Any]:
        num_read = 0
        for b, batch in enumerate(batches):
            if b >= limit:
                break
            num_read = b + 1
            if confirms(b, fraction) == (half == "confirm"):
                yield batch
        found[:] = [num_read]

    return Batches(lambda: select(iter(loader)), None)


def block_edges(num_batches: int, num_blocks: int) -> list[int]:
    """Return where at most ``num_blocks`` runs of nearly equal length begin, none empty, and where the last ends."""
    num_blocks = min(num_blocks, num_batches)
    return [num_batches * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else [0]


def block_sizes(num_batches: Sequence[int], fewest: Sequence[int], mode: str, num_blocks: int) -> list[list[int]]:
    """Return how many batches each block takes of each loader.

    Args:
        num_batches: Each loader's.
        fewest: The least that any rank has of each loader: all ranks have as many blocks.
        mode: How a ``CombinedLoader`` makes batches of them.
        num_blocks: Most blocks.
    """
    if mode == "sequential":
        edges = [block_edges(n, min(num_blocks, least)) for n, least in zip(num_batches, fewest, strict=True)]
    else:
        combine = min if mode == "min_size" else max
        steps = block_edges(combine(num_batches), min(num_blocks, combine(fewest)))
        # The others end, or begin anew, where the longest one goes on.
        edges = [[min(e, n) for e in steps] if mode == "max_size" else steps for n in num_batches]
    most = max(map(len, edges))
    padded = [[*e, *[e[-1]] * (most - len(e))] for e in edges]
    return [[e[i + 1] - e[i] for e in padded] for i in range(most - 1)]


def read_on(batches: Iterable[Any], *, cycle: bool) -> Iterator[Any]:
    """Yield batches, which are begun when the first one is asked for, and anew at their end if they cycle."""
    yield from batches
    while cycle:
        yield from batches
