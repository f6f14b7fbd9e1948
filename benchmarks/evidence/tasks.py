"""Models and data: byte-level GPTs and their like over PyTorch's own sources, and digits.

Letters: N samples in a batch, T bytes in a window, W a model's width.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim.swa_utils import update_bn

# Before the examples' modules: it puts their folder on the path.
from benchmarks.quality.case import Task

from classify_digits import Classifier, distorted  # isort: skip
from digits import NUM_CLASSES, digits, shifted  # isort: skip
from gpt import GPT, NUM_BYTES  # isort: skip
from pretraining import Windows, read_stdlib  # isort: skip

CONTEXT = 64
BATCH_SIZE = 8
IMAGES_A_BATCH = 50
# Every third batch of the validation data is the search's.
NUM_EVAL_BATCHES = {"search": 32, "confirm": 64, "test": 64}
RECALIBRATION_BATCHES = 16
SPLITS = ("train", "val", "test")
CorpusName = Literal["torch", "python"]
MASK, MASKED_SHARE, NOT_ASKED = NUM_BYTES, 0.15, -100


class Trainable(Task, ABC):
    """A task whose runs are trained here.

    Attributes:
        rate: AdamW's learning rate.
    """

    rate: float

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """Return a batch to train on."""

    def load(self, model: nn.Module, weights_P: Tensor) -> None:
        """Put weights into the model, ready to be scored."""
        vector_to_parameters(weights_P, model.parameters())
        model.eval()


@functools.cache
def read_torch() -> dict[str, bytes]:
    """Return PyTorch's own Python sources as ``train``, ``val`` and ``test``, split by file name."""
    root = Path(torch.__file__).parent
    texts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        bucket = hashlib.sha256(name.encode()).digest()[0] % 10
        texts["val" if bucket == 0 else "test" if bucket == 1 else "train"].append(path.read_bytes())
    return {split: b"".join(parts) for split, parts in texts.items()}


@functools.cache
def windows(
    split: str, num_bytes: int | None = None, num_windows: int | None = None, corpus: CorpusName = "torch"
) -> Windows:
    """Return windows of a split, of its first ``num_bytes``, all of them or a fixed sample."""
    texts = read_stdlib() if corpus == "python" else read_torch()
    return Windows(texts[split][:num_bytes], CONTEXT, num_windows)


def stacked(found: Windows, indices: list[int]) -> Tensor:
    """Return windows, ``(N, T + 1)``."""
    return torch.stack([found[i] for i in indices]).long()


class Text(Trainable):
    """Predicts the next byte.

    Args:
        num_bytes: Of the training text that is read; ``None``: all of it.
        corpus: PyTorch's own Python sources, or Python's standard library.
    """

    def __init__(self, num_bytes: int | None = None, corpus: CorpusName = "torch") -> None:
        self.num_bytes = num_bytes
        self.corpus = corpus
        self._order: list[int] = []

    def draw(self, generator: torch.Generator) -> Any:
        """Return windows of a pass over the text in random order."""
        found = windows("train", self.num_bytes, corpus=self.corpus)
        if len(self._order) < BATCH_SIZE:
            self._order = torch.randperm(len(found), generator=generator).tolist()
        chosen, self._order = self._order[-BATCH_SIZE:], self._order[:-BATCH_SIZE]
        return stacked(found, chosen)

    def batches(self) -> dict[str, list[Any]]:
        """Return the batches of each split."""
        num_val = NUM_EVAL_BATCHES["search"] + NUM_EVAL_BATCHES["confirm"]
        val, test = (
            stacked(found, list(range(len(found)))).split(BATCH_SIZE)
            for found in (
                windows("val", None, BATCH_SIZE * num_val, self.corpus),
                windows("test", None, BATCH_SIZE * NUM_EVAL_BATCHES["test"], self.corpus),
            )
        )
        return split_in_three(val) | {"test": list(test)}

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a byte."""
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def split_in_three(batches: Any) -> dict[str, list[Any]]:
    """Return every third batch as the search half, and the rest as the confirmation half."""
    return {"search": list(batches[::3]), "confirm": [b for i, b in enumerate(batches) if i % 3]}


@dataclass(frozen=True)
class Size:
    """A GPT's size."""

    num_layers: int
    width: int
    num_heads: int


SIZES = {
    "tiny": Size(1, 16, 2),  # of the tests
    "0.3M": Size(4, 80, 4),
    "1M": Size(5, 128, 4),
    "3M": Size(6, 208, 4),
    "10M": Size(8, 320, 8),
}


class GPTText(Text):
    """A GPT of a named size.

    Args:
        size: Its name.
        num_bytes: As for ``Text``.
        corpus: As for ``Text``.
        rounded: Whether weights are rounded to bfloat16 before they are scored.
    """

    def __init__(
        self, size: str, num_bytes: int | None = None, corpus: CorpusName = "torch", *, rounded: bool = False
    ) -> None:
        super().__init__(num_bytes, corpus)
        self.size = SIZES[size]
        self.rate = 2e-3 * (80 / self.size.width) ** 0.5
        self.rounded = rounded

    def model(self) -> nn.Module:
        """Return the GPT."""
        size = self.size
        return GPT(num_layers=size.num_layers, num_heads=size.num_heads, width=size.width, context=CONTEXT)

    def load(self, model: nn.Module, weights_P: Tensor) -> None:
        """Put weights into the model, rounded if its own are."""
        super().load(model, weights_P.bfloat16().float() if self.rounded else weights_P)


class LSTM(nn.Module):
    """A byte-level LSTM of two layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, NUM_BYTES)

    def forward(self, bytes_NT: Tensor) -> Tensor:
        """Return the logits of each next byte, ``(N, T, 256)``."""
        logits: Tensor = self.head(self.lstm(self.embed(bytes_NT))[0])
        return logits


class LSTMText(Text):
    """Predicts the next byte, by an LSTM."""

    rate = 4e-3

    def model(self) -> nn.Module:
        """Return the LSTM."""
        return LSTM()


class Encoder(nn.Module):
    """A transformer that sees both sides of each byte, its output layer tied to the embedding."""

    def __init__(self, num_layers: int = 3, width: int = 96, num_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES + 1, width)
        self.position = nn.Embedding(CONTEXT, width)
        layer = functools.partial(
            nn.TransformerEncoderLayer, width, num_heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES + 1)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, bytes_NT: Tensor) -> Tensor:
        """Return the logits of each byte, ``(N, T, 257)``."""
        x_NTW = self.embed(bytes_NT) + self.position.weight
        for layer in self.layers:
            x_NTW = layer(x_NTW)
        logits: Tensor = self.head(self.norm(x_NTW))
        return logits


class MaskedText(Text):
    """Predicts masked bytes, by an encoder. Each window to judge by is masked once and for all."""

    rate = 2e-3

    def model(self) -> nn.Module:
        """Return the encoder."""
        return Encoder()

    def draw(self, generator: torch.Generator) -> Any:
        """Return windows and what is asked of them."""
        return masked(super().draw(generator), generator)

    def batches(self) -> dict[str, list[Any]]:
        """Return the batches of each split, masked."""
        generator = torch.Generator().manual_seed(0)
        return {split: [masked(b, generator) for b in batches] for split, batches in super().batches().items()}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy of the masked bytes, in nats."""
        seen_NT, asked_NT = batch
        return F.cross_entropy(model(seen_NT).flatten(0, 1), asked_NT.flatten(), ignore_index=NOT_ASKED)


def masked(windows_NT: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows as the model sees them, and what it is asked: the bytes behind the masks."""
    bytes_NT = windows_NT[:, :CONTEXT]
    is_masked = torch.rand(bytes_NT.shape, generator=generator) < MASKED_SHARE
    return bytes_NT.masked_fill(is_masked, MASK), bytes_NT.masked_fill(~is_masked, NOT_ASKED)


class Images(Trainable):
    """A task on scikit-learn's digits. Those to judge by come with noise that never changes."""

    @abstractmethod
    def noisy(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        """Return a batch of these images."""

    def draw(self, generator: torch.Generator) -> Any:
        """Return a random batch of the training images."""
        images, labels = digits("train")
        chosen = torch.randint(len(labels), (IMAGES_A_BATCH,), generator=generator)
        return self.noisy(images[chosen], labels[chosen], generator)

    def batches(self) -> dict[str, list[Any]]:
        """Return the batches of each split; no image is in two of them."""
        generator = torch.Generator().manual_seed(0)
        images, labels = digits("val")
        third = torch.arange(len(labels)) % 3 == 0
        parts = {
            "search": (images[third], labels[third]),
            "confirm": (images[~third], labels[~third]),
            "test": digits("test"),
        }
        return {
            split: [
                self.noisy(images[chosen], labels[chosen], generator)
                for chosen in torch.randint(len(labels), (NUM_EVAL_BATCHES[split], IMAGES_A_BATCH), generator=generator)
            ]
            for split, (images, labels) in parts.items()
        }


class Convolutions(Images):
    """Classifies noisy digits by a convolutional network with BatchNorm, whose statistics are estimated anew."""

    rate = 0.1  # SGD's

    def model(self) -> nn.Module:
        """Return the network."""
        return Classifier().net

    def noisy(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        """Return images moved and under noise, and their labels."""
        return distorted(images, 0.5, generator), labels

    def load(self, model: nn.Module, weights_P: Tensor) -> None:
        """Put weights into the model, and estimate its statistics on training batches, the same every time."""
        super().load(model, weights_P)
        update_bn(_recalibration(), model)
        model.eval()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy in nats."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)


@functools.cache
def _recalibration() -> list[Any]:
    task, generator = Convolutions(), torch.Generator().manual_seed(1)
    return [task.draw(generator) for _ in range(RECALIBRATION_BATCHES)]


class UNet(nn.Module):
    """Tells the noise in a picture from three scales of it, given how much noise there is and the label."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.condition = nn.Embedding(NUM_CLASSES, width)
        self.place = nn.Linear(2, width)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(_convolutions(width * 2**i, width * 2 ** (i + 1), stride=2) for i in range(2))
        self.middle = _convolutions(4 * width, 4 * width)
        self.up = nn.ModuleList(_convolutions(width * 3 * 2**i, width * 2**i) for i in (1, 0))
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """Return the noise in ``(N, 1, H, W)`` images, of the same shape."""
        angle = places * torch.pi / 2
        told = self.condition(labels) + self.place(torch.stack([angle.sin(), angle.cos()], 1))
        scales = [self.enter(images) + told[:, :, None, None]]
        for block in self.down:
            scales.append(block(scales[-1]))
        x = self.middle(scales.pop())
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), scales.pop()], 1))
        noise: Tensor = self.leave(x)
        return noise


def _convolutions(num_in: int, num_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, stride, padding=1), nn.GroupNorm(4, num_out), nn.SiLU(),
        nn.Conv2d(num_out, num_out, 3, padding=1), nn.GroupNorm(4, num_out), nn.SiLU(),
    )  # fmt: skip


class Denoising(Images):
    """Denoises digits by a U-Net, on the cosine schedule of noise."""

    rate = 2e-3

    def model(self) -> nn.Module:
        """Return the U-Net."""
        return UNet()

    def noisy(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
        """Return noisy images, labels, places on the schedule, and the noise that is asked."""
        images = shifted(images, generator)
        noise = torch.randn(images.shape, generator=generator)
        places = torch.rand(len(images), generator=generator)
        angle = (places * torch.pi / 2).view(-1, 1, 1, 1)
        return angle.cos() * images + angle.sin() * noise, places, labels, noise

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean squared error of the noise."""
        seen, places, labels, noise = batch
        return F.mse_loss(model(seen, places, labels), noise)
