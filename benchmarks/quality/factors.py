"""Read off each run by what factor a kind of tensors wants a longer average than the rest, for ``Grouped``.

python -m benchmarks.quality.factors [RUN ...]

`decay` over the buffer, with one ``beta`` and a ``tau`` a kind, is brought to its optimum on the search half by
gradients; a factor is a kind's ``tau`` over that of a search with one ``tau`` for all.

Letters: K snapshots, oldest first; G kinds; P parameters, as one vector.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.quality import RUNS
from benchmarks.quality.case import Case
from lightning_ckmerge.core.spaces import Decay
from lightning_ckmerge.core.spaces.groups import assign_groups

START_TAU, START_BETA = 80.0, 0.6
NUM_ITERATIONS = 12
STEP = 1e-4


def coefficients(space: Decay, case: Case, log_tau: float, beta: float) -> Tensor:
    """Return the K coefficients."""
    c_K = space.coefficients({"tau": math.exp(log_tau), "beta": beta}, case.buffer.segments_K)
    return torch.tensor(c_K, dtype=torch.float64)


def optimum(case: Case, group_of: Sequence[int]) -> np.ndarray:
    """Return ``beta`` and each group's ``log(tau)`` at the lowest loss, given each parameter's group."""
    space, weights_KP = Decay(), case.buffer.weights_KP
    parameters = list(case.model.parameters())
    sizes = [p.numel() for p in parameters]
    parts = weights_KP.split(sizes, dim=1)
    num_groups = max(group_of) + 1

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        beta, log_taus = float(z[0]), z[1:]
        c_GK = [coefficients(space, case, t, beta) for t in log_taus]
        merged = [c_GK[g].float() @ part for g, part in zip(group_of, parts, strict=True)]
        model = case.load(torch.cat(merged))
        value, slopes = 0.0, [torch.zeros_like(p) for p in parameters]
        for batch in case.batches["search"]:
            logits = model(batch[:, :-1])
            found = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / len(case.batches["search"])
            for slope, new in zip(slopes, torch.autograd.grad(found, parameters), strict=True):
                slope += new
            value += float(found.detach())
        slope_parts = parameters_to_vector(slopes).split(sizes)
        slope_GK = torch.zeros(num_groups, len(weights_KP), dtype=torch.float64)
        for g, part, slope in zip(group_of, parts, slope_parts, strict=True):
            slope_GK[g] += (part @ slope).double()
        gradient = np.zeros_like(z)
        for g, (log_tau, c_K) in enumerate(zip(log_taus, c_GK, strict=True)):
            by_beta = (coefficients(space, case, log_tau, beta + STEP) - c_K) / STEP
            by_tau = (coefficients(space, case, log_tau + STEP, beta) - c_K) / STEP
            gradient[0] += float(slope_GK[g] @ by_beta)
            gradient[1 + g] = float(slope_GK[g] @ by_tau)
        return value, gradient

    start = np.array([START_BETA, *[math.log(START_TAU)] * num_groups])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxfun": NUM_ITERATIONS}).x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of benchmarks/quality/runs; all of them by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.runs or sorted(p.parent.name for p in RUNS.glob("*/run.json")):
        case = Case(RUNS / name)
        kind_of = list(assign_groups([n for n, _ in case.model.named_parameters()], "kind").values())
        kinds = sorted(set(kind_of))
        shared = math.exp(optimum(case, [0] * len(kind_of))[1])
        log_taus = optimum(case, [kinds.index(k) for k in kind_of])[1:]
        factors = {kind: f"{math.exp(t) / shared:.2f}" for kind, t in zip(kinds, log_taus, strict=True)}
        print(name, f"tau {shared:.0f},", ", ".join(f"{k} {f}" for k, f in factors.items()), flush=True)


if __name__ == "__main__":
    main()
