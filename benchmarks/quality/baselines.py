"""Merges that are no weighted sum of whole snapshots.

Letters: K snapshots, oldest first; P parameters, as one vector; I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils import parameters_to_vector

from benchmarks.quality.case import Case, Found, search
from lightning_ckmerge.core.mixing import slerp_tensors
from lightning_ckmerge.core.spaces import Pairwise

# Their plain mean is the best of LAWA's.
NUM_SNAPSHOTS = 4
NUM_BATCHES = 8
# So that a parameter on which no byte of the batches depends is averaged.
FISHER_FLOOR = 1e-6
# What the authors found best on most models.
OFF_DIAGONAL = 0.9
FORWARDS_PER_GRADIENT = 3


def fisher(case: Case) -> Found:
    """Average each parameter weighted by its Fisher information, over the buffer's newest means.

    The Fisher matrices' diagonals are those of windows of training text, of bytes that the model itself predicts.

    Source:
        Matena and Raffel 2021, arXiv:2111.09832, equation 4; a snapshot's own weight is its steps, as in a mean.
    """
    start = time.monotonic()
    batches = case.train_batches(NUM_BATCHES)
    torch.manual_seed(0)
    weighted_P, total_P = torch.zeros_like(case.latest_P), torch.zeros_like(case.latest_P)
    for steps, weights_P in _newest_means(case):
        fisher_P = steps * _fisher_diagonal(case.load(weights_P), batches)
        weighted_P += fisher_P * weights_P
        total_P += fisher_P
    return _found(case, weighted_P / total_P, FORWARDS_PER_GRADIENT, start)


def regmean(case: Case) -> Found:
    """Merge each linear layer so that its outputs stay closest to the snapshots' own, and average the rest.

    Source:
        Jin et al. 2022, arXiv:2212.09849, equation 2, with inner products off the diagonal scaled down; a snapshot's
        own weight is its steps. The output layer, which is the embedding, is averaged as such.
    """
    start = time.monotonic()
    batches = case.train_batches(NUM_BATCHES)
    names = [name for name, module in case.model.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    mean_P = torch.zeros_like(case.latest_P)
    grams: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    total = sum(steps for steps, _ in _newest_means(case))
    for steps, weights_P in _newest_means(case):
        mean_P += steps / total * weights_P
        model = case.load(weights_P)
        for name, gram_II in _grams(model, names, batches).items():
            shrunk_II = steps * (OFF_DIAGONAL * gram_II + (1 - OFF_DIAGONAL) * gram_II.diag().diag())
            target_IO = shrunk_II @ model.get_submodule(name).weight.detach().double().T
            grams[name] = grams.get(name, 0) + shrunk_II
            targets[name] = targets.get(name, 0) + target_IO
    merged = case.load(mean_P.clone())
    for name in names:
        solution_IO = torch.linalg.solve(grams[name], targets[name])
        merged.get_submodule(name).weight.data.copy_(solution_IO.T)
    return _found(case, parameters_to_vector(merged.parameters()).detach().clone(), 1, start)


def slerp(case: Case) -> Found:
    """Search the place on the great circle between two points, tensor by tensor.

    Source:
        Shoemake 1985; for checkpoints as mergekit does it.
    """
    older, newer = (w_P.split([p.numel() for p in case.model.parameters()]) for w_P in case.pair.weights_KP)

    def merge(c_K: Sequence[float]) -> Tensor:
        return torch.cat([slerp_tensors(a, b, c_K[1]) for a, b in zip(older, newer, strict=True)])

    return search(case, Pairwise(), snapshots=case.pair, anchors=(), merge=merge)


def _newest_means(case: Case) -> list[tuple[int, Tensor]]:
    """The steps and weights of the newest means; the last snapshot is the latest weights."""
    means = zip(case.buffer.segments_K, case.buffer.weights_KP, strict=True)
    return [(segment.num_steps, weights_P) for segment, weights_P in means][-1 - NUM_SNAPSHOTS : -1]


def _fisher_diagonal(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The mean square of each parameter's gradient over windows, as a vector ``(P,)``."""
    windows = torch.cat(list(batches))
    parameters = list(model.parameters())
    sum_P = torch.zeros(sum(p.numel() for p in parameters))
    for window in windows:
        predicted = Categorical(logits=model(window[None, :-1]))
        log_likelihood = predicted.log_prob(predicted.sample()).sum()
        sum_P += parameters_to_vector(torch.autograd.grad(log_likelihood, parameters)).square()
    return sum_P / len(windows) + FISHER_FLOOR * sum_P.mean() / len(windows)


@torch.no_grad()
def _grams(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inner products ``(I, I)`` of each named layer's inputs, in float64."""
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + (x.T @ x).double()

        return model.get_submodule(name).register_forward_pre_hook(add)

    handles = [watch(name) for name in names]
    for batch in batches:
        model(batch[:, :-1])
    for handle in handles:
        handle.remove()
    return grams


def _found(case: Case, weights_P: Tensor, forwards_per_batch: int, start: float) -> Found:
    evaluations = forwards_per_batch * NUM_SNAPSHOTS * NUM_BATCHES / len(case.batches["search"])
    return Found(
        weights_P=weights_P,
        about={"snapshots": NUM_SNAPSHOTS, "batches": NUM_BATCHES},
        evaluations=evaluations,
        evaluations_to_99=evaluations,
        evaluations_unstaged=evaluations,
        seconds=time.monotonic() - start,
    )
