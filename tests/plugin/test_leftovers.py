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

from lightning_ckmerge import load_merged
from tests.support.models import Points, points_loader
from tests.support.trainers import make_merge, make_trainer
from tests.support.warnings import only_expected

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system tells open files in /proc")
STEPS = 12


class Ends(pl.Callback):
    """Ends training, or the first search, with an error."""

    def __init__(self, error: type[BaseException] | None, in_search: bool) -> None:
        self.error, self.in_search = error, in_search

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.error is not None and not self.in_search and trainer.global_step == STEPS - 1:
            raise self.error("the end")


class Module(Points):
    """Its validation fails in a search, on request."""

    fails: type[BaseException] | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails is not None:
            raise self.fails("no such batch")
        return super().validation_step(batch, batch_idx)


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
    trainer = make_trainer(tmp_path, ends, merge, max_steps=STEPS, num_sanity_val_steps=0, limit_val_batches=4)
    module = Module()
    module.fails = error if in_search else None
    trainer.check_val_every_n_epoch = 10**6
    try:
        with only_expected(".*"):
            trainer.fit(module, points_loader(), points_loader())
    except (RuntimeError, KeyboardInterrupt, SystemExit):
        assert error is not None
    assert list((tmp_path / "merges").glob("step=*")) != [] or in_search
    del trainer, merge, ends
    assert [t.name for t in set(threading.enumerate()) - before] == []
    assert open_below(tmp_path) == []


@linux
def test_a_loaded_artifact_is_let_go_of(tmp_path: Path) -> None:
    merge = make_merge(dirpath=tmp_path / "merges", every_n_train_steps=4)
    trainer = make_trainer(tmp_path, merge, max_steps=STEPS, num_sanity_val_steps=0, limit_val_batches=4)
    trainer.fit(Module(), points_loader(), points_loader())
    artifact = next(p for p in sorted((tmp_path / "merges").glob("step=*")) if (p / "model.safetensors").is_file())
    model = Module()
    load_merged(artifact, model)
    assert open_below(tmp_path) == []
    model.state_dict()
