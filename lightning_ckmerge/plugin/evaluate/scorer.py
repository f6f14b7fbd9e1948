"""The bench of a search inside ``fit``: the run stands still, and candidates take the place of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.errors import ConfigError, TraceError
from lightning_ckmerge.pipeline import Bench
from lightning_ckmerge.plugin.evaluate.candidate import SWAPPED, Candidate, EqualValues
from lightning_ckmerge.plugin.evaluate.coefficient_gradients import Derivatives
from lightning_ckmerge.plugin.evaluate.validation import Validation
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.rank.peft_adapters import Load
from lightning_ckmerge.plugin.restore.interruptions import InterruptibleComm
from lightning_ckmerge.plugin.restore.standstill import Standstill

# Of what a search cannot put back.
MAX_NAMED = 5


class BenchMaker:
    """Makes the benches of one ``fit``, one a search.

    Args:
        settings: What the callback was asked for.
        callback: Told of batches in place of the muted others.
        trainer: The Trainer.
        model: What candidates are merged into.
        interruption: Why a search must end, asked at each batch; ``None`` while it may go on.
    """

    def __init__(
        self,
        settings: MergeSettings,
        callback: Callback,
        trainer: Trainer,
        model: RankModel,
        interruption: Callable[[], str | None],
    ) -> None:
        self._settings = settings
        self._callback = callback
        self._trainer = trainer
        self._model = model
        self._interruption = interruption
        self._own_loaders: Any = None
        self._is_proven = False
        self._has_said = False
        self._traces: list[str] = []

    @contextlib.contextmanager
    def standing_still(self, find_snapshots: Callable[[], Sequence[Snapshot]], step: int) -> Iterator[Bench]:
        """Yield a bench; the weights and all else are the same afterwards.

        Args:
            find_snapshots: Returns what to merge, beside the latest weights.
            step: The latest weights' own.
        """
        model = self._model
        with (
            self._watching(Standstill(self._trainer, model.ownership, model.local_layout)) as standstill,
            contextlib.closing(Candidate(self._trainer.lightning_module, model.ownership, model.comm)) as candidate,
        ):
            validation = self._make_validation(standstill, candidate)
            standstill.watch("loaders", validation.loaders)
            latest = model.select(standstill.weights)
            merger = Merger(model.layout, model.live, find_snapshots(), latest, step, model.space.group_of)
            with model.merging(merger) as merge:
                loader = self._make_loader(candidate, merge, validation, len(merger.snapshots_K))
                derivatives = Derivatives(model, merger, loader.load, standstill, validation)
                equal = EqualValues(self._settings.objectives[0].monitor)
                yield Bench(
                    merger=merger,
                    validation=validation,
                    begin=partial(self._begin, standstill, count()),
                    load=loader.load,
                    reload=loader.reload,
                    scored=lambda score: equal.take(candidate.weights, score),
                    notes=lambda: [*[SWAPPED] * candidate.was_swapped, *equal.notes()],
                    tolerance=_tolerance(self._trainer),
                    differentiate=derivatives,
                    bend=derivatives.bend,
                )

    def check_traces(self) -> None:
        """Raise ``TraceError``, on all ranks, if a search has left a trace on any. A collective."""
        self._check(self._traces)

    def _check(self, own: Sequence[str]) -> None:
        traces = list(dict.fromkeys(trace for traces in self._model.comm.exchange(list(own)) for trace in traces))
        if traces:
            more = f" and {len(traces) - MAX_NAMED} more" if len(traces) > MAX_NAMED else ""
            raise TraceError(
                f"a search must leave the run as it was, got other values of {', '.join(traces[:MAX_NAMED])}{more} "
                "after all had been put back. Keep validation from changing them. Searching has ended for this run."
            )

    @contextlib.contextmanager
    def _watching(self, standstill: Standstill) -> Iterator[Standstill]:
        try:
            with standstill:
                yield standstill
                self._say_left_out(standstill.left_out)
        finally:
            self._traces += standstill.traces

    def _begin(self, standstill: Standstill, num_begun: Iterator[int]) -> None:
        """Begin an evaluation. The run's first one, which is of the latest weights, has to have left no trace."""
        if next(num_begun) == 1 and not self._is_proven:
            standstill.prove()
            self._check(standstill.traces)
            self._is_proven = True
        standstill.begin()

    def _say_left_out(self, left_out: Mapping[str, str]) -> None:
        """Say once what validation must not change, since a search cannot look after it."""
        if left_out and not self._has_said:
            self._has_said = True
            named = "; ".join(f"{where}: {reason}" for where, reason in islice(left_out.items(), MAX_NAMED))
            more = f"; and {len(left_out) - MAX_NAMED} more" if len(left_out) > MAX_NAMED else ""
            rank_zero_info(f"Should validation change these, a search does not put them back: {named}{more}.")

    def _make_validation(self, standstill: Standstill, candidate: Candidate) -> Validation:
        config = self._settings.evaluation
        if config.dataloader is not None and self._own_loaders is None:
            self._own_loaders = self._find_loaders(config.dataloader)
        comm = InterruptibleComm(self._model.comm, self._interruption)
        told = (self._settings.monitors, comm, self._settings.check_modes)
        return Validation(self._trainer, self._callback, config, *told, standstill, candidate, self._own_loaders)

    def _make_loader(
        self, candidate: Candidate, merge: Load, validation: Validation, num_snapshots: int
    ) -> CandidateLoader:
        latest_K = [0.0] * (num_snapshots - 1) + [1.0]
        num_batches = self._settings.evaluation.recalibrate_batches
        return CandidateLoader(candidate, merge, validation, latest_K, num_batches)

    def _find_loaders(self, name: str) -> Any:
        trainer = self._trainer
        owners = [o for o in (getattr(trainer, "datamodule", None), trainer.lightning_module) if hasattr(o, name)]
        if not owners:
            raise ConfigError(
                f"`evaluation.dataloader` must name a method of the datamodule or module, got {name!r}. "
                "Define it, or leave the argument out to use the run's validation loaders."
            )
        return getattr(owners[0], name)()


class CandidateLoader:
    """Loads merges into the module.

    Args:
        candidate: Stands for the live weights.
        merge: Writes a merge.
        validation: Recalibrates it.
        latest_K: The latest weights' coefficients.
        recalibrate_batches: Training batches that re-estimate BatchNorm statistics; 0: none.
    """

    def __init__(
        self,
        candidate: Candidate,
        merge: Load,
        validation: Validation,
        latest_K: Sequence[float],
        recalibrate_batches: int,
    ) -> None:
        self._candidate = candidate
        self._merge = merge
        self._validation = validation
        self._latest_K = latest_K
        self._recalibrate_batches = recalibrate_batches

    def load(self, c: Coefficients) -> None:
        """Load a merge."""
        self._candidate.put(lambda: self._merge(c))
        if self._recalibrate_batches:
            self._validation.recalibrate(self._recalibrate_batches)

    def reload(self, c: Coefficients, read: Callable[[], None]) -> None:
        """Load a merge by ``read``; random numbers are drawn as they were when it was loaded by its coefficients."""
        self.load(c)
        self._merge(self._latest_K)
        self._candidate.put(read)


def _tolerance(trainer: Trainer) -> float:
    """Return the relative difference of two values of the same weights that rounding explains on an accelerator."""
    computed = {"bf": torch.bfloat16, "16": torch.float16, "tr": torch.bfloat16}.get(str(trainer.precision)[:2])
    dtypes = {p.dtype for p in trainer.lightning_module.parameters() if p.is_floating_point()}
    return max([1e-5, *(torch.finfo(dtype).eps for dtype in (*dtypes, computed or torch.float32))])
