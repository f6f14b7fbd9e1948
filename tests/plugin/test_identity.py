"""Runs that share a directory, or go on from a checkpoint, as users start them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback
from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.models import Classifier, points_loader
from tests.support.trainers import make_merge, make_trainer, manifests
from tests.support.warnings import only_expected

SEGMENT = 2


def train(
    root: Path, merge: CheckpointMergeCallback, max_steps: int, ckpt_path: Path | None = None, *others: pl.Callback
) -> tuple[pl.Trainer, list[str]]:
    """Train under a new version of the logger; return what was warned of, too."""
    pl.seed_everything(1, verbose=False)
    callbacks = [merge, ModelCheckpoint(root / "checkpoints", filename="{step}", save_top_k=-1), *others]
    options: dict[str, Any] = {"max_steps": max_steps, "logger": CSVLogger(root, name="logs"), "limit_val_batches": 4}
    trainer = make_trainer(root, *callbacks, **options)
    with only_expected("napshot") as said:
        trainer.fit(Classifier(), points_loader(train=True), points_loader(train=False), ckpt_path=ckpt_path)
    return trainer, [text for text in said if "napshot" in text]


def merging(**options: Any) -> CheckpointMergeCallback:
    return make_merge(buffer=BufferConfig(every_n_train_steps=SEGMENT), every_n_train_steps=6, **options)


def first_steps(dirpath: Path) -> list[int]:
    """The first step of the oldest snapshot of each search: 1, if the buffer has not been lost."""
    return [m["snapshots"][0]["first_step"] for m in manifests(dirpath)]


def test_the_same_cell_run_twice_makes_two_runs(tmp_path: Path) -> None:
    merges = [merging(dirpath=tmp_path / "merges") for _ in range(2)]
    for merge in merges:
        train(tmp_path, merge, 6)
    own, later = tmp_path / "merges", tmp_path / "merges" / "run=2"
    assert [m._resolved_dirpath for m in merges] == [own, later]
    assert [len(read_timeline(p)) for p in (own, later)] == [1, 1]
    history = read_history(own)
    assert history.dirpath == later
    assert {m["run_id"] for m in manifests(own)} != {m["run_id"] for m in manifests(later)}
    assert (later / "report.html").is_file()


@pytest.mark.parametrize("kind", ["default", "moved project", "another dirpath"])
def test_a_resumed_run_has_its_buffer(tmp_path: Path, kind: str) -> None:
    """The logger counts another version each time, so that the default directory would be another one."""
    root = tmp_path / "project"
    train(root, merging(), 7)
    old = root / "logs" / "version_0" / "merges"
    checkpoint = root / "checkpoints" / "step=6.ckpt"
    options: dict[str, Any] = {}
    if kind == "moved project":
        root = root.rename(tmp_path / "elsewhere")
        old, checkpoint = (root / p.relative_to(tmp_path / "project") for p in (old, checkpoint))
    elif kind == "another dirpath":
        options["dirpath"] = tmp_path / "merges"
    merge = merging(**options)
    _, told = train(root, merge, 12, checkpoint)
    assert told == []
    assert merge._resolved_dirpath == options.get("dirpath", old)
    assert first_steps(merge._resolved_dirpath)[-1] == 1
    assert len({r["run_id"] for d in {old, merge._resolved_dirpath} for r in read_timeline(d)}) == 1


def test_a_buffer_that_is_gone_is_told_in_a_line(tmp_path: Path) -> None:
    train(tmp_path, merging(), 7)
    shutil.rmtree(tmp_path / "logs")
    _, told = train(tmp_path, merging(), 12, tmp_path / "checkpoints" / "step=6.ckpt")
    assert len([t for t in told if "missing or incomplete" in t]) == 1


class Begins(pl.Callback):
    """Starts another run at some step of this one."""

    def __init__(self, root: Path, merge: CheckpointMergeCallback, checkpoint: Path) -> None:
        self.root, self.merge, self.checkpoint = root, merge, checkpoint

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            self.told = train(self.root, self.merge, 12, self.checkpoint)[1]


def test_two_living_runs_from_one_checkpoint_leave_each_other_alone(tmp_path: Path) -> None:
    dirpath = tmp_path / "merges"
    train(tmp_path, merging(dirpath=dirpath), 7)
    checkpoint = tmp_path / "checkpoints" / "step=6.ckpt"
    branch = merging(dirpath=dirpath)
    begins = Begins(tmp_path, branch, checkpoint)
    _, told = train(tmp_path, merging(dirpath=dirpath), 12, checkpoint, begins)
    assert told == begins.told == []
    assert branch._resolved_dirpath == dirpath / "run=2"
    assert [first_steps(p)[-1] for p in (dirpath, dirpath / "run=2")] == [1, 1]
    assert [[r["step"] for r in read_timeline(p)] for p in (dirpath, dirpath / "run=2")] == [[6, 12], [12]]


def test_a_second_fit_goes_on_with_the_run(tmp_path: Path) -> None:
    merge = merging(dirpath=tmp_path / "merges")
    trainer, _ = train(tmp_path, merge, 7)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(trainer.lightning_module, points_loader(train=True), points_loader(train=False))
    assert merge._resolved_dirpath == tmp_path / "merges"
    assert [r["step"] for r in read_timeline(tmp_path / "merges")] == [6, 12]
    assert first_steps(tmp_path / "merges") == [1, 1]
