"""Score every method on every trained run, offline: a merge is a weighted sum of stored segment means.

python -m benchmarks.quality.measure [RUN ...]

Each run's scores go to ``scores.json`` beside its trail.

Letters: K snapshots, oldest first; P parameters, as one vector; B batches; M segments of the trail.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT
from optuna.samplers import BaseSampler
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import vector_to_parameters

from benchmarks.quality import RUNS
from benchmarks.quality.data import CONTEXT, eval_batches
from lightning_ckmerge.buffer.ring import Drop, decide, pooled
from lightning_ckmerge.core.outcome import Score, Trial
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, Pairwise, Space
from lightning_ckmerge.search.budget import Budget
from lightning_ckmerge.search.engine import Half, KeepGoing, Problem, Search
from lightning_ckmerge.search.hedge import GPHedgeSampler
from lightning_ckmerge.search.study import SearchStudy, make_sampler

CAPACITY = 10
NUM_TRIALS = 16
# A pair of checkpoints this many segments apart: of 1, 3, 5, 10 and 20 the best at lam = 0.5 on a run of 500 steps.
PAIR_SPACING = 3
ANCHORS = ("uniform", "ema")
SPLITS = ("search", "confirm", "test", "other")


@dataclass
class Evaluator:
    """Scores weights on the splits.

    Args:
        batches: Split -> its batches.
        snapshots_KP: What coefficients mix.
    """

    batches: dict[str, list[Tensor]]
    snapshots_KP: Tensor = field(default_factory=lambda: torch.empty(0))
    model: GPT = field(default_factory=lambda: GPT(context=CONTEXT))

    def num_batches(self, half: Half) -> int:
        return len(self.batches[half])

    def __call__(self, c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
        return self.score(torch.tensor(c_K) @ self.snapshots_KP, half, keep_going)

    @torch.no_grad()
    def score(self, weights_P: Tensor, split: str, keep_going: KeepGoing | None = None) -> Score:
        """Return the mean loss in nats a byte."""
        vector_to_parameters(weights_P, self.model.parameters())
        values_B: list[float] = []
        for batch in self.batches[split]:
            logits = self.model(batch[:, :-1])
            values_B.append(float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())))
            if keep_going is not None and not keep_going(values_B, [1.0] * len(values_B)):
                break
        return Score(
            value=sum(values_B) / len(values_B),
            values_B=tuple(values_B),
            sizes_B=(1.0,) * len(values_B),
            num_batches=len(values_B),
            complete=len(values_B) == len(self.batches[split]),
        )

    def losses(self, weights_P: Tensor) -> dict[str, float]:
        """Return the loss on every split."""
        return {split: self.score(weights_P, split).value for split in SPLITS}


def measure(directory: Path) -> dict[str, Any]:
    """Return a run's reference losses and what each method reached."""
    about = json.loads((directory / "run.json").read_text())
    trail, branch, further = (load_file(directory / f"{n}.safetensors") for n in ("trail", "branch", "further"))
    evaluator = Evaluator(eval_batches(about["corpus"]))
    steps = about["segment_steps"]
    latest_P = trail["points_MP"][-1]
    found: dict[str, Any] = {
        "run": about,
        "latest": evaluator.losses(latest_P),
        "decay_branch": evaluator.losses(branch["points_MP"][-1]),
        "methods": {},
    }
    ours = ring(trail["means_MP"], steps)
    pair = pair_of_points(trail["points_MP"], steps)
    # The control: the branch's own trail, where the rate has fallen to 0.
    before = trail["means_MP"][: len(trail["means_MP"]) - len(branch["means_MP"])]
    decayed = ring(torch.cat([before, branch["means_MP"]]), steps)
    points_KP = torch.cat([decayed[1], branch["points_MP"][-1:]])
    means_KP = torch.cat([ours[1], latest_P[None]])
    spaces: dict[str, tuple[tuple[Segment, ...], Tensor, Space, BaseSampler | None]] = {
        "decay": (ours[0], means_KP, Decay(), None),
        "decay, power kernel": (ours[0], means_KP, Decay(kernel="power"), None),
        "EMA length searched": (ours[0], means_KP, Decay(max_extrapolation=0), None),
        "pair (GP-Hedge)": (*pair, Pairwise(), GPHedgeSampler(seed=0)),
        "decay, after a decay": (decayed[0], points_KP, Decay(), None),
    }
    for name, (segments_K, snapshots_KP, space, sampler) in spaces.items():
        evaluator.snapshots_KP = snapshots_KP
        found["methods"][name] = search(evaluator, segments_K, space, sampler, ANCHORS if name == "decay" else ())
        print(directory.name, name, flush=True)
    found["further"] = [
        {
            "step": about["num_steps"] + (m + 1) * steps,
            "confirm": evaluator.score(further["points_MP"][m], "confirm").value,
        }
        for m in range(4, len(further["points_MP"]), 5)
    ]
    return found


def search(
    evaluator: Evaluator,
    segments_K: tuple[Segment, ...],
    space: Space,
    sampler: BaseSampler | None,
    anchors: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one search of the package, and score its winner, and the best of each kind of anchor, on every split."""
    problem = Problem(mode="min", space=space, segments_K=segments_K, n_trials=NUM_TRIALS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:

        def open_study(latest: Score) -> SearchStudy:
            return SearchStudy(
                Path(folder) / "journal",
                "search",
                sampler=make_sampler(sampler, 0),
                intervals=space.coordinates(segments_K),
                mode="min",
                fingerprint="",
            )

        run = Search(problem=problem, evaluate=evaluator, open_study=open_study, budget=Budget(), agree=lambda f: f())
        run.run()
    seconds = time.monotonic() - start
    full = evaluator.num_batches("search")
    return {
        "winner": run.winner.candidate.name,
        "coordinates": run.winner.candidate.coordinates,
        "losses": _losses(evaluator, run.winner),
        "anchors": {kind: _losses(evaluator, _best(run.anchors, kind)) for kind in anchors},
        "evaluations": run.num_batches / full,
        "evaluations_unstaged": (run.num_batches + run.num_batches_saved) / full,
        "seconds": seconds,
    }


def _best(anchors: Sequence[Trial], prefix: str) -> Trial:
    return min((t for t in anchors if t.candidate.name.startswith(prefix)), key=lambda t: t.search.value)


def _losses(evaluator: Evaluator, trial: Trial) -> dict[str, float]:
    return evaluator.losses(torch.tensor(trial.candidate.coefficients_K) @ evaluator.snapshots_KP)


def ring(means_MP: Tensor, segment_steps: int) -> tuple[tuple[Segment, ...], Tensor]:
    """Return what a geometric buffer holds at the end, with the latest weights' place, and the K - 1 pooled means."""
    segments: list[Segment] = []
    for m in range(len(means_MP)):
        first = m * segment_steps + 1
        last = first + segment_steps - 1
        segments.append(Segment(kind="mean", first_step=first, last_step=last, num_updates=segment_steps))
        while (todo := decide(segments, capacity=CAPACITY, layout="geometric", finest=segment_steps)) is not None:
            if isinstance(todo, Drop):
                del segments[todo.index]
            else:
                segments[todo.index : todo.index + 2] = [pooled(*segments[todo.index : todo.index + 2])]
    pools = [means_MP[(s.first_step - 1) // segment_steps : s.last_step // segment_steps].mean(0) for s in segments]
    end = segments[-1].last_step
    latest = Segment(kind="point", first_step=end, last_step=end, covered=True)
    return (*segments, latest), torch.stack(pools)


def pair_of_points(points_MP: Tensor, segment_steps: int) -> tuple[tuple[Segment, ...], Tensor]:
    """Return the latest weights and the point before them, some segments apart."""
    end, length = len(points_MP) * segment_steps, PAIR_SPACING * segment_steps
    segments = [Segment(kind="point", first_step=last - length + 1, last_step=last) for last in (end - length, end)]
    return tuple(segments), points_MP[[-1 - PAIR_SPACING, -1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of benchmarks/quality/runs; all of them by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.runs or sorted(p.parent.name for p in RUNS.glob("*/run.json")):
        scores = measure(RUNS / name)
        (RUNS / name / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
