"""Finetuning-scheduler thaws a module layer by layer, and restores its best checkpoint at each phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge import Artifact
from tests.clients.check import Client, confirmed

NUM_FEATURES, NUM_CLASSES, BATCH = 8, 4, 8


class Classifier(pl.LightningModule):
    """Three layers, thawed from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_FEATURES, 32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Any) -> Any:
        return self.last(self.second(self.first(x).relu()).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def loader(num_samples: int, *, seed: int, shuffle: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=generator)
    generator.manual_seed(seed)
    x = torch.randn(num_samples, NUM_FEATURES, generator=generator)
    noise = torch.randn(num_samples, NUM_CLASSES, generator=generator)
    return DataLoader(TensorDataset(x, (x @ truth + noise).argmax(1)), batch_size=BATCH, shuffle=shuffle)


def train(root: Path, callbacks: list[pl.Callback]) -> Any:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[
            FinetuningScheduler(max_depth=2),
            FTSEarlyStopping(monitor="val_loss", patience=1, min_delta=0.01),
            FTSCheckpoint(monitor="val_loss", dirpath=root / "checkpoints"),
            *callbacks,
        ],
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader(128, seed=1, shuffle=True), loader(128, seed=2))
    depths = [c.curr_depth for c in trainer.callbacks if isinstance(c, FinetuningScheduler)]
    assert depths[0] >= 1, f"nothing was thawed in {trainer.current_epoch} epochs"


@torch.no_grad()
def predict(artifact: Artifact, trained: Any) -> float:
    model = Classifier.load_from_checkpoint(artifact.path / "model.ckpt").eval()
    losses = [nn.functional.cross_entropy(model(x), y).double() for x, y in confirmed(list(loader(128, seed=2)))]
    return float(torch.stack(losses).mean())


CLIENT = Client(
    packages=["finetuning-scheduler"],
    does="a `FinetuningScheduler` that thaws three layers and restores its best checkpoint at each phase",
    predicts='`load_from_checkpoint("model.ckpt")`, its loss',
    train=train,
    predict=predict,
    merge={},
)
