"""Scores candidates inside ``fit``: the run is paused, and merges take the place of its weights.

One candidate goes from ``search.engine``, which proposes it, through ``CandidateScorer.score``: everything but the
weights goes back to where the search began, the merge is written into the live tensors, and the user's own validation
runs on one half of the batches.

Letters: K snapshots, oldest first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.outcome import Coefficients, Score, Scored
from lightning_ckmerge.core.wording import and_more
from lightning_ckmerge.distributed.comm import together
from lightning_ckmerge.errors import ArtifactError, ConfigError, TraceError
from lightning_ckmerge.plugin.evaluate.candidate import SWAPPED, Candidate, EqualValues
from lightning_ckmerge.plugin.evaluate.validation import Validation
from lightning_ckmerge.plugin.progress import say
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.plugin.restore.interruptions import InterruptibleComm
from lightning_ckmerge.plugin.restore.paused_run import PausedRun
from lightning_ckmerge.search.problem import Half, KeepGoing

# Of what a search cannot put back.
MAX_NAMED = 5


class CandidateScorer:
    """Loads, scores and differentiates merges of one search's snapshots. All ranks call it together.

    Args:
        model: What merges are written into.
        merger: The snapshots.
        write: Writes a merge into the module.
        candidate: Keeps a merge in place while validation runs.
        validation: The user's own.
        begin: Brings everything but the weights to where the search began.
        recalibrate_batches: Training batches that re-estimate BatchNorm statistics; 0: none.
        monitor: The first metric.
        tolerance: Relative difference of two values of the same weights that rounding explains.
    """

    def __init__(
        self,
        model: RankModel,
        merger: Merger,
        write: Callable[[Coefficients], None],
        candidate: Candidate,
        validation: Validation,
        begin: Callable[[], None],
        recalibrate_batches: int,
        monitor: str,
        tolerance: float,
    ) -> None:
        self.merger = merger
        self._model = model
        self._write = write
        self._candidate = candidate
        self._validation = validation
        self.begin = begin
        self._recalibrate_batches = recalibrate_batches
        self._equal = EqualValues(monitor)
        self.tolerance = tolerance

    def score(self, c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        """Return a candidate's score; arguments are those of ``search.problem.Evaluate``.

        Raises:
            MonitorError: Validation does not log the metric.
            ConfigError: It logs a metric that contradicts its ``mode``.
            FinalError: Validation does not score the weights that are published.
        """
        self.load(c)
        return self._run(half, keep_going)

    def score_written(self, write: Callable[[], None], half: Half) -> Score:
        """Return the score of the weights that ``write`` writes into the live tensors; it may be called again."""
        self._put(write)
        return self._run(half)

    def load(self, c: Coefficients) -> None:
        """Put a merge in place of the live weights; everything else is as it was when the search began."""
        self._put(lambda: self._write(c))

    def reload(self, c: Coefficients, read: Callable[[], None]) -> None:
        """Put the weights that ``read`` writes in place; everything else is as if they had been merged by ``c``."""
        # By its coefficients first, so that random numbers are drawn as they were; then the latest weights, so that
        # what is scored can only be what was read.
        self.load(c)
        self._write([0.0] * (len(self.merger.snapshots_K) - 1) + [1.0])
        self._candidate.put(read)

    def visit(self, half: Half, take: Callable[[Any], None]) -> None:
        """Show each batch of one half to ``take``, with the weights that are in place; see ``Validation.visit``."""
        self._validation.visit(half, take)

    def gradient(self, c: Coefficients) -> dict[str, Any]:
        """Return each group's inner products ``(K, K)`` of snapshots and derivatives at ``c``, over all ranks.

        Frozen tensors and buffers, such as BatchNorm's statistics, count as constant.

        Raises:
            SearchError: The metric is not the mean of the loss that ``validation_step`` returns.
            PeerError: A rank has failed.
        """
        with together(self._model.comm):
            own = {group: products.numpy() for group, products in self._own_gradient(c).items()}
        everywhere = self._model.comm.exchange(own)
        groups = sorted({group for products in everywhere for group in products})
        return {g: np.sum([products[g] for products in everywhere if g in products], axis=0) for g in groups}

    def hessian(self, c: Coefficients, half: Half, num_batches: int) -> tuple[int, Callable[[Any], Any]]:
        """Return the number P of trained parameters, and the product of the metric's Hessian at ``c`` with a vector.

        On one device. The product takes and returns arrays ``(P,)`` of float64.

        Args:
            c: K coefficients, or K a group.
            half: On whose batches.
            num_batches: How many of the first of them.

        Raises:
            SearchError: By the product, where the metric is not the mean of the loss that ``validation_step`` returns.
        """
        self.load(c)
        trained = [o.tensor for o in self._model.ownership.local() if isinstance(o.tensor, nn.Parameter)]
        parameters = [p for p in trained if p.requires_grad]
        sizes = [p.numel() for p in parameters]

        def product(vector: Any) -> Any:
            self.load(c)
            whole = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
            pieces = torch.split(whole, sizes)
            direction = [v.view(p.shape).to(p.device, p.dtype) for v, p in zip(pieces, parameters, strict=True)]
            found = self._validation.hessian_product(parameters, direction, half, num_batches)
            return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in found]).numpy()

        return sum(sizes), product

    def check(self, scored: Scored, read: Callable[[], None]) -> None:
        """Score the merge that ``read`` puts into the live tensors on one batch, which must have its recorded value.

        It is the first one of the confirmation half, or of the search half where nothing could be confirmed; a block
        of them, where the metric is no mean over batches.

        Raises:
            ArtifactError: It has another one.
        """
        half: Half = "search" if scored.confirm is None else "confirm"
        recorded = scored.search if scored.confirm is None else scored.confirm
        self.reload(scored.candidate.coefficients, read)
        again = self._validation.run(half, keep_going=lambda values_B, sizes_B: False)
        pairs = [(_first(a), _first(b)) for a, b in zip(recorded.objectives, again.objectives, strict=True)]
        if not all(math.isclose(a, b, rel_tol=self.tolerance, abs_tol=1e-9) for a, b in pairs):
            raise ArtifactError(
                "an artifact must score as its candidate did, but read back from the disk it has "
                f"{', '.join(f'{b:.9g} instead of {a:.9g}' for a, b in pairs)} on the first batch of the {half} half. "
                "It is not published: look for state that `validation_step` reads and `state_dict` does not hold, and "
                "for validation that draws from state of its own."
            )

    def num_batches(self, half: Half) -> tuple[int, ...]:
        """Return the batches of each loader in a half; 0 for loaders of unknown length."""
        return self._validation.num_batches(half)

    def can_confirm(self) -> bool:
        """Whether the confirmation half has any batches."""
        return self._validation.can_confirm()

    def notes(self) -> list[str]:
        """Return warnings about the evaluations so far."""
        return [*[SWAPPED] * self._candidate.was_swapped, *self._equal.notes()]

    def _put(self, write: Callable[[], None]) -> None:
        self.begin()
        self._candidate.put(write)
        if self._recalibrate_batches:
            self._validation.recalibrate(self._recalibrate_batches)

    def _run(self, half: Half, keep_going: KeepGoing | None = None) -> Score:
        score = self._validation.run(half, keep_going)
        if half == "search":
            self._equal.take(self._candidate.weights, score)
        return score

    def _own_gradient(self, c: Coefficients) -> dict[str, Tensor]:
        self.load(c)
        local = self._model.ownership.local()
        trained = {o.name: o.tensor for o in local if isinstance(o.tensor, nn.Parameter) and o.tensor.requires_grad}
        gradients = dict(zip(trained, self._validation.differentiate([*trained.values()]), strict=True))
        # Nothing of the rest's size is allocated.
        whole = {o.name: gradients.get(o.name, o.tensor.new_zeros(()).expand(o.tensor.shape)) for o in local}
        return self.merger.inner_products(self._model.select(whole))


class ScorerMaker:
    """Makes the scorers of one ``fit``, one a search.

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
    def paused(self, find_snapshots: Callable[[], Sequence[Snapshot]], step: int) -> Iterator[CandidateScorer]:
        """Yield a scorer; the weights and all else are the same afterwards.

        Args:
            find_snapshots: Returns the snapshots to merge, beside the latest weights.
            step: The latest weights' own.
        """
        model, evaluation = self._model, self._settings.evaluation
        with (
            self._watching(PausedRun(self._trainer, model.ownership, model.local_layout)) as paused,
            contextlib.closing(Candidate(self._trainer.lightning_module, model.ownership, model.comm)) as candidate,
        ):
            validation = self._make_validation(paused, candidate)
            paused.watch("loaders", validation.loaders)
            latest = model.select(paused.weights)
            merger = Merger(model.layout, model.live, find_snapshots(), latest, step, model.space.group_of)
            with model.merging(merger) as write:
                yield CandidateScorer(
                    model,
                    merger,
                    write,
                    candidate,
                    validation,
                    begin=partial(self._begin, paused, count()),
                    recalibrate_batches=evaluation.recalibrate_batches,
                    monitor=self._settings.objectives[0].monitor,
                    tolerance=_tolerance(self._trainer),
                )

    def check_traces(self) -> None:
        """Raise ``TraceError``, on all ranks, if a search has left a trace on any. A collective."""
        self._check(self._traces)

    def _check(self, own: Sequence[str]) -> None:
        traces = list(dict.fromkeys(trace for traces in self._model.comm.exchange(list(own)) for trace in traces))
        if traces:
            raise TraceError(
                f"a search must leave the run unchanged, got {and_more(traces[:MAX_NAMED], len(traces))} still "
                "different after restoring. Keep validation from changing them. Searching has ended for this run."
            )

    @contextlib.contextmanager
    def _watching(self, paused: PausedRun) -> Iterator[PausedRun]:
        try:
            with paused:
                yield paused
                self._say_left_out(paused.left_out)
        finally:
            self._traces += paused.traces

    def _begin(self, paused: PausedRun, num_begun: Iterator[int]) -> None:
        """Begin an evaluation. The run's first one, which is of the latest weights, has to have left no trace."""
        if next(num_begun) == 1 and not self._is_proven:
            paused.prove()
            self._check(paused.traces)
            self._is_proven = True
        paused.begin()

    def _say_left_out(self, left_out: Mapping[str, str]) -> None:
        """Say once what a search cannot restore."""
        if left_out and not self._has_said:
            self._has_said = True
            shown = [f"{where}: {reason}" for where, reason in islice(left_out.items(), MAX_NAMED)]
            named = and_more(shown, len(left_out), "; ", "; and ")
            say(self._trainer, f"If validation changes these, a search cannot restore them: {named}.")

    def _make_validation(self, paused: PausedRun, candidate: Candidate) -> Validation:
        config = self._settings.evaluation
        if config.dataloader is not None and self._own_loaders is None:
            self._own_loaders = self._find_loaders(config.dataloader)
        comm = InterruptibleComm(self._model.comm, self._interruption)
        told = (self._settings.monitors, comm, self._settings.check_modes)
        return Validation(self._trainer, self._callback, config, *told, paused, candidate, self._own_loaders)

    def _find_loaders(self, name: str) -> Any:
        trainer = self._trainer
        owners = [o for o in (getattr(trainer, "datamodule", None), trainer.lightning_module) if hasattr(o, name)]
        if not owners:
            raise ConfigError(
                f"`evaluation.dataloader` must name a method of the datamodule or module, got {name!r}. "
                "Define it, or leave the argument out to use the run's validation loaders."
            )
        return getattr(owners[0], name)()


def _first(score: Score) -> float:
    return score.values_B[0] if score.values_B else score.value


def _tolerance(trainer: Trainer) -> float:
    """Return the relative difference of two values of the same weights that rounding explains on an accelerator."""
    computed = {"bf": torch.bfloat16, "16": torch.float16, "tr": torch.bfloat16}.get(str(trainer.precision)[:2])
    dtypes = {p.dtype for p in trainer.lightning_module.parameters() if p.is_floating_point()}
    return max([1e-5, *(torch.finfo(dtype).eps for dtype in (*dtypes, computed or torch.float32))])
