"""A trained run as the methods see it: what may be merged, on what a merge is scored, and one search of the package.

Letters: K snapshots, oldest first; P parameters, as one vector; B batches; M segments of the run's trail.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from gpt import GPT
from optuna.samplers import BaseSampler
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from benchmarks.quality.data import CONTEXT, Corpus, eval_batches, train_batches
from lightning_ckmerge.buffer.retention import Drop, decide, pooled
from lightning_ckmerge.config import DEFAULT_ANCHORS, AnchorName, SearchConfig
from lightning_ckmerge.core.merge_plan import MergePlan
from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Coefficients, Score, Scored
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import ByTensor, Space
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.problem import Half, KeepGoing, Problem
from lightning_ckmerge.search.refine import FORWARDS_PER_GRADIENT, refine
from lightning_ckmerge.search.stopping import Budget, Stopping
from lightning_ckmerge.search.study import SearchStudy, make_sampler

OBJECTIVES = (Objective("loss", "min"),)
CAPACITY = 10
NUM_TRIALS = 16
DEFAULT_STOPPING = Stopping(min_gain_left=SearchConfig().min_gain_left)
# A pair of checkpoints this many segments apart: of 1, 3, 5, 10 and 20 the best at lam = 0.5 on a run of 500 steps.
PAIR_SPACING = 3


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """What coefficients mix: K vectors, and their places in the run."""

    segments_K: tuple[Segment, ...]
    weights_KP: Tensor


class Task(Protocol):
    """A model and the batches by which its merges are judged."""

    def model(self) -> nn.Module:
        """Return the model, with any weights."""

    def batches(self) -> dict[str, list[Any]]:
        """Return the batches of each split, ``search`` and ``confirm`` among them."""

    def load(self, model: nn.Module, weights_P: Tensor) -> None:
        """Put weights into the model, ready to be scored."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""


@dataclass(frozen=True)
class Bytes(Task):
    """A GPT over bytes, of a million parameters unless its run says another shape."""

    corpus: Corpus
    shape: Mapping[str, int] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return GPT(context=CONTEXT, **self.shape)

    def batches(self) -> dict[str, list[Any]]:
        return eval_batches(self.corpus)

    def load(self, model: nn.Module, weights_P: Tensor) -> None:
        vector_to_parameters(weights_P, model.parameters())

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Case:
    """One trained run.

    Args:
        directory: Where its files lie.
        task: Its model and data; those of ``benchmarks.quality`` by default.
    """

    def __init__(self, directory: Path, task: Task | None = None) -> None:
        self.about: dict[str, Any] = json.loads((directory / "run.json").read_text())
        self._trail, self._branch, self.further = self._read(directory)
        # The newest points, up to the run's end.
        self.latest_P: Tensor = self._trail["points_MP"][-1]
        if self._branch:
            self.branch_P: Tensor = self._branch["points_MP"][-1]
        self.task = task or Bytes(self.about["corpus"], self.about.get("model", {}))
        self.batches = self.task.batches()
        self.model = self.task.model()

    @staticmethod
    def _read(directory: Path) -> list[dict[str, Tensor]]:
        return [load_file(directory / f"{name}.safetensors") for name in ("trail", "branch", "further")]

    @cached_property
    def buffer(self) -> Snapshots:
        """What a geometric buffer of means holds at the end, and the latest weights."""
        return self.buffer_after(self.num_segments)

    @property
    def points_MP(self) -> Tensor:
        """The newest points that were kept, up to the run's end."""
        return self._trail["points_MP"]

    @property
    def has_twin(self) -> bool:
        """Whether a copy of the run was decayed."""
        return bool(self._branch)

    @property
    def num_segments(self) -> int:
        """Segments of the run."""
        return len(self._trail["means_MP"])

    def buffer_after(self, num_segments: int) -> Snapshots:
        """Return what it holds after so many segments of the run."""
        latest_P = self._trail["points_MP"][num_segments - self.num_segments - 1]
        return _buffer(self._trail["means_MP"][:num_segments], latest_P, self.about["segment_steps"])

    @cached_property
    def window(self) -> Snapshots:
        """As many of the last means, of one length, as the decay branch has, and the latest weights."""
        means_MP, steps, length = self._trail["means_MP"], self.about["segment_steps"], len(self._branch["means_MP"])
        segments = _segments(len(means_MP), steps)[-length:]
        return _with_latest(segments, means_MP[-length:], self.latest_P)

    @cached_property
    def decayed(self) -> Snapshots:
        """The same of the decay branch's own trail."""
        before = self._trail["means_MP"][: -len(self._branch["means_MP"])]
        return _buffer(torch.cat([before, self._branch["means_MP"]]), self.branch_P, self.about["segment_steps"])

    @cached_property
    def pair(self) -> Snapshots:
        """The latest weights, and the point some segments before them."""
        points_MP, steps = self._trail["points_MP"], self.about["segment_steps"]
        end, length = self.num_segments * steps, PAIR_SPACING * steps
        segments = [Segment(kind="point", first_step=last - length + 1, last_step=last) for last in (end - length, end)]
        return Snapshots(segments_K=tuple(segments), weights_KP=points_MP[[-1 - PAIR_SPACING, -1]])

    def train_batches(self, num_batches: int) -> list[Tensor]:
        """Return batches ``(N, T + 1)`` of the training files."""
        return train_batches(self.about["corpus"], num_batches)

    def load(self, weights_P: Tensor) -> nn.Module:
        """Return the model, with these weights."""
        self.task.load(self.model, weights_P)
        return self.model

    def mix(self, weights_KP: Tensor, c: Coefficients, group_of: Mapping[str, str]) -> Tensor:
        """Return the weighted sum, with each group's own coefficients where there are groups."""
        if not isinstance(c, Mapping):
            return torch.tensor(c) @ weights_KP
        parameters = list(self.model.named_parameters())
        parts = weights_KP.split([p.numel() for _, p in parameters], dim=1)
        return torch.cat([torch.tensor(c[group_of[n]]) @ part for (n, _), part in zip(parameters, parts, strict=True)])

    @torch.no_grad()
    def score(self, weights_P: Tensor, split: str, keep_going: KeepGoing | None = None) -> Score:
        """Return the mean loss, of bytes in nats a byte."""
        model = self.load(weights_P)
        values_B: list[float] = []
        for batch in self.batches[split]:
            values_B.append(float(self.task.loss(model, batch)))
            if keep_going is not None and not keep_going(values_B, [1.0] * len(values_B)):
                break
        return Score(
            value=sum(values_B) / len(values_B),
            values_B=tuple(values_B),
            sizes_B=(1.0,) * len(values_B),
            num_batches=len(values_B),
            complete=len(values_B) == len(self.batches[split]),
        )

    def differentiate(self, weights_P: Tensor, weights_KP: Tensor, group_of: Mapping[str, str]) -> dict[str, Any]:
        """Return what ``refine`` asks for: each group's inner products ``(K, K)``, at these weights."""
        model, batches = self.load(weights_P), self.batches["search"]
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            loss = self.task.loss(model, batch) / len(batches)
            torch._foreach_add_(gradients, torch.autograd.grad(loss, parameters))
        sources_KN = [
            [part.view_as(p) for part, p in zip(w_P.split([p.numel() for p in parameters]), parameters, strict=True)]
            for w_P in weights_KP
        ]
        plan = MergePlan(gradients, sources_KN, ["parameter"] * len(names), [group_of.get(n, "") for n in names])
        return {group: products.numpy() for group, products in plan.inner_products(gradients).items()}

    def losses(self, weights_P: Tensor) -> dict[str, float]:
        """Return the loss on every split."""
        return {split: self.score(weights_P, split).value for split in self.batches}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method reached, and what that took.

    Args:
        weights_P: The merge.
        about: The winner's name, its coordinates, or whatever says how it was made.
        evaluations: Passes over the search half, or as many forward passes.
        evaluations_to_99: Of these, until 99 % of the gain on the search half was reached.
        evaluations_unstaged: As many as it would have been, had no loser been dropped early.
        seconds: Wall time.
    """

    weights_P: Tensor
    about: Mapping[str, Any]
    evaluations: float
    evaluations_to_99: float
    evaluations_unstaged: float
    seconds: float


def search(
    case: Case,
    space: Space,
    *,
    snapshots: Snapshots | None = None,
    anchors: Sequence[AnchorName] = DEFAULT_ANCHORS,
    n_trials: int = NUM_TRIALS,
    sampler: BaseSampler | None = None,
    merge: Callable[[Coefficients], Tensor] | None = None,
    staged: bool = True,
    stopping: Stopping = DEFAULT_STOPPING,
    refined: bool = False,
) -> Found:
    """Run one search of the package.

    Args:
        case: The run.
        space: What is searched.
        snapshots: What is merged; the buffer by default.
        anchors: Scored first, beside the latest weights.
        n_trials: The sampler's proposals; with 0 of them the best anchor is found, were it worse than the latest
            weights.
        sampler: The package's default by default.
        merge: From coefficients to weights; a weighted sum by default.
        staged: Whether losers are dropped early.
        stopping: When it has found enough; as the package does by default.
        refined: Whether to follow the gradient from the winner.
    """
    given = snapshots or case.buffer
    names = [name for name, _ in case.model.named_parameters()]
    space = ByTensor(space.bind(names), names) if refined else space.bind(names)
    merge = merge or (lambda c: case.mix(given.weights_KP, c, space.group_of))
    start, full = time.monotonic(), len(case.batches["search"])
    run, scored = run_search(
        case,
        space,
        given.segments_K,
        merge,
        sampler=sampler,
        stopping=stopping,
        n_trials=n_trials,
        anchors=tuple(anchors),
        staged=staged,
    )
    if refined:

        def differentiate(c: Coefficients) -> dict[str, Any]:
            # Gradients stand among the candidates, so that their time counts.
            cost = replace(run.latest.search, num_batches=FORWARDS_PER_GRADIENT * full, complete=False)
            scored.append(replace(run.latest, search=cost))
            return case.differentiate(merge(c), given.weights_KP, space.group_of)

        refine(run, differentiate)
    seconds = time.monotonic() - start
    winner = run.winner if n_trials else min(run.anchors[1:], key=lambda t: t.search.value)
    candidate, latest = winner.candidate, run.latest.search.value
    return Found(
        weights_P=merge(candidate.coefficients),
        about={"winner": candidate.name, "coordinates": candidate.coordinates},
        evaluations=run.num_batches / full,
        evaluations_to_99=batches_until(latest + 0.99 * (winner.search.value - latest), run, scored) / full,
        evaluations_unstaged=(run.num_batches + run.num_batches_saved) / full,
        seconds=seconds,
    )


def run_search(
    case: Case,
    space: Space,
    segments_K: tuple[Segment, ...],
    merge: Callable[[Coefficients], Tensor],
    *,
    sampler: BaseSampler | None = None,
    stopping: Stopping = DEFAULT_STOPPING,
    make_study: Callable[..., SearchStudy] = SearchStudy,
    **problem: Any,
) -> tuple[Search, list[Scored]]:
    """Run one search, and return it and its candidates in the order in which they were scored.

    Args:
        case: The run.
        space: What is searched, bound to the case's model.
        segments_K: The snapshots' places.
        merge: From coefficients to weights.
        sampler: The package's default by default.
        stopping: When it has found enough; as the package does by default.
        make_study: Makes the study; its arguments are those of ``SearchStudy``.
        problem: Further fields of ``Problem``.
    """
    scored: list[Scored] = []

    def evaluate(c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        return case.score(merge(c), half, keep_going)

    with tempfile.TemporaryDirectory() as folder:

        def open_study(latest: Score) -> SearchStudy:
            return make_study(
                Path(folder) / "journal",
                "search",
                sampler=make_sampler(sampler, 0),
                intervals=space.coordinates(segments_K),
                objectives=OBJECTIVES,
                fingerprint="",
            )

        run = Search(
            problem=Problem(objectives=OBJECTIVES, space=space, segments_K=segments_K, **problem),
            evaluate=evaluate,
            open_study=open_study,
            budget=Budget(),
            agree=lambda f: f(),
            stopping=stopping,
            on_scored=lambda trial, total: scored.append(trial),
        )
        run.run()
    return run, scored


def batches_until(value: float, run: Search, scored: Sequence[Scored]) -> int:
    """Return the batch evaluations until a candidate was scored as low as ``value``, all of them if none was.

    Args:
        value: A loss.
        run: The search.
        scored: Its candidates in the order in which they were scored; one that was dropped may win in the end.
    """
    spent = 0
    for trial in scored:
        spent += trial.search.num_batches
        if trial.search.complete and trial.search.value <= value:
            return spent
    return run.num_batches


def _buffer(means_MP: Tensor, latest_P: Tensor, segment_steps: int) -> Snapshots:
    segments: list[Segment] = []
    for segment in _segments(len(means_MP), segment_steps):
        segments.append(segment)
        while (todo := decide(segments, capacity=CAPACITY, layout="geometric", finest=segment_steps)) is not None:
            if isinstance(todo, Drop):
                del segments[todo.index]
            else:
                segments[todo.index : todo.index + 2] = [pooled(*segments[todo.index : todo.index + 2])]
    pools = [means_MP[(s.first_step - 1) // segment_steps : s.last_step // segment_steps].mean(0) for s in segments]
    return _with_latest(segments, torch.stack(pools), latest_P)


def _segments(num_segments: int, segment_steps: int) -> list[Segment]:
    ends = range(segment_steps, (num_segments + 1) * segment_steps, segment_steps)
    return [
        Segment(kind="mean", first_step=last - segment_steps + 1, last_step=last, num_updates=segment_steps)
        for last in ends
    ]


def _with_latest(segments: Sequence[Segment], means_KP: Tensor, latest_P: Tensor) -> Snapshots:
    end = segments[-1].last_step
    latest = Segment(kind="point", first_step=end, last_step=end, covered=True)
    return Snapshots(segments_K=(*segments, latest), weights_KP=torch.cat([means_KP, latest_P[None]]))
