"""What a run leaves is used as Lightning's users do, and is worth what the manifest says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge import ArtifactConfig, CheckpointMergeCallback, SearchConfig, load_merged
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.plugin.evaluate.halves import confirms
from tests.support.trainers import make_trainer, train
from tests.support.warnings import only_expected

WIDTH, BATCH = 8, 16


class Regression(pl.LightningModule):
    """Knows its own hyperparameters. Its learning rate is so high that merging gains."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(num_batches: int, seed: int, keep: Callable[[int], bool] = lambda _: True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_batches, BATCH, WIDTH, generator=generator)
    y = x.sum(-1, keepdim=True) + torch.randn(num_batches, BATCH, 1, generator=generator)
    kept = [b for b in range(num_batches) if keep(b)]
    return DataLoader(TensorDataset(x[kept].flatten(0, 1), y[kept].flatten(0, 1)), batch_size=BATCH)


def unseen() -> DataLoader[Any]:
    """The batches that confirmed the merge."""
    return data(64, seed=2, keep=lambda b: confirms(b, 0.5))


@dataclass
class Trained:
    trainer: pl.Trainer
    module: Regression
    merge: CheckpointMergeCallback
    merges: Path

    @property
    def value(self) -> float:
        """What the manifest says that the merge is worth."""
        best = self.merge.best_artifact
        assert best is not None
        return float(best.manifest["verdict"]["value"])

    def tested(self, module: pl.LightningModule, **options: Any) -> float:
        with only_expected():
            [logged] = make_trainer(self.merges.parent).test(module, unseen(), verbose=False, **options)
        return logged["test_loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run at whose end the merge is accepted, and loaded into the module."""
    root = tmp_path_factory.mktemp("run")
    merge = CheckpointMergeCallback(
        dirpath=root / "merges",
        every_n_epochs=100,
        apply="on_train_end",
        on_error="raise",
        search=SearchConfig(n_trials=4, max_fraction_of_training=None),
        artifact=ArtifactConfig(formats=("safetensors", "ckpt")),
    )
    model = partial(Regression, width=WIDTH, lr=0.05)
    trainer = train(model, data(60, seed=1), data(64, seed=2), root=root, callbacks=[merge], max_epochs=1)
    return Trained(trainer, trainer.lightning_module, merge, root / "merges")


def test_the_module_holds_the_merge_when_training_is_over(trained: Trained) -> None:
    assert trained.tested(trained.module) == pytest.approx(trained.value, rel=1e-6)
    [logged] = trained.trainer.validate(trained.module, unseen(), verbose=False)
    assert logged["val_loss"] == pytest.approx(trained.value, rel=1e-6)


@pytest.mark.parametrize("source", ["run", "best", "step", "artifact", "best artifact"])
def test_a_merge_is_loaded_by_any_of_its_names(trained: Trained, source: str) -> None:
    best = trained.merge.best_artifact
    assert best is not None
    named: Any = {
        "run": trained.merges,
        "best": str(trained.merges / "best"),
        "step": trained.merges / "step=000000060",
        "artifact": Artifact.open(trained.merges),
        "best artifact": best,
    }[source]
    module = Regression(width=WIDTH, lr=0.0)
    before = trained.tested(module)
    assert load_merged(named, module).path == best.path
    assert trained.tested(module) == pytest.approx(trained.value, rel=1e-6) != before


def test_a_trainer_tests_the_checkpoint_of_the_best_artifact(trained: Trained) -> None:
    path = trained.merges / "best" / "model.ckpt"
    other = Regression(width=WIDTH, lr=0.0)
    assert trained.tested(other, ckpt_path=path) == pytest.approx(trained.value, rel=1e-6)


def test_the_checkpoint_brings_the_hyperparameters_and_no_code(trained: Trained) -> None:
    module = Regression.load_from_checkpoint(trained.merges / "best" / "model.ckpt", weights_only=True)
    assert dict(module.hparams) == {"width": WIDTH, "lr": 0.05}
    assert trained.tested(module) == pytest.approx(trained.value, rel=1e-6)
    ours, theirs = module.state_dict(), trained.module.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
