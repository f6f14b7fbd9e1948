"""A GAN on digits: two optimizers, stepped by hand, and a monitor that is no loss.

    python examples/gan_digits.py [--trainer.max_steps=2000 and the like]

Everything is written under ``runs/gan-digits``, which a new run replaces: also ``before.png`` and ``after.png``, in
which the latest weights and the merge turn the same noise into digits.

Letters: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from digits import NUM_CLASSES, SIDE, Passes, digits, feature_net, frechet_distance, save_grid
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.kid import poly_mmd

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("runs/gan-digits")
NUM_LATENT = 32
NUM_GENERATED = 1000
NUM_EVAL_BATCH = 100


class GAN(LightningModule):
    """A generator and a discriminator, both MLPs that are given the label, trained by Adam in turn.

    Validation logs the kernel distance of generated pictures to real ones, in the features of a small classifier. Its
    estimate on a batch is unbiased, unlike the Frechet distance's, so that its mean over batches means something.

    Args:
        width: Features of both networks.
        learning_rate: Adam's, of both.

    Source:
        Goodfellow et al. 2014, arXiv:1406.2661; the kernel distance is Binkowski et al.'s, arXiv:1801.01401, here with
        a classifier of digits in the place of Inception.
    """

    def __init__(self, width: int = 256, learning_rate: float = 5e-4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = learning_rate
        self.generator = nn.Sequential(
            nn.Linear(NUM_LATENT + NUM_CLASSES, width),
            nn.LayerNorm(width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.SiLU(),
            nn.Linear(width, SIDE * SIDE),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(SIDE * SIDE + NUM_CLASSES, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )

    def generate(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return images ``(N, 1, H, W)`` of the labels."""
        images: Tensor = self.generator(torch.cat([noise, one_hot(labels)], 1))
        return images.view(-1, 1, SIDE, SIDE)

    def judge(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the logit ``(N,)`` of each image being real."""
        logits: Tensor = self.discriminator(torch.cat([images.flatten(1), one_hot(labels)], 1))
        return logits[:, 0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        generator, discriminator = self.optimizers()
        fakes = self.generate(torch.randn(len(images), NUM_LATENT, device=self.device), labels)

        self.toggle_optimizer(discriminator)
        # softplus(-x) is the cross-entropy of calling x real, softplus(x) of calling it false.
        loss = (F.softplus(-self.judge(images, labels)) + F.softplus(self.judge(fakes.detach(), labels))).mean()
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)

        self.toggle_optimizer(generator)
        loss = F.softplus(-self.judge(fakes, labels)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)

    def distance(self, batch: list[Tensor]) -> Tensor:
        """Return the kernel distance of as many generated images to a batch of real ones."""
        images, _, noise, places = batch
        # With the real ones' labels, the two samples would depend on each other, and the estimate be too low.
        labels = (places * NUM_CLASSES).long()
        features = feature_net()
        return poly_mmd(features(images), features(self.generate(noise, labels)))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_kernel_distance", self.distance(batch), prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), self.learning_rate, betas=(0.5, 0.99))
            for part in (self.generator, self.discriminator)
        ]


def one_hot(labels: Tensor) -> Tensor:
    """Return ``(N, 10)`` floats."""
    return F.one_hot(labels, NUM_CLASSES).float()


class Digits(LightningDataModule):
    """Digits; those to judge by come with noise to generate others from, the same in every run.

    Args:
        batch_size: Images a batch in training.
        num_passes: Passes over the 400 images of the validation and test splits, each with other noise.
    """

    def __init__(self, batch_size: int = 64, num_passes: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_passes = num_passes

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*digits("train")), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Passes("val", self.num_passes, (NUM_LATENT,), seed=1), NUM_EVAL_BATCH)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Passes("test", self.num_passes, (NUM_LATENT,), seed=2), NUM_EVAL_BATCH)


def main(overrides: Sequence[str] = ()) -> None:
    start(RUN)
    cli = fit(CONFIG, overrides)
    ours, pair = (LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-pair"))
    labels = torch.arange(NUM_GENERATED) % NUM_CLASSES
    noise = torch.randn(NUM_GENERATED, NUM_LATENT, generator=torch.Generator().manual_seed(0))

    def distance(module: GAN) -> float:
        return frechet_distance(module.generate(noise, labels), "test")

    compared = contenders(ours, pair)
    measured = {
        name: measure(cli, weights, score=GAN.distance, extras={"Frechet distance": distance})
        for name, weights in compared.items()
    }
    for name, file in {LATEST: "before.png", OURS: "after.png"}.items():
        cli.model.load_state_dict(compared[name], strict=False)
        with torch.no_grad():
            save_grid(RUN / file, cli.model.generate(noise[:50], labels[:50]))
    conclude("Kernel distance to real digits", measured, ours, pair, RUN)
    print(f"pictures  {RUN / 'before.png'} of the latest weights, {RUN / 'after.png'} of ours, from the same noise")


if __name__ == "__main__":
    main(command_line())
