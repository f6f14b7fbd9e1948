"""Train the runs that the benchmark merges, and keep their trails.

python -m benchmarks.quality.train --seeds 0 1 2 --corpora python cpp [--size small] [--precision float32]

Each run trains at a constant learning rate after a warm-up. From its checkpoint at 80 % a branch goes on over the same
batches with a learning rate that falls linearly to 0; the run itself goes on for another quarter, to see how many more
steps a merge is worth. Of each, the mean over every segment of 1 % of the run and the weights at its end are kept.

Letters: P parameters of the model, as one vector; M segments.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from gpt import GPT
from pretraining import Windows
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.quality import RUNS
from benchmarks.quality.data import BATCH_SIZE, CONTEXT, CORPORA, read_corpus

LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
NUM_SEGMENTS = 100
BRANCH_SHARE = 0.2
FURTHER_SHARE = 0.25
# Arguments of ``GPT``: a million parameters, and a third of that.
SIZES: dict[str, dict[str, int]] = {"medium": {}, "small": {"num_layers": 3, "num_heads": 3, "width": 96}}


class Training:
    """A model, its optimizer and its batches; copied, both copies go on alike.

    Args:
        corpus: What it reads.
        seed: Of the initial weights and of the order of the batches.
        num_steps: Length of the run, without the further steps.
        size: One of ``SIZES``.
        precision: ``bfloat16``, which is slow on processors that do not know it, or ``float32``.
    """

    def __init__(self, corpus: str, seed: int, num_steps: int, size: str, precision: str) -> None:
        torch.manual_seed(seed)
        self.model = GPT(context=CONTEXT, **SIZES[size])
        self.precision = precision
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.windows = Windows(read_corpus(corpus)["train"], CONTEXT)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(seed)
        self.num_steps = num_steps
        self.step = 0

    def advance(self, decay_from: int | None = None) -> None:
        """Take one optimizer step; from ``decay_from`` on the learning rate falls linearly to 0."""
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS)
        if decay_from is not None:
            rate *= (self.num_steps - self.step) / (self.num_steps - decay_from)
        self.optimizer.param_groups[0]["lr"] = rate * LEARNING_RATE
        chosen = torch.randint(len(self.windows), (BATCH_SIZE,), generator=self.generator).tolist()
        batch = torch.stack([self.windows[i] for i in chosen]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.model(batch[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def weights(self) -> Tensor:
        """Return a copy of the weights, ``(P,)``."""
        with torch.no_grad():
            return parameters_to_vector(self.model.parameters()).clone()

    def segments(
        self, num_steps: int, segment_steps: int, decay_from: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Advance by ``num_steps``, and yield ``mean`` and ``point`` of each segment, ``(P,)`` each."""
        for _ in range(num_steps // segment_steps):
            mean = torch.zeros_like(self.weights())
            for i in range(segment_steps):
                self.advance(decay_from)
                mean.lerp_(self.weights(), 1 / (i + 1))
            yield {"mean": mean, "point": self.weights()}


def train(
    corpus: str, seed: int, num_steps: int, directory: Path, *, size: str, precision: str, further_share: float
) -> None:
    """Train one run with its branch and its further steps, and write ``trail``, ``branch`` and ``further`` files."""
    start = time.monotonic()
    segment_steps = num_steps // NUM_SEGMENTS
    branch_steps = round(BRANCH_SHARE * num_steps)
    training = Training(corpus, seed, num_steps, size, precision)
    trail = list(training.segments(num_steps - branch_steps, segment_steps))
    branching = copy.deepcopy(training)
    branch = list(branching.segments(branch_steps, segment_steps, decay_from=branching.step))
    trail += training.segments(branch_steps, segment_steps)
    further = list(training.segments(round(further_share * num_steps), segment_steps))
    directory.mkdir(parents=True, exist_ok=True)
    for name, segments in (("trail", trail), ("branch", branch), ("further", further)):
        stacked = {f"{kind}s_MP": _stacked([s[kind] for s in segments]) for kind in ("mean", "point")}
        save_file(stacked, directory / f"{name}.safetensors")
    about = {
        "corpus": corpus,
        "seed": seed,
        "num_steps": num_steps,
        "model": SIZES[size],
        "precision": precision,
        "segment_steps": segment_steps,
        "num_parameters": int(trail[0]["mean"].numel()),
        "seconds": time.monotonic() - start,
    }
    # Written last: its presence says that the run is whole.
    (directory / "run.json").write_text(json.dumps(about, indent=1) + "\n")


def _stacked(rows_MP: Sequence[Tensor]) -> Tensor:
    return torch.stack([*rows_MP]) if rows_MP else torch.empty(0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=CORPORA)
    parser.add_argument("--num-steps", type=int, default=1000, help=f"a multiple of {NUM_SEGMENTS}")
    parser.add_argument("--size", default="medium", choices=SIZES)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--further-share", type=float, default=FURTHER_SHARE, help="of the run's steps, after its end")
    args = parser.parse_args()
    for seed in args.seeds:
        for corpus in args.corpora:
            suffix = "" if args.size == "medium" else f"-{args.size}"
            directory = RUNS / f"{corpus}-{seed}-{args.num_steps}{suffix}"
            if not (directory / "run.json").exists():
                train(
                    corpus,
                    seed,
                    args.num_steps,
                    directory,
                    size=args.size,
                    precision=args.precision,
                    further_share=args.further_share,
                )
                print(directory.name, flush=True)


if __name__ == "__main__":
    main()
