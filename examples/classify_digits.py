"""Classify digits with a small convolutional network with BatchNorm, whose statistics a merge has to get right.

    python examples/classify_digits.py [--trainer.max_steps=800 and the like]

Everything is written under ``runs/classify-digits``, which a new run replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import (
    LastSearch,
    command_line,
    conclude,
    contenders,
    fit,
    measure,
    start,
)
from digits import NUM_CLASSES, Split, digits, shifted
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset, default_collate

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("runs/classify-digits")
ANEW = ", statistics anew"


class Classifier(LightningModule):
    """A convolutional network with BatchNorm, trained by SGD at a constant learning rate.

    Args:
        width: Channels of the first half; the second has twice as many.
        learning_rate: SGD's, with momentum 0.9.
    """

    def __init__(self, width: int = 32, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            *block(1, width),
            *block(width, width),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, NUM_CLASSES),
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)


def block(num_in: int, num_out: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution, its BatchNorm and what bends it."""
    return [nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]


def distorted(images: Tensor, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Return images moved by up to one pixel, under noise of this standard deviation; black to white is 2."""
    return shifted(images, generator) + noise * torch.randn(images.shape, generator=generator)


def frozen(split: Split, noise: float, num_passes: int, seed: int) -> TensorDataset:
    """Return ``num_passes`` distorted passes over a split that are the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits(split)
    return TensorDataset(distorted(images.repeat(num_passes, 1, 1, 1), noise, generator), labels.repeat(num_passes))


class Digits(LightningDataModule):
    """Digits under noise, so that they are not too easy.

    Args:
        batch_size: Images a batch; 400 must be an even number of them.
        noise: Standard deviation of the noise; black to white is 2.
        num_passes: Passes over the 400 images of the validation and test splits, each with other noise.
    """

    def __init__(self, batch_size: int = 50, noise: float = 0.5, num_passes: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.noise = noise
        self.num_passes = num_passes

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        data = TensorDataset(*digits("train"))
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.distort)

    def distort(self, samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Return a training batch, its images distorted anew each time."""
        images, labels = default_collate(samples)
        return [distorted(images, self.noise), labels]

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(frozen("val", self.noise, self.num_passes, seed=1), self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(frozen("test", self.noise, self.num_passes, seed=2), self.batch_size)


def main(overrides: Sequence[str] = ()) -> None:
    start(RUN)
    cli = fit(CONFIG, overrides)
    averaged, anew, pair = (
        LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-recalibrated", "merges-pair")
    )
    num_batches = cli.config.trainer.callbacks[0].init_args.evaluation.recalibrate_batches
    training = list(islice(cli.datamodule.train_dataloader(), num_batches))

    def recalibrate(module: Classifier) -> None:
        update_bn(training, module.net)

    def accuracy(module: Classifier) -> float:
        hits = [(module.net(x).argmax(1) == y).float().mean() for x, y in cli.datamodule.test_dataloader()]
        return float(torch.stack(hits).mean())

    extras = {"accuracy": accuracy}
    measured = {name: measure(cli, w, extras=extras) for name, w in contenders(averaged, pair).items()}
    for name, weights in contenders(anew, pair).items():
        measured[f"{name}{ANEW}"] = measure(cli, weights, extras=extras, prepare=recalibrate)
    print(f"\nStatistics anew: BatchNorm's, estimated for these weights on {num_batches} training batches.")
    conclude("Cross-entropy in nats", measured, anew, pair, RUN)


if __name__ == "__main__":
    main(command_line())
