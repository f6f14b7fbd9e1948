"""How often a verdict errs on a real model and text: searches over random splits, and over weights that carry noise.

Windows that no run has trained on are split at random, again and again, into a search half, a confirmation half and a
rest; what a merge gains on the rest is called its true gain.

Letters: K snapshots; N windows of the pool; B batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence import RESULTS
from benchmarks.evidence.measure import fingerprint, write_json
from benchmarks.evidence.protocol import Run, runs
from benchmarks.evidence.tasks import BATCH_SIZE, NUM_EVAL_BATCHES, stacked, windows
from benchmarks.evidence.train import Trained
from benchmarks.quality.case import NUM_TRIALS, OBJECTIVES, Case, Snapshots, run_search
from lightning_ckmerge.config import TAIL_TRIALS
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Grouped, Tail
from lightning_ckmerge.search.interval import score_gain
from lightning_ckmerge.search.verdict import reach_verdict

TAIL_NOISE = "noise, near the latest weights"
# Three runs: 240 searches over splits, 102 over noise by the ordinary search, and as many by that of decayed runs.
SPLITS_A_RUN, NOISES_A_RUN = 80, 34
# The rest, in confirmation halves.
NUM_REST = 8
# A snapshot's noise, as a share of each tensor's standard deviation, one after the other.
NOISES = (0.001, 0.003, 0.01, 0.03)
NUM_SNAPSHOTS = 10
# Windows scored at a time, where no verdict looks at batches.
CHUNK = 64
# Redrawn confirmation halves of differences whose mean is 0.
NUM_REDRAWN, REDRAWN_BATCHES = 2000, (8, 16, 32, 64)


@dataclass(frozen=True)
class Pool:
    """Unseen windows, and the latest weights' loss on each."""

    windows_NT: Tensor
    latest_N: np.ndarray


def measure(run: Run, *, again: bool = False) -> None:
    """Run what is missing of a run's searches, and gather all runs' results; a stopped command goes on."""
    path = run.directory / "verdicts.json"
    kept: dict[str, Any] = {} if again or not path.exists() else json.loads(path.read_text())
    case = Trained(run)
    kinds = {"latest": SPLITS_A_RUN // 2, "twin": SPLITS_A_RUN // 2, "noise": NOISES_A_RUN, TAIL_NOISE: NOISES_A_RUN}
    for kind, num in kinds.items():
        done = kept.setdefault(kind, [])
        if len(done) >= num:
            continue
        if kind == "twin":
            case.become_twin()
        is_noise = kind in ("noise", TAIL_NOISE)
        pool = make_pool(case, case.branch_P if is_noise else case.latest_P)
        for i in range(len(done), num):
            noise = NOISES[i % len(NOISES)]
            given = noisy(case, noise, seed=1000 * run.seed + i) if is_noise else case.buffer
            found = searched(case, given, pool, seed=i, is_tail=kind == TAIL_NOISE)
            if is_noise:
                found["noise"] = noise
            elif i == 0:
                kept[f"{kind}, redrawn"] = redrawn(found["differences_N"])
            del found["differences_N"]
            done.append(found)
            write_json(path, {**kept, "run": {"cell": run.cell, "seed": run.seed}, "fingerprint": fingerprint()})
            print("verdicts", run.seed, kind, i, found["status"], f"{found['gain']:.5f}", flush=True)
        case = Trained(run)
    gather()


def gather() -> None:
    """Write the results: those kept beside the trails, and earlier ones of runs that are not there."""
    path = RESULTS / "verdicts.json"
    kept = {r["run"]["seed"]: r for r in (json.loads(path.read_text()) if path.exists() else [])}
    for run in runs("verdicts"):
        if (run.directory / "verdicts.json").exists():
            kept[run.seed] = json.loads((run.directory / "verdicts.json").read_text())
    write_json(path, [kept[seed] for seed in sorted(kept)])


def make_pool(case: Case, latest_P: Tensor) -> Pool:
    """Return the pool of windows, and the latest weights' loss on each."""
    num = BATCH_SIZE * (NUM_EVAL_BATCHES["search"] + (1 + NUM_REST) * NUM_EVAL_BATCHES["confirm"])
    found = windows("val", None, num)
    windows_NT = stacked(found, list(range(num)))
    return Pool(windows_NT, losses(case, latest_P, windows_NT))


@torch.no_grad()
def losses(case: Case, weights_P: Tensor, windows_NT: Tensor) -> np.ndarray:
    """Return the loss on each window, ``(N,)``."""
    model = case.load(weights_P)
    found = [
        F.cross_entropy(model(chunk[:, :-1]).transpose(1, 2), chunk[:, 1:], reduction="none").mean(1)
        for chunk in windows_NT.split(CHUNK)
    ]
    return torch.cat(found).double().numpy()


def noisy(case: Case, noise: float, seed: int) -> Snapshots:
    """Return the twin's last weights, and snapshots that are these and independent normal noise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [p.numel() for p in case.model.parameters()]
    scale_P = torch.cat([part.std().expand(len(part)) for part in case.branch_P.split(sizes)])
    steps, length = case.about["num_steps"], case.about["num_steps"] // NUM_SNAPSHOTS
    ends = [steps - length * k for k in reversed(range(NUM_SNAPSHOTS))]
    segments = [Segment(kind="mean", first_step=e - length + 1, last_step=e, num_updates=length) for e in ends]
    latest = Segment(kind="point", first_step=steps, last_step=steps, covered=True)
    weights_KP = torch.stack(
        [case.branch_P + noise * scale_P * torch.randn(len(scale_P), generator=generator) for _ in segments]
        + [case.branch_P]
    )
    return Snapshots(segments_K=(*segments, latest), weights_KP=weights_KP)


def searched(case: Case, given: Snapshots, pool: Pool, seed: int, *, is_tail: bool) -> dict[str, Any]:
    """Run one default search, or that of decayed runs, on a random split of the pool; judge its winner by the rest."""
    order = torch.randperm(len(pool.windows_NT), generator=torch.Generator().manual_seed(seed)).numpy()
    num_search, num_confirm = (BATCH_SIZE * NUM_EVAL_BATCHES[half] for half in ("search", "confirm"))
    search_half, confirm_half, rest = np.split(order, [num_search, num_search + num_confirm])
    case.batches = {"search": list(pool.windows_NT[search_half].split(BATCH_SIZE))}
    space = Tail() if is_tail else Grouped().bind([name for name, _ in case.model.named_parameters()])
    options: dict[str, Any] = {"anchors": (), "n_trials": TAIL_TRIALS} if is_tail else {"n_trials": NUM_TRIALS}

    def merge(c: Any) -> Tensor:
        return case.mix(given.weights_KP, c, space.group_of)

    run, _ = run_search(case, space, given.segments_K, merge, **options)
    merged_N = losses(case, merge(run.winner.candidate.coefficients), pool.windows_NT)
    differences_N = pool.latest_N - merged_N
    score_of = {True: by_batch(pool.latest_N[confirm_half]), False: by_batch(merged_N[confirm_half])}
    latest, winner = (
        type(t)(candidate=t.candidate, search=t.search, confirm=score_of[t is run.latest])
        for t in (run.latest, run.winner)
    )
    is_latest = run.winner is run.latest
    verdict = reach_verdict(latest if is_latest else winner, latest, latest, objectives=OBJECTIVES)
    return {
        "status": verdict.status,
        "winner": run.winner.candidate.name,
        "gain": verdict.gain,
        "interval": verdict.interval,
        "true_gain": float(differences_N[rest].mean()),
        "true_error": float(differences_N[rest].std(ddof=1) / len(rest) ** 0.5),
        "evaluations": run.num_batches / NUM_EVAL_BATCHES["search"],
        "differences_N": differences_N,
    }


def by_batch(losses_N: np.ndarray) -> Score:
    """Return windows' losses as a validation of batches has them."""
    values = losses_N.reshape(-1, BATCH_SIZE).mean(1)
    return Score(
        value=float(values.mean()),
        values_B=tuple(map(float, values)),
        sizes_B=(1.0,) * len(values),
        num_batches=len(values),
    )


def redrawn(differences_N: np.ndarray) -> dict[str, list[float]]:
    """Return how often a merge that gains nothing would be accepted, and rejected, by the number of batches.

    The differences are a real merge's, by window, less their mean; confirmation halves are drawn from them.
    """
    rng = np.random.default_rng(0)
    centred_N = differences_N - differences_N.mean()
    found = {}
    for num_batches in REDRAWN_BATCHES:
        accepted = rejected = 0
        for _ in range(NUM_REDRAWN):
            drawn = rng.choice(centred_N, num_batches * BATCH_SIZE, replace=False)
            _, interval = score_gain(by_batch(-drawn), by_batch(np.zeros_like(drawn)), 1)
            assert interval is not None
            accepted += interval[0] > 0
            rejected += interval[1] < 0
        found[str(num_batches)] = [accepted, rejected, NUM_REDRAWN]
    return found


def covers(found: dict[str, Any]) -> bool:
    """Whether a search's interval holds its true gain, of which the rest tells only so much: widened by that."""
    gain, (low, high) = found["gain"], found["interval"]
    wider = (1 + 1 / NUM_REST) ** 0.5
    return bool(gain - wider * (gain - low) <= found["true_gain"] <= gain + wider * (high - gain))


def decided(results: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return all runs' searches of a kind."""
    return [found for result in results for found in result.get(kind, [])]
