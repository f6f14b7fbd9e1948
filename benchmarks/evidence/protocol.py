"""The runs of docs/protocol.md, by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence import RUNS
from benchmarks.evidence.regimes import REGIMES, Regime
from benchmarks.evidence.tasks import (
    Convolutions,
    CorpusName,
    Denoising,
    GPTText,
    LSTMText,
    MaskedText,
    Text,
    Trainable,
)

SEEDS = (10, 11, 12)
LADDER_STEPS = {"0.3M": (400, 1000, 4000), "1M": (400, 1000, 4000), "3M": (1000,), "10M": (1000,)}
REGIME_SIZE, REGIME_STEPS = "0.3M", 1000
ARCHITECTURES: dict[str, tuple[Callable[[], Trainable], str]] = {
    "lstm": (LSTMText, "constant"),
    "encoder": (MaskedText, "constant"),
    "batchnorm": (Convolutions, "images"),
    "unet": (Denoising, "denoising"),
}
PARTS = ("ladder", "regimes", "architectures", "referees", "verdicts")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the protocol.

    Args:
        cell: Its row of the protocol: runs that differ by seed alone share it.
        model: A GPT's size, or an architecture.
        regime: How it is trained.
        num_steps: A multiple of 100.
        seed: Of the first weights and of the batches.
        corpus: What text it reads.
    """

    cell: str
    model: str
    regime: str
    num_steps: int
    seed: int
    corpus: CorpusName = "torch"

    @property
    def directory(self) -> Path:
        """Where it is kept."""
        where = RUNS if self.corpus == "torch" else RUNS / self.corpus
        return where / f"{self.model}-{self.regime}-{self.num_steps}-{self.seed}".replace(" ", "-")

    @property
    def is_trained(self) -> bool:
        """Whether it is there, and whole."""
        return (self.directory / "run.json").exists()

    @property
    def how(self) -> Regime:
        """How it is trained."""
        return REGIMES[self.regime]

    def task(self) -> Trainable:
        """Return its model and data."""
        if self.model in ARCHITECTURES:
            task = ARCHITECTURES[self.model][0]()
            if isinstance(task, Text):
                task.corpus = self.corpus
            return task
        return GPTText(self.model, self.how.num_bytes, self.corpus, rounded=self.how.in_bfloat16)


def runs(part: str) -> list[Run]:
    """Return a part's runs, seed by seed, the cheap ones first."""
    return [run for seed in SEEDS for run in _cells(part, seed)]


def _cells(part: str, seed: int) -> list[Run]:
    if part == "ladder":
        cells = [(size, steps) for size, lengths in LADDER_STEPS.items() for steps in lengths]
        # A rough order by cost: the long runs of small models lie between the short runs of large ones.
        cells.sort(key=lambda cell: (cell[1] > 1000, list(LADDER_STEPS).index(cell[0])))
        return [
            Run(cell=f"{size}, {steps:,} steps", model=size, regime="constant", num_steps=steps, seed=seed)
            for size, steps in cells
        ]
    if part == "regimes":
        names = [name for name in REGIMES if name not in ("constant", "images", "denoising")]
        return [
            # The twin of a constant run is a warm-up, a stable and a decaying phase.
            Run(cell="wsd", model=REGIME_SIZE, regime="constant", num_steps=REGIME_STEPS, seed=seed),
            *(Run(cell=n, model=REGIME_SIZE, regime=n, num_steps=REGIME_STEPS, seed=seed) for n in names),
        ]
    if part == "architectures":
        return [
            Run(cell=name, model=name, regime=regime, num_steps=1000, seed=seed)
            for name, (_, regime) in ARCHITECTURES.items()
        ]
    return [Run(cell=part, model=REGIME_SIZE, regime="constant", num_steps=REGIME_STEPS, seed=seed)]
