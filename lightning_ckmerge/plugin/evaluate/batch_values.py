"""One evaluation's values, batch by batch, over all ranks.

Letters: B batches; with several ranks, batch b is what all of them evaluate b-th.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_ckmerge.distributed.comm import Comm


@dataclass
class BatchValues:
    """One metric's values by batch, over all ranks; none if it is no mean over batches."""

    values_B: list[float] = field(default_factory=list)
    sizes_B: list[float] = field(default_factory=list)
    pending: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def pool(self, pending_of_ranks: Sequence[Sequence[tuple[float, float]]]) -> None:
        """Put the ranks' batches together."""
        for parts in itertools.zip_longest(*pending_of_ranks, fillvalue=(0.0, 0.0)):
            size = math.fsum(n for _, n in parts)
            if size:
                self.values_B.append(math.fsum(total for total, _ in parts) / size)
                self.sizes_B.append(size)


class BatchRecorder:
    """Takes each batch's sums, and finds mean values by batch and in all.

    Sums and counts are float64, and padding does not count: the result does not depend on how samples are dealt out.

    Ranks talk before each batch and at the end of each loader, so that none begins a batch, or reduces its metrics,
    with one that has failed.

    Args:
        monitors: The metrics whose batches are kept.
        padding: For each loader the places of batches that do not count.
        keep_going: Asked with the first metric's values and sizes of the batches so far; ``False`` stops the
            evaluation.
        comm: The ranks.
    """

    def __init__(
        self,
        monitors: Sequence[str],
        padding: Sequence[Collection[int]],
        keep_going: Callable[[Sequence[float], Sequence[float]], bool] | None,
        comm: Comm,
    ) -> None:
        self._padding = padding
        self._keep_going = keep_going
        self._comm = comm
        self._before: dict[str, tuple[float, float]] = {}
        self._totals: dict[str, tuple[float, float]] = {}
        self.of = {monitor: BatchValues() for monitor in monitors}
        self.higher_is_better: dict[str, bool] = {}  # of logged metric objects that say so
        self.num_batches = 0
        self.stopped = False
        self._ended: float = 0  # loaders that this rank has read to their end

    def begin_batch(self, *_: object) -> None:
        """Agree with the other ranks to go on."""
        if self._comm.world_size > 1:
            self._pool()

    def take(self, sums: Mapping[str, tuple[float, float]], *, dataloader_idx: int, batch_idx: int) -> None:
        """Take in a batch.

        Args:
            sums: Metric -> ``sum(value * size)`` and ``sum(size)`` over this batch and all before it.
            dataloader_idx: Its loader.
            batch_idx: Its place in the loader.
        """
        self.num_batches += 1
        counts = batch_idx not in self._padding[dataloader_idx]
        for name, (total, size) in sums.items():
            total_before, size_before = self._before.get(name, (0.0, 0.0))
            if size == size_before:  # another loader's metric
                continue
            batch = (total - total_before, size - size_before) if counts else (0.0, 0.0)
            self._before[name] = (total, size)
            so_far = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (so_far[0] + batch[0], so_far[1] + batch[1])
            if name in self.of:
                self._keep(name, *batch)
        if self._comm.world_size == 1:
            self._pool()

    def end_loader(self) -> None:
        """Wait until every rank has read a loader to its end: one that has fewer batches goes on answering."""
        self._wait_for(self._ended + 1)

    def finish(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return all metrics over all ranks.

        Args:
            logged: What this rank's validation logged.
        """
        self._wait_for(math.inf)
        everywhere = self._comm.exchange((dict(logged), self._totals))
        # A rank may lack the batches that a metric is logged on.
        names = dict.fromkeys(name for logged, _ in everywhere for name in logged)
        return {name: _overall(name, everywhere) for name in names}

    def _keep(self, monitor: str, total: float, size: float) -> None:
        """Take in a monitored metric's ``sum(value * size)`` and ``sum(size)`` of one batch."""
        self.of[monitor].pending.append((total, size))

    def _wait_for(self, ended: float) -> None:
        self._ended = ended
        while self._pool() < ended:
            pass

    def _pool(self) -> float:
        """Put the ranks' batches together, and return how many loaders all of them have ended."""
        answers = self._comm.exchange(([v.pending for v in self.of.values()], self._ended))
        for i, values in enumerate(self.of.values()):
            values.pending = []
            values.pool([pending[i] for pending, _ in answers])
        if self._keep_going is not None:
            first = next(iter(self.of.values()))
            if first.values_B and not self._keep_going(first.values_B, first.sizes_B):
                self.stopped = True
        return min(ended for _, ended in answers)


def _overall(name: str, everywhere: Sequence[tuple[dict[str, float], dict[str, tuple[float, float]]]]) -> float:
    """A mean over samples where that is known, else the mean of what the ranks logged."""
    totals = [totals[name] for _, totals in everywhere if name in totals]
    size = math.fsum(n for _, n in totals)
    if size:
        return math.fsum(total for total, _ in totals) / size
    values = [logged[name] for logged, _ in everywhere if name in logged]
    return math.fsum(values) / len(values)
