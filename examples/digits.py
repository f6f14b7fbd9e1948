"""The handwritten digits that ship with scikit-learn, in three splits, and a space in which pictures are compared.

Letters: N images, H and W their sides (8), F features.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

Split = Literal["train", "val", "test"]
NUM_EVAL = 400
SIDE = 8
NUM_CLASSES = 10
NUM_FEATURES = 32


@functools.cache
def digits(split: Split) -> tuple[Tensor, Tensor]:
    """Return a split's images ``(N, 1, H, W)``, in [-1, 1], and labels ``(N,)``: 400 to validate, 400 to test."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    chosen = {"val": order[:NUM_EVAL], "test": order[NUM_EVAL : 2 * NUM_EVAL], "train": order[2 * NUM_EVAL :]}[split]
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    return images[chosen], torch.from_numpy(bunch.target).long()[chosen]


def shifted(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return ``(N, 1, H, W)`` images, each moved by up to one pixel either way."""
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    rows, columns = torch.randint(3, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, rows, columns]


class Passes(Dataset[tuple[Tensor, ...]]):
    """Several passes over a split, each sample with noise of its own that never changes.

    A pass has an even number of batches, so that an image is always in the search half or always in the other.

    Args:
        split: Whose images.
        num_passes: How often each image is used.
        noise_shape: Shape of the normal noise that comes with an image.
        seed: Of the noise.
    """

    def __init__(self, split: Split, num_passes: int, noise_shape: tuple[int, ...], seed: int = 0) -> None:
        self.images, self.labels = digits(split)
        generator = torch.Generator().manual_seed(seed)
        num_samples = num_passes * len(self.images)
        self.noise = torch.randn(num_samples, *noise_shape, generator=generator)
        self.places = torch.rand(num_samples, generator=generator)

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return an image ``(1, H, W)``, its label, noise, and a number in [0, 1)."""
        image = index % len(self.images)
        return self.images[image], self.labels[image], self.noise[index], self.places[index]


class Features(nn.Module):
    """A small classifier of digits whose last hidden layer is the space in which pictures are compared."""

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, NUM_FEATURES),
            nn.Tanh(),  # features of one size, for kernels
        )
        self.classify = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(N, F)`` features of ``(N, 1, H, W)`` images."""
        features: Tensor = self.hidden(images)
        return features


@functools.cache
def feature_net(num_steps: int = 200) -> Features:
    """Return the classifier, trained on the training split, the same in every run; it leaves the random state alone."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = Features()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        images, labels = digits("train")
        for _ in range(num_steps):
            batch = torch.randint(len(images), (64,))
            loss = F.cross_entropy(net.classify(net(shifted(images[batch]))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def frechet_distance(generated: Tensor, split: Split) -> float:
    """Return the Frechet distance of ``(N, 1, H, W)`` generated images to a split's, between their features.

    Source:
        Heusel et al. 2017, arXiv:1706.08500, here with a classifier of digits in the place of Inception.
    """
    metric = FrechetInceptionDistance(feature=feature_net(), normalize=True)
    metric.update(digits(split)[0], real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def save_grid(path: Path, images: Tensor, num_columns: int = 10, scale: int = 6) -> None:
    """Write ``(N, 1, H, W)`` images in [-1, 1] as one small PNG, row by row."""
    N = len(images) - len(images) % num_columns
    rows = F.pad(images[:N, 0].clamp(-1, 1), (1, 0, 1, 0), value=-1.0).unflatten(0, (-1, num_columns))
    grid = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    pixels = ((1 - grid) * 127.5).round().byte()
    picture = Image.fromarray(pixels.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
