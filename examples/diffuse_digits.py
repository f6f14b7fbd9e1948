"""Denoising diffusion on digits: the denoising loss chooses, and pictures show what it was worth.

    python examples/diffuse_digits.py [--trainer.max_steps=800 and the like]

Everything is written under ``runs/diffuse-digits``, which a new run replaces: also ``before.png`` and ``after.png``, in
which the latest weights and the merge turn the same noise into digits.

Letters: N images, W the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import (
    LATEST,
    OURS,
    LastSearch,
    command_line,
    conclude,
    contenders,
    fit,
    measure,
    start,
)
from digits import NUM_CLASSES, SIDE, Passes, digits, frechet_distance, save_grid
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("runs/diffuse-digits")
NUM_GENERATED = 500
NUM_STEPS = 25


class Denoiser(nn.Module):
    """A residual MLP that tells the noise in a picture, given its label and how much noise there is.

    Args:
        width: Features.
        num_blocks: Residual blocks.
    """

    def __init__(self, width: int = 256, num_blocks: int = 3) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(SIDE * SIDE, width)
        self.label_embed = nn.Embedding(NUM_CLASSES, width)
        self.place_embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, SIDE * SIDE)

    def forward(self, images: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """Return the noise in ``(N, 1, H, W)`` images, of the same shape."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000), self.width // 2, device=images.device))
        waves = places[:, None] * frequencies
        condition_NW = self.place_embed(torch.cat([waves.sin(), waves.cos()], 1)) + self.label_embed(labels)
        x_NW = self.enter(images.flatten(1))
        for block in self.blocks:
            x_NW = block(x_NW, condition_NW)
        noise: Tensor = self.leave(self.norm(x_NW)).view_as(images)
        return noise


class Block(nn.Module):
    """An MLP on a normalised copy of the residual stream, to which the condition is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.shrink = nn.Linear(2 * width, width)

    def forward(self, x_NW: Tensor, condition_NW: Tensor) -> Tensor:
        return x_NW + self.shrink(F.silu(self.widen(self.norm(x_NW) + condition_NW)))


class Diffusion(LightningModule):
    """Trains a ``Denoiser`` with Adam at a constant learning rate, on the cosine schedule of noise.

    Args:
        denoiser: The model.
        learning_rate: Adam's.

    Source:
        Ho et al. 2020, arXiv:2006.11239; the schedule is Nichol and Dhariwal's, arXiv:2102.09672, the sampler Song et
        al.'s, arXiv:2010.02502.
    """

    def __init__(self, denoiser: Denoiser, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.learning_rate = learning_rate

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean squared error of the noise that is told, in units of its variance."""
        images, labels, noise, places = batch
        signal, sigma = scales(places)
        return F.mse_loss(self.denoiser(signal * images + sigma * noise, places, labels), noise)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return self.loss([images, labels, torch.randn_like(images), torch.rand(len(images), device=self.device)])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)

    @torch.no_grad()
    def sample(self, labels: Tensor, seed: int = 0) -> Tensor:
        """Return an image ``(N, 1, H, W)`` for each label; the seed alone decides the noise that they begin as."""
        x = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        times = torch.linspace(0.99, 0, NUM_STEPS + 1)
        for now, then in pairwise(times):
            places = now.expand(len(labels))
            (signal, sigma), (next_signal, next_sigma) = scales(places), scales(then.expand(len(labels)))
            noise = self.denoiser(x, places, labels)
            clean = ((x - sigma * noise) / signal).clamp(-1, 1)
            x = next_signal * clean + next_sigma * (x - signal * clean) / sigma
        return x


def scales(places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors ``(N, 1, 1, 1)`` of the image and of the noise at ``(N,)`` places in [0, 1), noise last."""
    angle = (places * math.pi / 2).view(-1, 1, 1, 1)
    return angle.cos(), angle.sin().clamp(min=1e-4)


class Digits(LightningDataModule):
    """Digits; those to judge by come with noise of their own, the same in every run.

    Args:
        batch_size: Images a batch in training.
        num_passes: Passes over the 400 images of the validation and test splits, each with other noise.
    """

    def __init__(self, batch_size: int = 64, num_passes: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_passes = num_passes

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*digits("train")), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Passes("val", self.num_passes, (1, SIDE, SIDE), seed=1), 50)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Passes("test", self.num_passes, (1, SIDE, SIDE), seed=2), 50)


def main(overrides: Sequence[str] = ()) -> None:
    start(RUN)
    cli = fit(CONFIG, overrides)
    ours, pair = (LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-pair"))
    labels = torch.arange(NUM_GENERATED) % NUM_CLASSES

    def distance(module: Diffusion) -> float:
        return frechet_distance(module.sample(labels), "test")

    compared = contenders(ours, pair)
    measured = {name: measure(cli, w, extras={"Frechet distance": distance}) for name, w in compared.items()}
    for name, file in {LATEST: "before.png", OURS: "after.png"}.items():
        cli.model.load_state_dict(compared[name], strict=False)
        save_grid(RUN / file, cli.model.sample(labels[:50]))
    conclude("Denoising loss", measured, ours, pair, RUN)
    print(f"pictures  {RUN / 'before.png'} of the latest weights, {RUN / 'after.png'} of ours, from the same noise")


if __name__ == "__main__":
    main(command_line())
