"""A small run that may die at any moment. Its data and its noise follow from a counter in its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.plugin.publish import loggers  # noqa: F401 - imported once, before the forks
from tests.support.bitwise import digest
from tests.support.trainers import make_trainer
from tests.support.warnings import only_expected

# The last step is searched before it is saved: Lightning calls no hook of a run that has nothing left to train.
NUM_STEPS = 15
SAVE_EVERY, SEARCH_EVERY = 3, 5
CAPACITY = 3
BATCH, WIDTH = 16, 8
NUM_VAL_BATCHES = 10
# What a rank waits for one that is gone; gloo knows at once of one that has died.
TIMEOUT = timedelta(seconds=20)

Trail = dict[int, str]


class Regression(pl.LightningModule):
    """So high a learning rate that merges gain, and are accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, 1)
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(int(self.num_batches) * 10 + self.global_rank)

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.num_batches += 1
        x = torch.randn(BATCH, WIDTH)
        return self.loss(x, x.sum(1, keepdim=True) + torch.randn(BATCH, 1))

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(*batch), sync_dist=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


class Notes(pl.Callback):
    """Appends a digest of the training state after each batch to a file, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        state = [dict(pl_module.state_dict()), [o.state_dict() for o in trainer.optimizers], trainer.global_step]
        with self.path.open("a") as file:
            file.write(f"{int(pl_module.num_batches)} {digest(state)}\n")


def read_notes(path: Path) -> list[tuple[int, str]]:
    """Return the batches that a run has noted, in the order in which it saw them; one may stand there twice."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(number), found) for number, found in (line.split() for line in lines)]


def checkpoint_of(root: Path) -> Path | None:
    """Return the checkpoint to go on from: Lightning's last one."""
    found = sorted((root / "checkpoints").glob("*.ckpt"), key=lambda p: (p.stem == "last", p.stat().st_mtime_ns))
    return found[-1] if found else None


def make_merge(root: Path, **overrides: Any) -> CheckpointMergeCallback:
    """Return a callback whose searches are quick, and whose artifacts displace each other."""
    search = SearchConfig(
        n_trials=1,
        anchors=["uniform"],
        # A Gaussian process takes most of a search's time, and touches no file.
        sampler=optuna.samplers.RandomSampler(seed=1),
        max_fraction_of_training=None,
        min_gain_left=0.0,
    )
    options: dict[str, Any] = {
        "dirpath": root / "merges",
        "every_n_train_steps": SEARCH_EVERY,
        "search_on_train_end": True,
        "search": search,
        "buffer": BufferConfig(capacity=CAPACITY, every_n_train_steps=2, update_every_n_steps=1),
        "on_error": "raise",
    }
    return CheckpointMergeCallback(**{**options, **overrides})


def loader(num_batches: int, batch_size: int = BATCH) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(num_batches)
    x = torch.randn(num_batches * batch_size, WIDTH, generator=generator)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(num_batches * batch_size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def train(
    root: Path,
    *,
    num_ranks: int = 1,
    num_steps: int = NUM_STEPS,
    ckpt_path: Path | None = None,
    others: Sequence[pl.Callback] = (),
    make: Callable[[Path], CheckpointMergeCallback] = make_merge,
    expected: Sequence[str] = (),
) -> list[str]:
    """Train to the end, from a checkpoint if there is one, and return the warnings.

    Args:
        root: The run's directory. Each rank notes its batches there.
        num_ranks: Of the process group, which is there already.
        num_steps: Where training ends.
        ckpt_path: The checkpoint; ``None``: the run's own last one.
        others: Callbacks that come before the merge callback.
        make: Makes the merge callback.
        expected: Patterns of warnings beside those of the inventory.
    """
    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    rank = int(os.environ.get("RANK", "0"))
    checkpoint = ModelCheckpoint(root / "checkpoints", every_n_train_steps=SAVE_EVERY, save_top_k=1, save_last=True)
    options: dict[str, Any] = {"devices": num_ranks, "strategy": DDPStrategy(timeout=TIMEOUT)} if num_ranks > 1 else {}
    trainer = make_trainer(
        root,
        *others,
        make(root),
        Notes(root / f"notes-{rank}.txt"),
        checkpoint,
        max_steps=num_steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        **options,
    )
    data = loader(NUM_STEPS * num_ranks), loader(NUM_VAL_BATCHES * num_ranks, 8 * BATCH)
    with only_expected(*expected) as said:
        trainer.fit(Regression(), *data, ckpt_path=ckpt_path or checkpoint_of(root), weights_only=True)
    return said
