"""How runs are trained: optimizers, schedules, and what goes wrong on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

WARMUP_STEPS = 50
BRANCH_SHARE = 0.2
# A cosine that would reach 0 only later leaves 21 % of the rate at the run's end.
COSINE_SHARE = 0.7
NUM_CYCLES = 20
LOWEST_OF_CYCLE = 0.05
SPIKE_SHARE, SPIKE_STEPS, SPIKE_RATE = 0.9, 10, 3.0

Optimizers = Callable[[nn.Module, float], Sequence[Optimizer]]
Factor = Callable[[int, int], float]


def adamw(model: nn.Module, rate: float) -> list[Optimizer]:
    """Return AdamW over all parameters."""
    return [AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)]


def adam(model: nn.Module, rate: float) -> list[Optimizer]:
    """Return Adam, without weight decay."""
    return [AdamW(model.parameters(), rate, weight_decay=0.0)]


def sgd_of_images(model: nn.Module, rate: float) -> list[Optimizer]:
    """Return SGD with momentum and a weight decay."""
    return [SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)]


def sgd(model: nn.Module, rate: float) -> list[Optimizer]:
    """Return SGD with momentum, at a rate of its own."""
    return [SGD(model.parameters(), 0.3, momentum=0.9)]


def muon(model: nn.Module, rate: float) -> list[Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("blocks."))]
    return [Muon(matrices, lr=0.01, weight_decay=0.1), AdamW(rest, rate, betas=(0.9, 0.95), weight_decay=0.1)]


def constant(step: int, num_steps: int) -> float:
    """Return 1."""
    return 1.0


def cosine(share: float) -> Factor:
    """Return a half cosine, from 1 to 0, of which the run is this share."""
    return lambda step, num_steps: (1 + math.cos(math.pi * share * (step + 1) / num_steps)) / 2


def cyclic(step: int, num_steps: int) -> float:
    """Return half a cosine from 1 to its lowest, anew in each cycle."""
    length = num_steps // NUM_CYCLES
    place = (step % length + 1) / length
    return LOWEST_OF_CYCLE + (1 - LOWEST_OF_CYCLE) * (1 + math.cos(math.pi * place)) / 2


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How a run is trained.

    Args:
        optimizers: Makes them, each group at its highest rate.
        factor: Of the rates at a step, the warm-up apart.
        shrinks: Whether the twin's rate is the run's own, times a line to 0; else the line begins where the run's is.
        max_norm: Gradients are clipped to it.
        has_twin: Whether a copy of the run is decayed.
        has_spike: Whether a few late steps read random bytes at a high rate.
        in_bfloat16: Whether weights, gradients and moments are kept in bfloat16.
        num_bytes: Training text that is read, again and again; ``None``: all of it.
    """

    optimizers: Optimizers = adamw
    factor: Factor = constant
    shrinks: bool = False
    max_norm: float | None = None
    has_twin: bool = True
    has_spike: bool = False
    in_bfloat16: bool = False
    num_bytes: int | None = None

    def rate(self, step: int, num_steps: int, decay_from: int | None) -> float:
        """Return the factor of all rates at a step; ``decay_from`` is where a twin begins to decay."""
        factor = self.factor(step, num_steps)
        if decay_from is not None:
            before = factor if self.shrinks else self.factor(decay_from, num_steps)
            factor = before * (num_steps - step) / (num_steps - decay_from)
        if self.is_spike(step, num_steps):
            factor *= SPIKE_RATE
        return factor * min(1.0, (step + 1) / WARMUP_STEPS)

    def is_spike(self, step: int, num_steps: int) -> bool:
        """Whether this step is one of the bad ones."""
        first = round(SPIKE_SHARE * num_steps)
        return self.has_spike and first <= step < first + SPIKE_STEPS


REGIMES = {
    "constant": Regime(),
    "sgd": Regime(optimizers=sgd, max_norm=1.0),
    "muon": Regime(optimizers=muon),
    "epochs": Regime(num_bytes=64 * 1024),
    "cosine": Regime(factor=cosine(COSINE_SHARE)),
    "cosine to 0": Regime(factor=cosine(1.0), has_twin=False),
    "cyclic": Regime(factor=cyclic, shrinks=True),
    "spike": Regime(has_spike=True),
    "bf16": Regime(in_bfloat16=True),
    "images": Regime(optimizers=sgd_of_images),
    "denoising": Regime(optimizers=adam),
}


class InBfloat16:
    """Optimizers over bfloat16 copies of a model's weights, which stay in float32 for a CPU's sake, as rounded.

    Args:
        model: Its weights are rounded at once.
        make: Makes the optimizers over the copies.
    """

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Sequence[Optimizer]]) -> None:
        self._weights = list(model.parameters())
        copies = nn.Module()
        for i, weights in enumerate(self._weights):
            copies.register_parameter(str(i), nn.Parameter(weights.detach().bfloat16()))
        self._copies = list(copies.parameters())
        self.optimizers = make(copies)
        self._write()

    def step(self) -> None:
        """Round the gradients, and take a step in bfloat16."""
        for copy, weights in zip(self._copies, self._weights, strict=True):
            assert weights.grad is not None
            copy.grad = weights.grad.bfloat16()
        for optimizer in self.optimizers:
            optimizer.step()
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for copy, weights in zip(self._copies, self._weights, strict=True):
            weights.copy_(copy)


def random_bytes(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch that no text holds."""
    return torch.randint(256, batch.shape, generator=generator)
