"""Scores the live weights on one half of the run's validation batches.

Letters: B batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_ckmerge.config import EvaluationConfig
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.errors import ConfigError, MonitorError, SearchError
from lightning_ckmerge.plugin.evaluate.batch_cache import BatchCache, Randomness
from lightning_ckmerge.plugin.evaluate.batch_values import BatchRecorder
from lightning_ckmerge.plugin.evaluate.candidate import Candidate
from lightning_ckmerge.plugin.evaluate.halves import Split, block_sizes, length_of, limited, read_on, taken
from lightning_ckmerge.plugin.evaluate.lightning_loop import evaluate, find_loaders, mode_of, training_loader
from lightning_ckmerge.plugin.evaluate.weight_gradients import GradientRecorder, ProductRecorder
from lightning_ckmerge.search.problem import Half, KeepGoing

NUM_BLOCKS = 10


class Validation:
    """The run's validation, on the live weights.

    Args:
        trainer: The Trainer, inside ``fit``.
        callback: Ours; it is told of batches in place of the muted others.
        config: On what to evaluate.
        monitors: The metrics to score; the first one leads.
        comm: The ranks, which score their shares of the batches together.
        check_modes: Told, after an evaluation of the search half, which logged metrics are better the higher they are;
            raises where that speaks against the search's own direction.
        randomness: Where every evaluation starts alike; for batches that are kept.
        candidate: The live weights.
        own_loaders: What ``evaluation.dataloader`` returned; ``None``: the run's own validation loaders.
    """

    def __init__(
        self,
        trainer: Trainer,
        callback: Callback,
        config: EvaluationConfig,
        monitors: Sequence[str],
        comm: Comm,
        check_modes: Callable[[Mapping[str, bool]], None],
        randomness: Randomness,
        candidate: Candidate,
        own_loaders: Any = None,
    ) -> None:
        self._trainer = trainer
        self._callback = callback
        self._config = config
        self._monitors = monitors
        self._comm = comm
        self._check_modes = check_modes
        self._candidate = candidate
        self._module: LightningModule = trainer.lightning_module
        self._combined, loaders, limits = find_loaders(trainer, own_loaders)
        limits = [limited(n, config.limit_batches) for n in limits]
        if not any(limits):
            raise ConfigError(
                "a search needs validation batches, got none. Give the Trainer validation data (limit_val_batches > 0) "
                "or name a method that returns loaders in `evaluation.dataloader`."
            )
        if any(isinstance(loader, Iterator) for loader in loaders):
            raise ConfigError(
                "validation loaders must start anew each time they are iterated, got a generator, whose batches a "
                "search would take from the run. Give the Trainer an object with `__iter__`, such as a DataLoader."
            )
        fraction = config.confirm_fraction
        halves = [Split(d, n, fraction) for d, n in zip(loaders, limits, strict=True)]
        # One batch cannot be in both halves: on all ranks, the search gets it, and nothing can be confirmed.
        self._can_confirm = all(comm.exchange(max(limits) > 1 and any(s.num_batches("confirm") != 0 for s in halves)))
        self._splits = halves if self._can_confirm else [replace(s, fraction=0.0) for s in halves]
        self._batch_means: bool | None = None
        self._num_read: dict[Half, int] = {}
        self._cache = BatchCache(config.cache_bytes, randomness)

    @property
    def loaders(self) -> list[Any]:
        """The loaders that are read."""
        return [s.loader for s in self._splits] + (self._training_loaders if self._config.recalibrate_batches else [])

    def num_batches(self, half: Half) -> tuple[int, ...]:
        """Return the batches of each loader in a half; 0 for loaders of unknown length."""
        return tuple(s.num_batches(half) or 0 for s in self._splits)

    def can_confirm(self) -> bool:
        """Whether the confirmation half has any batches."""
        return self._can_confirm

    def run(self, half: Half, keep_going: Callable[[Sequence[float], Sequence[float]], bool] | None = None) -> Score:
        """Score the live weights.

        Raises:
            MonitorError: Validation does not log the metric.
            ConfigError: It logs a metric that speaks against its ``mode``.
            SearchError: It ended before the batches did.
        """
        parts = [s.part(half) for s in self._splits]
        batches = self._cache.wrap(half, [p.batches for p in parts])
        if half == "confirm" and self._batch_means is False:
            return self._run_in_blocks(batches, keep_going)
        recorder = BatchRecorder(self._monitors, [p.padding for p in parts], keep_going, self._comm)
        logged = self._evaluate(batches, recorder, self._combined)
        metrics = recorder.finish(logged)
        if not recorder.stopped:
            self._require_as_many(half, recorder.num_batches)
        self._check_modes(recorder.higher_is_better)
        values = self._monitored(metrics)
        if self._batch_means is None:
            # Now the loaders' lengths are known, if they were not.
            self._can_confirm &= all(self._comm.exchange(any(s.num_batches("confirm") != 0 for s in self._splits)))
        self._batch_means = all(v.values_B for v in recorder.of.values())
        first, *others = [
            Score(value=value, values_B=tuple(of.values_B) or None, sizes_B=tuple(of.sizes_B) or None)
            for value, of in zip(values, recorder.of.values(), strict=True)
        ]
        return replace(
            first,
            metrics=metrics,
            num_batches=recorder.num_batches,
            complete=not recorder.stopped,
            others=tuple(others),
        )

    def differentiate(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the derivatives of the monitored metric on the search half by ``parameters``, over all ranks.

        Raises:
            SearchError: The metric is not the mean of the loss that ``validation_step`` returns.
        """
        parts = [s.part("search") for s in self._splits]
        batches = self._cache.wrap("search", [p.batches for p in parts])
        recorder = GradientRecorder(self._monitors[0], [p.padding for p in parts], self._comm, parameters)
        step = recorder.watching(self._module.validation_step)
        recorder.finish(self._evaluate(batches, recorder, self._combined, step=step))
        return recorder.gradients()

    def hessian_product(
        self, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], half: Half, num_batches: int
    ) -> list[Tensor]:
        """Return the product of the monitored metric's Hessian by ``parameters`` with a vector.

        Args:
            parameters: All of them need gradients.
            direction: The vector, one tensor a parameter.
            half: On whose batches.
            num_batches: How many of the first of them.

        Raises:
            SearchError: The metric is not the mean of the loss that ``validation_step`` returns.
        """
        parts = [s.part(half) for s in self._splits]
        batches = self._cache.wrap(half, [p.batches for p in parts])
        padding = [p.padding for p in parts]
        recorder = ProductRecorder(self._monitors[0], padding, self._comm, parameters, direction, num_batches)
        step = recorder.watching(self._module.validation_step)
        recorder.finish(self._evaluate(batches, recorder, self._combined, step=step))
        return recorder.gradients()

    def visit(self, half: Half, take: Callable[[Any], None]) -> None:
        """Show each batch of one half, on its device, to ``take``, inside ``validation_step``, which runs after it.

        Hooks that end validation find what they expect, and ``take`` computes in the precision of validation.
        """
        own = self._module.validation_step

        @functools.wraps(own)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            take(batch)
            return own(batch, *args, **kwargs)

        parts = [s.part(half) for s in self._splits]
        batches = self._cache.wrap(half, [p.batches for p in parts])
        recorder = BatchRecorder([], [p.padding for p in parts], None, self._comm)
        recorder.finish(self._evaluate(batches, recorder, self._combined, step=step))

    def recalibrate(self, batches: int) -> None:
        """Re-estimate BatchNorm statistics of the live weights on the first ``batches`` training batches.

        Frozen layers keep theirs: training used them as they are.
        """
        norms = [m for m in self._module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
        norms = [m for m in norms if not m.affine or m.weight.requires_grad]
        if not norms:
            return
        momenta = [m.momentum for m in norms]

        def estimate() -> None:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
                norm.train()

        limits = [limited(length_of(d), batches) for d in self._training_loaders]
        splits = [Split(d, n, 0.0) for d, n in zip(self._training_loaders, limits, strict=True)]
        # Records nothing, but lets ranks agree.
        recorder = BatchRecorder([], [frozenset()] * len(splits), None, self._comm)
        try:
            parts = self._cache.wrap("train", [s.part("search").batches for s in splits])
            training = training_loader(self._trainer)
            recorder.finish(self._evaluate(parts, recorder, training, on_start=estimate))
            # Hooks that end validation may have put their own in place.
            self._candidate.put_statistics()
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    @property
    def _training_loaders(self) -> list[Any]:
        return list(training_loader(self._trainer).flattened)

    def _evaluate(
        self, parts: Sequence[Iterable[Any]], recorder: BatchRecorder, like: Any, **options: Callable[..., Any]
    ) -> dict[str, float]:
        return evaluate(self._trainer, self._callback, parts, recorder, like, self._candidate, **options)

    def _require_as_many(self, half: Half, num_batches: int) -> None:
        """Raise unless a candidate has been scored on as many batches as the one before: fewer may be easier ones."""
        expected = self._num_read.setdefault(half, num_batches)
        if num_batches != expected:
            raise SearchError(
                f"all candidates must be scored on the same batches, got {num_batches} of one and {expected} of "
                "another. Loaders must yield as many each time, and `validation_step` must not raise `StopIteration`."
            )

    def _run_in_blocks(self, parts: Sequence[Iterable[Any]], keep_going: KeepGoing | None) -> Score:
        """A metric over all batches at once has no paired values: score it on blocks of batches instead."""
        mode = mode_of(self._combined)
        counts = [s.num_batches("confirm") or 0 for s in self._splits]
        # Every rank has as many blocks, none of them empty: a metric may need all ranks to be computed.
        fewest = [min(lengths) for lengths in zip(*self._comm.exchange(counts), strict=True)]
        streams = [read_on(p, cycle=mode == "max_size_cycle" and n > 0) for p, n in zip(parts, counts, strict=True)]
        rows: list[tuple[int, dict[str, float]]] = []
        for sizes in block_sizes(counts, fewest, mode, NUM_BLOCKS):
            recorder = BatchRecorder(self._monitors, [frozenset()] * len(sizes), None, self._comm)
            block = [taken(stream, n) for stream, n in zip(streams, sizes, strict=True)]
            logged = self._evaluate(block, recorder, self._combined)
            rows.append((sum(self._comm.exchange(sum(sizes))), recorder.finish(logged)))
            if keep_going is not None and not keep_going([self._monitored(rows[0][1])[0]], [float(rows[0][0])]):
                break
        # A loader with few batches is in few of the blocks.
        names = {name for _, metrics in rows for name in metrics}
        metrics = {name: _mean([(n, m[name]) for n, m in rows if name in m]) for name in sorted(names)}
        first, *others = [
            Score(
                value=value,
                values_B=tuple(m[monitor] for _, m in rows if monitor in m),
                sizes_B=tuple(float(n) for n, m in rows if monitor in m),
            )
            for monitor, value in zip(self._monitors, self._monitored(metrics), strict=True)
        ]
        return replace(first, metrics=metrics, num_batches=sum(n for n, _ in rows), others=tuple(others))

    def _monitored(self, metrics: dict[str, float]) -> list[float]:
        # What the search half logs is lacking for want of batches.
        self._can_confirm &= self._batch_means is None or metrics.keys() >= {*self._monitors}
        require_logged(self._monitors, metrics)
        return [metrics[monitor] for monitor in self._monitors]


def require_logged(monitors: Iterable[str], logged: Collection[str]) -> None:
    """Raise ``MonitorError`` unless validation logs each of ``monitors``."""
    for monitor in monitors:
        if monitor not in logged:
            names = ", ".join(sorted(logged)) or "nothing: call `self.log` in `validation_step`"
            raise MonitorError(
                f"`monitor` must be a metric that validation logs, got {monitor!r}. Logged are: {names}."
            )


def _mean(rows: Sequence[tuple[int, float]]) -> float:
    return math.fsum(n * value for n, value in rows) / sum(n for n, _ in rows)
