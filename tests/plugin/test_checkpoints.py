"""Lightning's own ModelCheckpoint in the same place: neither touches what the other has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge.artifact.load import Artifact, best_target
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer.storage import FILE_NAME
from tests.support import trainers
from tests.support.bitwise import digest
from tests.support.trainers import make_merge

STOP, END = 1, 2
PLACES: dict[str, Callable[[Path], Path]] = {
    "apart": lambda merges: merges.parent / "checkpoints",
    "equal": lambda merges: merges,
    "inside": lambda merges: merges / "buffer",
    "parent": lambda merges: merges.parent,
}


class Start(pl.Callback):
    """Where training began."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step


class Regression(pl.LightningModule):
    """So noisy a learning rate that merges gain, and more so the longer it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def loader(size: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16)


def train(merges: Path, checkpoints: Path, max_epochs: int, ckpt_path: str | None = None) -> int:
    """Train, and return the step that training went on from."""
    # Its files are named as artifacts are, but for the ending.
    checkpoint = ModelCheckpoint(
        checkpoints, filename="{step:09d}", monitor="train_loss", save_top_k=2, save_last=True, every_n_train_steps=10
    )
    merge = make_merge(dirpath=merges, every_n_train_steps=20, save_top_k=1)
    start = Start()
    trainers.train(
        Regression,
        loader(640, seed=1),
        loader(320, seed=2),
        root=merges.parent,
        callbacks=[merge, start, checkpoint],
        max_epochs=max_epochs,
        ckpt_path=ckpt_path,
    )
    return start.step


def left(merges: Path, checkpoints: Path) -> dict[str, Any]:
    """What both have left; artifacts are checked, file by file."""
    files = [p for p in merges.rglob("*") if p.is_file() and p.suffix != ".ckpt"]
    artifacts = [Artifact.open(p) for p in sorted(merges.glob("step=*")) if p.is_dir()]
    best = best_target(merges)
    assert best is not None
    return {
        # The buffer's files begin with a number of this run.
        "files": sorted(p.name[9:] if FILE_NAME.fullmatch(p.name) else str(p.relative_to(merges)) for p in files),
        "artifacts": [(a.path.name, a.has_weights) for a in artifacts],
        "best": best.name,
        "searches": [(r["step"], r["status"]) for r in read_timeline(merges)],
        "checkpoints": {p.name: digest(load(p)["state_dict"]) for p in checkpoints.glob("*.ckpt")},
    }


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def train_twice(place: str, root: Path) -> list[dict[str, Any]]:
    """Stop, go on with the last checkpoint, and return what is there each time."""
    merges = root / "run" / "merges"
    checkpoints = PLACES[place](merges)
    assert train(merges, checkpoints, STOP) == 0
    first = left(merges, checkpoints)
    last = load(checkpoints / "last.ckpt")
    assert train(merges, checkpoints, END, ckpt_path="last") == last["global_step"] > 0
    return [first, left(merges, checkpoints)]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two directories. `best` has moved, and the artifact that it named is gone."""
    first, second = train_twice("apart", tmp_path_factory.mktemp("apart"))
    assert (first["best"], True) in first["artifacts"]
    assert first["best"] not in [name for name, _ in second["artifacts"]]
    return [first, second]


@pytest.mark.parametrize("place", [p for p in PLACES if p != "apart"])
def test_a_shared_directory_holds_what_two_hold(place: str, apart: list[dict[str, Any]], tmp_path: Path) -> None:
    """Goes red if either takes the other's files for its own: to delete, to overwrite, or to go on from."""
    assert train_twice(place, tmp_path) == apart
