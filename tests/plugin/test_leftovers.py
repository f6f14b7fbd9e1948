"""After ``fit``, however it ends, no thread of ours runs, and no file of the run is open or mapped."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_ckmerge import load_merged
from tests.support.trainers import make_merge, make_trainer
from tests.support.warnings import only_expected

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system tells open files in /proc")
STEPS = 12
OPTIONS: dict[str, Any] = {"num_sanity_val_steps": 0, "limit_val_batches": 4, "check_val_every_n_epoch": 10**6}


class Ends(pl.Callback):
    """Ends training, or the first search, with an error."""

    def __init__(self, error: type[BaseException] | None, in_search: bool) -> None:
        self.error, self.in_search = error, in_search

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.error is not None and not self.in_search and trainer.global_step == STEPS - 1:
            raise self.error("the end")


class Module(pl.LightningModule):
    """Learns the next of eight symbols; its validation fails on request."""

    def __init__(self, fails: type[BaseException] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        self.fails = fails

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch), (batch + 1) % 8)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.fails is not None:
            raise self.fails("no such batch")
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.arange(64) % 8, batch_size=8)  # type: ignore[arg-type]


def open_below(root: Path) -> list[str]:
    """Return this process's open and mapped files below a directory."""
    gc.collect()
    opened = []
    for name in os.listdir("/proc/self/fd"):
        try:
            opened.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the list itself
            continue
    mapped = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted({path for path in (*opened, *mapped) if path.startswith(str(root))})


@linux
@pytest.mark.parametrize("in_search", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_fit_leaves_no_thread_and_no_open_file(
    tmp_path: Path, error: type[BaseException] | None, in_search: bool
) -> None:
    before = set(threading.enumerate())
    ends = Ends(error, in_search)
    merge = make_merge(dirpath=tmp_path / "merges", on_error="warn", every_n_train_steps=4)
    trainer = make_trainer(tmp_path, ends, merge, max_steps=STEPS, **OPTIONS)
    module = Module(error if in_search else None)
    try:
        with only_expected(".*"):
            trainer.fit(module, loader(), loader())
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not None
    assert list((tmp_path / "merges").glob("step=*")) != [] or in_search
    del trainer, merge, ends
    assert [t.name for t in set(threading.enumerate()) - before] == []
    assert open_below(tmp_path) == []


@linux
def test_a_loaded_artifact_is_let_go_of(tmp_path: Path) -> None:
    merge = make_merge(dirpath=tmp_path / "merges", every_n_train_steps=4)
    trainer = make_trainer(tmp_path, merge, max_steps=STEPS, **OPTIONS)
    trainer.fit(Module(), loader(), loader())
    artifact = next(p for p in sorted((tmp_path / "merges").glob("step=*")) if (p / "model.safetensors").is_file())
    load_merged(artifact, Module())
    assert open_below(tmp_path) == []
