"""Which models form an ensemble, and with which weights: chosen by their predictions on the search half.

Predictions are made once for each model; after that, an ensemble is a few additions.

Letters: P models to choose from, M chosen ones; B batches, N samples in one; C classes or values.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Coefficients, Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.mixtures import Simplex
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.averaging import Averaging, average_outputs, is_classes, losses
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.problem import Half, KeepGoing, Problem
from lightning_ckmerge.search.stopping import Budget, Stopping
from lightning_ckmerge.search.study import SearchStudy, make_sampler

RULE = (
    "greedy forward selection: the best model on the search half, then one by one the model that lowers the loss of "
    "the ensemble the most"
)
# Of the weight, which a new member is offered.
SHARES = (1 / 2, 1 / 4, 1 / 8)
# A member of less than this weight costs a forward pass, and changes next to nothing.
MIN_WEIGHT = 0.01
MIN_GAIN_LEFT = 0.002


@dataclass
class Predicted:
    """One model's predictions on the search half.

    Args:
        kept_B: B tensors: ``(N,)`` log-probabilities of the right classes where probabilities are averaged, which is
            all that their loss depends on; else ``(N, C)`` outputs.
        answers_B: B tensors: ``(N,)`` most likely classes, or ``(N, C)`` values.
    """

    kept_B: list[Tensor] = field(default_factory=list)
    answers_B: list[Tensor] = field(default_factory=list)

    def take(self, outputs: Tensor, targets: Tensor, averaging: Averaging) -> None:
        """Keep what is needed of one batch, on the host.

        Args:
            outputs: ``(N, C)``.
            targets: ``(N,)`` classes or ``(N, C)`` values.
            averaging: How an ensemble will average them.
        """
        own = outputs.detach().float()
        kept = -losses(own, targets) if averaging == "probabilities" else own
        self.kept_B.append(kept.cpu())
        self.answers_B.append((own.argmax(-1) if is_classes(targets) else own).cpu())

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(t.nbytes for t in (*self.kept_B, *self.answers_B))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An ensemble.

    Args:
        members_M: Places of the models, by falling weight.
        weights_M: Above 0; they sum to 1.
        steps: Places in the order of their choice, each with the loss of the ensemble so far, with equal weights.
        loss: Of the whole, on the search half.
        num_trials: Weights that were tried beside equal ones.
    """

    members_M: tuple[int, ...]
    weights_M: tuple[float, ...]
    steps: tuple[tuple[int, float], ...]
    loss: float
    num_trials: int = 0


class SearchHalf:
    """The models' predictions on the search half.

    Args:
        averaging: How an ensemble averages them.
        targets_B: B tensors, on the host.
        models_P: P models' predictions.
    """

    def __init__(self, averaging: Averaging, targets_B: Sequence[Tensor], models_P: Sequence[Predicted]) -> None:
        self.averaging: Averaging = averaging
        self.models_P = list(models_P)
        self._targets_B = targets_B
        self.sizes_B = tuple(float(len(t)) for t in targets_B)

    def losses_B(self, weights: Mapping[int, float]) -> tuple[float, ...]:
        """Return the loss on each batch of the ensemble with these weights, by the models' places."""
        used = {p: w for p, w in weights.items() if w > 0}
        return tuple(self._loss(b, used) for b in range(len(self.sizes_B)))

    def loss(self, weights: Mapping[int, float]) -> float:
        """Return the loss on all batches."""
        return self._mean(self.losses_B(weights))

    def disagreement(self, p: int, other: int) -> float:
        """Return how far the answers of two models differ, from 0 on.

        Of classes: the share of samples that they see differently. Of values: the mean squared difference, as a share
        of the first one's loss.
        """
        answers, others = self.models_P[p].answers_B, self.models_P[other].answers_B
        if is_classes(answers[0]):
            return sum(float((a != o).sum()) for a, o in zip(answers, others, strict=True)) / sum(self.sizes_B)
        squares = [float((a - o).square().mean()) for a, o in zip(answers, others, strict=True)]
        loss = self.loss({p: 1.0})
        return self._mean(squares) / loss if loss > 0 else 0.0

    def _mean(self, values_B: Sequence[float]) -> float:
        return math.fsum(v * n for v, n in zip(values_B, self.sizes_B, strict=True)) / sum(self.sizes_B)

    def _loss(self, b: int, weights: Mapping[int, float]) -> float:
        kept_M = [self.models_P[p].kept_B[b] for p in weights]
        w_M = list(weights.values())
        if self.averaging == "probabilities":
            logs = torch.tensor(w_M, dtype=torch.float64).log().unsqueeze(1)
            return -float(torch.logsumexp(torch.stack(kept_M).double() + logs, 0).mean())
        return float(losses(average_outputs(kept_M, w_M, self.averaging), self._targets_B[b]).double().mean())


def choose_members(
    half: SearchHalf,
    among: Sequence[int],
    size: int,
    min_disagreement: float = 0.0,
    min_gain: float = 0.0,
    shares: Sequence[float] | None = SHARES,
) -> tuple[list[tuple[int, float]], dict[int, float]]:
    """Return the models of an ensemble in the order of their choice, each with the loss so far, and their weights.

    The best model comes first. Then, one by one, the model that lowers the loss the most when it is given a share of
    the weight. It ends at ``size``, or where nothing lowers the loss enough. Of models that are equally good alone,
    those lower it that are wrong elsewhere: the loss of the mean lies below the mean of the losses by as much as the
    models disagree. So copies of what is there add nothing and are not taken.

    Args:
        half: Predictions.
        among: Places of the models to choose from.
        size: Most members; at least 1.
        min_disagreement: Least disagreement of a model with each one that was chosen before.
        min_gain: Share of the loss by which a new member must lower it, which costs a forward pass; at least 0.
        shares: What a new model may be given, the others keeping the rest; ``None``: as much as each of the others.

    Source:
        Caruana et al. 2004, *Ensemble selection from libraries of models*, doi:10.1145/1015330.1015432. There a model
        gets more weight by being chosen again; here a new one is offered several shares. Disagreement: Krogh and
        Vedelsby 1995, *Neural network ensembles, cross validation, and active learning*.

    Raises:
        SearchError: No model has a finite loss.
    """
    single = {p: half.loss({p: 1.0}) for p in among}
    finite = {p: loss for p, loss in single.items() if math.isfinite(loss)}
    if not finite:
        raise SearchError("an ensemble needs a model with a finite loss on the search half, got none. Check `predict`.")
    best = min(finite, key=finite.__getitem__)
    steps, weights = [(best, finite[best])], {best: 1.0}
    while len(steps) < size:
        others = [
            p for p in finite if p not in weights and all(half.disagreement(p, c) >= min_disagreement for c in weights)
        ]
        offers = [(p, s) for p in others for s in shares or (1 / (len(weights) + 1),)]
        loss = {(p, s): half.loss(_joined(weights, p, s)) for p, s in offers}
        offer = min(loss, key=loss.__getitem__, default=None)
        if offer is None or not steps[-1][1] - loss[offer] > min_gain * abs(steps[-1][1]):
            break
        weights = _joined(weights, *offer)
        steps.append((offer[0], loss[offer]))
    return steps, weights


def _joined(weights: Mapping[int, float], p: int, share: float) -> dict[int, float]:
    return {**{c: w * (1 - share) for c, w in weights.items()}, p: share}


def choose_ensemble(
    half: SearchHalf,
    among: Sequence[int],
    *,
    size: int,
    min_disagreement: float = 0.0,
    min_gain: float = 0.0,
    n_trials: int = 0,
    seed: int = 0,
) -> Chosen:
    """Return the ensemble that is chosen on the search half: members, then their weights.

    Args:
        half: Predictions.
        among: Places of the models to choose from.
        size: Most members.
        min_disagreement: As for ``choose_members``.
        min_gain: Likewise.
        n_trials: Weights that Optuna proposes, beside those of the choice; 0: equal ones.
        seed: Of its sampler.

    Raises:
        SearchError: No model has a finite loss.
    """
    steps, weights = choose_members(half, among, size, min_disagreement, min_gain, SHARES if n_trials else None)
    num_trials = 0
    if n_trials and len(weights) > 1:
        found, num_trials = _search_weights(half, weights, n_trials, seed)
        kept = {p: w for p, w in found.items() if w >= MIN_WEIGHT}
        searched = {p: w / math.fsum(kept.values()) for p, w in kept.items()}
        weights = min(searched, weights, key=half.loss)
    ordered = sorted(weights, key=lambda p: -weights[p])
    return Chosen(
        members_M=tuple(ordered),
        weights_M=tuple(weights[p] for p in ordered),
        steps=tuple(steps),
        loss=half.loss(weights),
        num_trials=num_trials,
    )


def _search_weights(
    predictions: SearchHalf, start: Mapping[int, float], n_trials: int, seed: int
) -> tuple[dict[int, float], int]:
    """Search the simplex of weights as a search does that of coefficients; the members stand for its snapshots."""
    members = list(start)

    def evaluate(c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        assert not isinstance(c, Mapping)
        values_B = predictions.losses_B(dict(zip(members, c, strict=True)))
        mean = math.fsum(v * n for v, n in zip(values_B, predictions.sizes_B, strict=True)) / sum(predictions.sizes_B)
        return Score(value=mean, values_B=values_B, sizes_B=predictions.sizes_B, num_batches=len(values_B))

    space, objectives = Simplex(), (Objective(monitor="loss", mode="min"),)
    segments = tuple(Segment(kind="point", first_step=m + 1, last_step=m + 1) for m in range(len(members)))
    with tempfile.TemporaryDirectory(prefix="ckmerge-") as directory:
        open_study = partial(
            SearchStudy,
            Path(directory) / "study.journal",
            "weights",
            sampler=make_sampler(None, seed),
            intervals=space.coordinates(segments),
            objectives=objectives,
            fingerprint="weights",
        )
        search = Search(
            problem=Problem(
                objectives=objectives,
                space=space,
                segments_K=segments,
                n_trials=n_trials,
                anchors=("uniform",),
                previous=space.inverse(list(start.values()), segments),
                staged=False,  # predictions are at hand: a whole evaluation costs nothing
            ),
            evaluate=evaluate,
            open_study=lambda latest: open_study(),
            budget=Budget(),
            agree=lambda function: function(),
            stopping=Stopping(min_gain_left=MIN_GAIN_LEFT),
        )
        search.run()
    return dict(zip(members, search.winner.candidate.coefficients_K, strict=True)), len(search.trials)
