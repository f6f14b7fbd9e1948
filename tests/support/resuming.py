"""One training process, which is ended, or dies, and goes on. Its data and noise depend on the step alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ckmerge import BufferConfig, SearchConfig
from tests.support.bitwise import digest
from tests.support.models import NUM_FEATURES, Classifier, points_loader
from tests.support.trainers import make_merge, train


class BySteps(Classifier):
    """Its batches and its dropout follow from a counter that the checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("drift", torch.zeros(3))  # a resumed run does not have it unless it is saved

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(int(self.num_batches))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(8, NUM_FEATURES)
        self.num_batches += 1
        return torch.nn.functional.cross_entropy(self(x), x[:, :3].argmax(1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        self.log("val_loss", torch.nn.functional.cross_entropy(self(x), x[:, :3].argmax(1)), batch_size=len(x))

    def on_train_epoch_end(self) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        pass


class Notes(pl.Callback):
    """Keeps a digest of the training state after each batch, and saves a checkpoint when told to."""

    def __init__(self, root: Path, save_at: int | None) -> None:
        self.root, self.save_at = root, save_at
        self.batches: dict[str, str] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        state = [dict(pl_module.state_dict()), [o.state_dict() for o in trainer.optimizers], trainer.global_step]
        self.batches[str(int(pl_module.num_batches))] = digest(state)
        if trainer.global_step == self.save_at and not (self.root / "saved.ckpt").exists():
            trainer.save_checkpoint(self.root / "saved.ckpt")


class DiesInTrial(BySteps):
    """Dies without a word at the n-th validation batch after training began."""

    left = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            type(self).left -= 1
            if self.left == 0:
                os._exit(9)
        super().validation_step(batch, batch_idx)


def main(root: Path, options: dict[str, Any]) -> None:
    """Train to ``max_steps`` and write what happened to ``root/notes.json``."""
    dies_after = options.pop("dies_after", None)
    DiesInTrial.left = dies_after or 0
    ckpt_path = options.pop("ckpt_path", None)
    notes = Notes(root, options.pop("save_at", None))
    every = options.pop("every_n_train_steps", 10)
    search = SearchConfig(n_trials=3, max_fraction_of_training=None, **options.pop("search", {}))
    merge = make_merge(
        dirpath=root / "merges",
        every_n_train_steps=every,
        search=search,
        buffer=BufferConfig(every_n_train_steps=4, update_every_n_steps=1),
    )
    train(
        DiesInTrial if dies_after else BySteps,
        points_loader(train=True, shuffle=False),
        points_loader(train=False),
        root=root,
        callbacks=[merge, notes],
        seed=3,
        ckpt_path=ckpt_path,
        max_epochs=-1,
        **options,
    )
    (root / "notes.json").write_text(json.dumps(notes.batches))
