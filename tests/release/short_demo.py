"""Train, search and load an artifact, by the installed package: run outside the source tree."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import lightning_ckmerge
from lightning_ckmerge import Artifact, CheckpointMergeCallback, SearchConfig, load_merged


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(num_samples: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.randn(num_samples, 4)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(num_samples, 1)), batch_size=8)


def main() -> None:
    assert "site-packages" in str(lightning_ckmerge.__file__), lightning_ckmerge.__file__
    seed_everything(1)
    with tempfile.TemporaryDirectory() as directory:
        merging = CheckpointMergeCallback(
            dirpath=directory, search=SearchConfig(n_trials=2, max_fraction_of_training=None), on_error="raise"
        )
        trainer = Trainer(
            max_steps=80, accelerator="cpu", callbacks=[merging], logger=False, enable_checkpointing=False
        )
        trainer.fit(Regression(), loader(640), loader(320))
        artifacts = [Artifact.open(path) for path in sorted(Path(directory).glob("step=*"))]
        weights = [a for a in artifacts if a.has_weights]
        load_merged(weights[-1], Regression())
        assert (artifacts[-1].path / "report.html").stat().st_size > 0
        print(f"{len(artifacts)} searches, the last {artifacts[-1].manifest['verdict']['status']}")


if __name__ == "__main__":
    main()
