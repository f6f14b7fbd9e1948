"""What merging gains once the learning rate has decayed, and what it finds where there is nothing to find.

python -m benchmarks.quality.after_decay [RUN ...] [--num-noise 100]     writes benchmarks/quality/after_decay.json

What is there is not measured again.

The decay branch's trail of each run, merged near its last weights by the package's short search, by the ordinary one,
and by published tail EMAs. Then the same short search over noise: each snapshot is the last weights plus Gaussian noise
as far away, tensor by tensor, as the snapshot was.

Letters: K snapshots, oldest first; P parameters, as one vector.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import RUNS
from benchmarks.quality.case import OBJECTIVES, Case, Snapshots, run_search
from benchmarks.quality.report import AFTER_DECAY, after_decay_told
from lightning_ckmerge.config import DEFAULT_ANCHORS, TAIL_TRIALS
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.core.spaces import Decay, Space, Tail, exponential_kernel
from lightning_ckmerge.core.spaces.groups import assign_groups
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.verdict import reach_verdict

SPLITS = ("search", "confirm", "test")
# Of 2,750 steps: the NanoGPT speed runs' tail EMA, which leaves the embeddings out.
PUBLISHED_TAU = 150 / 2750
PUBLISHED_LAMS = (0.6, 0.3)
NUM_NOISE = 100
# Windows a batch: the fewer, the more a verdict may err, and the sooner 100 searches are done.
NOISE_BATCH_SIZE = 4
SHORT, ORDINARY = "the short search", "the ordinary search"


def search(case: Case, snapshots: Snapshots, space: Space, **problem: Any) -> tuple[Search, Tensor, str]:
    """Run one search with its confirmation, and return it, the winner's weights and the verdict's status."""

    def merge(c: Coefficients) -> Tensor:
        return case.mix(snapshots.weights_KP, c, {})

    run, _ = run_search(case, space, snapshots.segments_K, merge, **problem)
    run.confirm()
    verdict = reach_verdict(run.winner, run.latest, run.best_anchor, objectives=OBJECTIVES)
    return run, merge(run.winner.candidate.coefficients), verdict.status


def short_search(case: Case, snapshots: Snapshots) -> tuple[Search, Tensor, str]:
    """Run the search that the package runs after a decay."""
    return search(case, snapshots, Tail(), n_trials=TAIL_TRIALS, anchors=())


def tail_ema(case: Case, lam: float) -> Tensor:
    """Return the last weights moved by ``lam`` towards an EMA, but for the embeddings."""
    segments_K, weights_KP = case.decayed.segments_K, case.decayed.weights_KP
    kernel_K = exponential_kernel(segments_K, PUBLISHED_TAU * case.about["num_steps"])
    latest_K = (0.0,) * (len(segments_K) - 1) + (1.0,)
    group_of = assign_groups([name for name, _ in case.model.named_parameters()], "kind")
    moved_K = tuple((1 - lam) * l + lam * k for l, k in zip(latest_K, kernel_K, strict=True))
    by_group = {group: latest_K if group == "embeddings" else moved_K for group in set(group_of.values())}
    return case.mix(weights_KP, by_group, group_of)


def noisy(case: Case, seed: int) -> Snapshots:
    """Return the decayed snapshots, their differences from the last weights replaced by noise of the same size."""
    generator = torch.Generator().manual_seed(seed)
    latest_P = case.decayed.weights_KP[-1]
    sizes = [p.numel() for p in case.model.parameters()]
    rows = [latest_P]
    for weights_P in reversed(case.decayed.weights_KP[:-1]):
        parts = (weights_P - latest_P).split(sizes)
        noise = [torch.randn(len(p), generator=generator) * p.square().mean().sqrt() for p in parts]
        rows.insert(0, latest_P + torch.cat(noise))
    return replace(case.decayed, weights_KP=torch.stack(rows))


def measure(case: Case) -> dict[str, Any]:
    """Return each method's gain over the last weights in nats a byte, by split, and what the searches took."""
    full = len(case.batches["search"])
    before = {split: case.score(case.branch_P, split).value for split in SPLITS}
    found: dict[str, Any] = {}

    def keep(name: str, weights_P: Tensor, **about: Any) -> None:
        gains = {split: round(before[split] - case.score(weights_P, split).value, 6) for split in SPLITS}
        found[name] = {"gains": gains, **about}

    for lam in PUBLISHED_LAMS:
        keep(f"tail EMA, lam {lam}", tail_ema(case, lam))
    searches = {
        SHORT: short_search(case, case.decayed),
        ORDINARY: search(case, case.decayed, Decay(), n_trials=16, anchors=DEFAULT_ANCHORS),
    }
    for name, (run, weights_P, status) in searches.items():
        confirmed = sum(s.confirm.num_batches for s in (*run.anchors, *run.trials) if s.confirm)
        winner = run.winner.candidate
        about = {"winner": winner.name, "coordinates": winner.coordinates, "status": status}
        keep(name, weights_P, evaluations=(run.num_batches - confirmed) / full, **about)
    return found


def over_noise(cases: Mapping[str, Case], num_searches: int) -> dict[str, int]:
    """Return how often each verdict was reached, over noise and small batches."""
    found: Counter[str] = Counter()
    for case in cases.values():
        case.batches = {split: [b[:NOISE_BATCH_SIZE] for b in case.batches[split]] for split in ("search", "confirm")}
    for seed in range(num_searches):
        case = list(cases.values())[seed % len(cases)]
        found[short_search(case, noisy(case, seed))[2]] += 1
        print("over noise:", dict(found), flush=True)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of benchmarks/quality/runs; all of them by default")
    parser.add_argument(
        "--num-noise", type=int, default=0, help=f"searches over noise, over all runs, such as {NUM_NOISE}"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.runs or sorted(p.parent.name for p in RUNS.glob("*/run.json"))
    results = {} if not AFTER_DECAY.exists() else json.loads(AFTER_DECAY.read_text())
    for name in names:
        if not args.num_noise and name not in results.get("runs", {}):
            results.setdefault("runs", {})[name] = measure(Case(RUNS / name))
            AFTER_DECAY.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(results["runs"][name]), flush=True)
    if args.num_noise:
        found = over_noise({name: Case(RUNS / name) for name in names}, args.num_noise)
        results = {**json.loads(AFTER_DECAY.read_text()), "noise": found}
        AFTER_DECAY.write_text(json.dumps(results, indent=1) + "\n")
    print(after_decay_told(results))


if __name__ == "__main__":
    main()
