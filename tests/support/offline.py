"""A small training run with its config and checkpoints, as the offline commands find it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.trainers import train

NUM_STEPS = 80
EVERY = 10


class Wandering(pl.LightningModule):
    """Trained at so high a learning rate that its iterates circle the optimum: a merge of them is far better."""

    def __init__(self, width: int = 8, learning_rate: float = 0.12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        x, y = batch
        return nn.functional.mse_loss(self.layer(x).squeeze(1), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.layer(x).squeeze(1), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])


def predict(module: Wandering, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What an ensemble averages: the module has no ``forward``."""
    return module.layer(batch[0]), batch[1]


class PointsData(pl.LightningDataModule):
    """Noisy values of a linear function."""

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(seed=1, batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(seed=2, batch_size=16)

    def _loader(self, seed: int, batch_size: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(640, 8, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1) + torch.randn(640, generator=generator)), batch_size=batch_size)


class BrokenData(PointsData):
    def train_dataloader(self) -> DataLoader[Any]:
        raise FileNotFoundError("shards of the cluster")


class OwnStrategy(Strategy):
    """Somebody's own way to spread a model, of which nobody knows where its tensors lie."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def barrier(self, name: str | None = None) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def model_to_device(self) -> None:
        pass


def write_config(root: Path, *, data: str = "PointsData", trainer: dict[str, Any] | None = None, **merge: Any) -> Path:
    """Write the config, with what ``SaveConfigCallback`` adds, and return its path."""
    arguments = {"search": {"n_trials": 3}, "buffer": {"every_n_train_steps": 5}, **merge}
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": NUM_STEPS,
            "logger": False,
            "callbacks": [{"class_path": "lightning_ckmerge.CheckpointMergeCallback", "init_args": arguments}],
            **(trainer or {}),
        },
        "model": {"class_path": "tests.support.offline.Wandering"},
        "data": {"class_path": f"tests.support.offline.{data}"},
        "ckpt_path": None,
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train_without_merging(root: Path, **options: Any) -> Path:
    """Return the directory of the checkpoints of a run without the merge callback."""
    checkpoint = ModelCheckpoint(root / "checkpoints", every_n_train_steps=EVERY, save_top_k=-1, save_last=True)
    model = partial(Wandering, **options)
    train(model, datamodule=PointsData(), root=root, callbacks=[checkpoint], max_steps=NUM_STEPS)
    return root / "checkpoints"
