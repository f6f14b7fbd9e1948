"""Small models that an evaluation could leave traces in, and their data."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset

NUM_CLASSES = 3
NUM_FEATURES = 6
NUM_TRAIN = 48
NUM_VAL = 38
BATCH = 4


@dataclass(slots=True)
class Tracker:
    """An object of the user's own, without a ``__dict__``, inside another one."""

    best: float = float("inf")
    seen: list[int] = field(default_factory=list)
    draws: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))


class Classifier(pl.LightningModule):
    """BatchNorm, dropout, a frozen evaluation block, and state of every kind written in validation hooks.

    The training loss depends on that state, so a trace that a search leaves in it changes the weights too.
    """

    def __init__(self, optimizer: str = "adam", scheduler: str | None = "step", block: Callable[..., Any] = nn.Linear):
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.net = nn.Sequential(
            block(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, NUM_CLASSES)
        )
        self.frozen = nn.Sequential(nn.Linear(NUM_FEATURES, NUM_CLASSES), nn.BatchNorm1d(NUM_CLASSES))
        self.frozen.requires_grad_(False).eval()
        self.register_buffer("drift", torch.zeros(NUM_CLASSES), persistent=False)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.long))
        # One object for training and validation, and a collection whose members share one state.
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(NUM_CLASSES)
        shared = {"f1": torchmetrics.classification.MulticlassF1Score(NUM_CLASSES)}
        shared["precision"] = torchmetrics.classification.MulticlassPrecision(NUM_CLASSES)
        self.collection = torchmetrics.MetricCollection(shared)
        self.mean = torchmetrics.MeanMetric()
        self.num_validations = 0
        self.history: list[float] = []
        self.recent: deque[int] = deque(maxlen=3)
        self.table: OrderedDict[str, Any] = OrderedDict(a=1, nested={"b": [2]})
        self.names: set[str] = set()
        self.array = np.zeros(2)
        self.scale = torch.ones(())
        self.tracker = {"outer": SimpleNamespace(inner=Tracker())}
        self.dice = random.Random(3)
        self.coin = torch.Generator().manual_seed(4)

    @property
    def own(self) -> Tracker:
        return self.tracker["outer"].inner

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.1 * self.frozen(x) + self.drift

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        noise = self.dice.random() + float(self.own.draws.random()) + float(torch.rand((), generator=self.coin))
        kept = 0.001 * (self.num_validations + len(self.history) + len(self.table) + self.table["nested"]["b"][-1])
        factor = 1 + 0.01 * noise + kept + 1e-4 * float(self.array.sum() + self.scale) + 1e-5 * float(self.num_seen)
        loss = cross_entropy(logits, y) * factor / (1 + min(self.own.best, 1.0))
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.collection.update(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"train_{name}": value for name, value in self.collection.compute().items()})
        self.log("train_mean", self.mean.compute())
        self.collection.reset()
        self.mean.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y)
        with torch.no_grad():
            self.drift.add_(0.001 * logits.mean(0))
            self.num_seen.add_(len(y))
            self.scale.mul_(0.999)
        self.accuracy(logits, y)
        self.mean.update(loss)
        self.history.append(round(loss.item(), 3))
        self.own.seen.append(batch_idx)
        self.array += random.random() + self.dice.random() + np.random.rand()
        torch.rand((), generator=self.coin)
        self.own.draws.random()
        self.log("val_loss", loss, on_epoch=True, batch_size=len(y))
        self.log("val_acc", self.accuracy)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.num_validations += 1
        self.recent.append(self.num_validations)
        self.table[f"after {self.num_validations}"] = self.num_validations
        self.table.move_to_end("a")
        self.table["nested"]["b"].append(self.num_validations)
        self.names.add(f"validation {self.num_validations}")
        self.own.best = min(self.own.best, self.history[-1] if self.history else 1.0)
        self.drift = self.drift.clone()  # another object in the buffer's place
        self.lazily_set = self.num_validations
        self.log("val_hard", 1.0 + self.own.best)

    def own_state(self) -> dict[str, Any]:
        """Everything that the hooks above write, as comparable values."""
        return {
            "plain": repr(
                [self.num_validations, self.history, self.recent, self.table, sorted(self.names), self.own.seen]
            ),
            "lazy": getattr(self, "lazily_set", None),
            "best": self.own.best,
            "numbers": [self.array, self.scale],
            "random": [hash(self.dice.getstate()), str(self.own.draws.bit_generator.state), self.coin.get_state()],
            "metrics": [m.metric_state for m in self.modules() if isinstance(m, torchmetrics.Metric)],
            "counts": [m._update_count for m in self.modules() if isinstance(m, torchmetrics.Metric)],
        }

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        make = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD, "lbfgs": torch.optim.LBFGS}[self.optimizer]
        optimizer = make(parameters, lr=0.05)
        if self.scheduler == "step":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        return optimizer


class TwoOptimizers(Classifier):
    """Manual optimisation: the step counter moves by two a batch."""

    def __init__(self) -> None:
        super().__init__(scheduler=None)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = [m for m in self.net if list(m.parameters())]
        rest = [p for m in others for p in m.parameters()]
        return [torch.optim.SGD(first.parameters(), lr=0.05), torch.optim.Adam(rest, lr=0.01)]


class TinyGPT(pl.LightningModule):
    """A GPT-2 whose output layer is its embedding; dropout makes it draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"vocab_size": 19, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2}
        self.model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("val_loss", loss)
        return {"loss": loss}

    def own_state(self) -> dict[str, Any]:
        return {"tied": self.model.lm_head.weight is self.model.transformer.wte.weight}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Noisy(pl.LightningModule):
    """Learns the next of 16 symbols, at a rate too high to settle; one parameter is unused, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.mlp = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16)
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def loss(self, x: Tensor) -> Tensor:
        logits = self.head(self.norm(self.mlp(self.embed(x) * self.frozen).tanh()))
        return cross_entropy(logits, (x * 3 + 1) % 16, label_smoothing=0.3)

    def training_step(self, x: Tensor) -> Tensor:
        return self.loss(x)

    def validation_step(self, x: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = self.loss(x)
        self.log("val_loss", loss)
        self.log("val_gain", -loss)
        self.log("val_size", loss.square())
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("val_late", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Classified points. ``random`` adds noise: from the global generators, or from the data set's own."""

    def __init__(self, size: int, seed: int, noise: str = "none") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, NUM_FEATURES, generator=generator)
        plane = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=torch.Generator().manual_seed(9))
        self.y = (self.x @ plane + torch.randn(size, NUM_CLASSES, generator=generator)).argmax(1)
        self.noise = noise
        self.num_read = 0
        self.own = [np.random.default_rng(seed), torch.Generator().manual_seed(seed), random.Random(seed)]
        self.legacy = np.random.RandomState(seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.num_read += 1
        draws = 0.0
        if self.noise == "global":
            draws = float(torch.rand(())) + random.random() + np.random.rand()
        elif self.noise == "own":
            numpy, pytorch, python = self.own
            draws = numpy.random() + float(torch.rand((), generator=pytorch)) + python.random() + self.legacy.rand()
        return self.x[i] + 0.1 * draws, self.y[i]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same points without a length."""

    def __init__(self, size: int, seed: int, noise: str = "none") -> None:
        self.points = Points(size, seed, noise)

    def __iter__(self) -> Any:
        return (self.points[i] for i in range(len(self.points)))


class Tokens(Dataset[Tensor]):
    """Short sequences that a GPT can learn a little of."""

    def __init__(self, size: int, seed: int) -> None:
        start = torch.randint(0, 19, (size, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = (start + torch.arange(8) * 3) % 19

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Tensor:
        return self.tokens[i]


def points_loader(*, train: bool, noise: str = "none", iterable: bool = False, **options: Any) -> DataLoader[Any]:
    """A loader of points, with one short batch at the end of validation."""
    size, seed = (NUM_TRAIN, 1) if train else (NUM_VAL, 2)
    kind = Stream if iterable else Points
    options.setdefault("shuffle", train and not iterable)
    return DataLoader(kind(size, seed, noise), batch_size=2 * BATCH if train else BATCH, **options)


def tokens_loader(*, train: bool, **options: Any) -> DataLoader[Any]:
    """A loader of token sequences."""
    size, seed = (NUM_TRAIN, 1) if train else (NUM_VAL, 2)
    return DataLoader(Tokens(size, seed), batch_size=2 * BATCH if train else BATCH, shuffle=train, **options)
