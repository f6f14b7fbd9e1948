"""Runs that go on: on the same ranks as if nothing had happened, on others with the same snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback
from lightning_ckmerge.buffer.storage import FILE_NAME
from lightning_ckmerge.core.specs import split_name
from tests.support.rank_runs import Classifier, fit, make_rank_merge
from tests.support.ranks import RankPool

# The end of an epoch of two ranks, for the sake of the data's order, and in mid-segment.
STOP = 12
SEGMENT_STEPS = 5
Snapshots = list[tuple[Any, dict[str, Tensor]]]


class Plain(Classifier):
    """Can be resumed exactly: no state of its own. Its optimizer has some, or Lightning could not reshard it."""

    def __init__(self) -> None:
        super().__init__(width=32, norm=False)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class ReadBuffer(pl.Callback):
    """Copies this rank's snapshots, at the start of training and at its end."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = self.read(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = self.read(trainer)

    def read(self, trainer: pl.Trainer) -> Snapshots:
        [callback] = [c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)]
        run = callback._run
        assert run is not None
        names = [slot.name for slot in run._model.layout.slots]
        snapshots = run._buffer.rolling.snapshots()
        return [(s.segment, {n: t.clone() for n, t in zip(names, s.tensors, strict=True)}) for s in snapshots]


def train(
    root: str, strategy: str, devices: int, max_steps: int, ckpt_path: str | None, on: Any = "device"
) -> tuple[Snapshots, Snapshots]:
    reader = ReadBuffer()
    checkpoint = ModelCheckpoint(f"{root}/checkpoints", every_n_train_steps=STOP, filename="{step}", save_top_k=-1)
    buffer = BufferConfig(every_n_train_steps=SEGMENT_STEPS, update_every_n_steps=1, accumulate_on=on)
    merge = make_rank_merge(root, buffer=buffer, every_n_train_steps=9, search_on_train_end=False)
    others = [reader, checkpoint]
    options = {"max_steps": max_steps, "enable_checkpointing": True, "max_epochs": 4, "ckpt_path": ckpt_path}
    fit(strategy, root, merge, model=Plain, others=others, devices=devices, val_check_interval=1.0, **options)
    return reader.first, reader.last


def whole(ranks: list[Snapshots]) -> Snapshots:
    """Put the ranks' parts of each snapshot together."""
    result = []
    for parts in zip(*ranks, strict=True):
        segments = {segment for segment, _ in parts}
        assert len(segments) == 1
        found: dict[str, Tensor] = {}
        pieces = [(*split_name(n, t.shape), t) for _, tensors in parts for n, t in tensors.items()]
        for name, _, _ in pieces:
            boxes = [box for n, box, _ in pieces if n == name]
            shape = [max(stops) for stops in zip(*([r[1] for r in box.ranges_D] for box in boxes), strict=True)]
            found.setdefault(name, torch.full(shape, float("nan")))
        for name, box, tensor in pieces:
            found[name][tuple(slice(*r) for r in box.ranges_D)] = tensor
        result.append((segments.pop(), found))
    return result


def assert_equal(first: Snapshots, second: Snapshots) -> None:
    assert [segment for segment, _ in first] == [segment for segment, _ in second]
    for (_, tensors), (_, others) in zip(first, second, strict=True):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[n], others[n]) for n in tensors)


def snapshot_files(root: Path) -> list[Path]:
    return [p for p in (root / "merges" / "buffer").rglob("*") if FILE_NAME.fullmatch(p.name)]


@pytest.mark.parametrize("accumulate_on", ["device", "host"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_same_ranks_go_on_as_if_nothing_had_happened(
    ranks: RankPool, tmp_path: Path, strategy: str, accumulate_on: str
) -> None:
    """Means in host memory equal those beside the weights, bit for bit."""
    straight = ranks.run(train, str(tmp_path / "straight"), strategy, 2, 2 * STOP, None)
    ranks.run(train, str(tmp_path), strategy, 2, STOP, None, accumulate_on)
    checkpoint = str(tmp_path / "checkpoints" / f"step={STOP}.ckpt")
    resumed = ranks.run(train, str(tmp_path), strategy, 2, 2 * STOP, checkpoint, accumulate_on)
    for (_, expected), (_, found) in zip(straight, resumed, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("ddp", 2), ("auto", 1)), (("auto", 1), ("ddp", 2)), (("ddp", 2), ("fsdp2", 2)), (("ddp", 2), ("tp", 2))],
    ids=lambda run: f"{run[1]} {run[0]}",
)
def test_other_ranks_go_on_with_the_same_snapshots(
    ranks: RankPool, tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    def run(kind: tuple[str, int], max_steps: int, ckpt_path: str | None) -> list[tuple[Snapshots, Snapshots]]:
        arguments = (str(tmp_path), *kind, max_steps, ckpt_path)
        return ranks.run(train, *arguments) if kind[1] > 1 else [train(*arguments)]

    stopped = run(before, STOP, None)
    resumed = run(after, 2 * STOP, str(tmp_path / "checkpoints" / f"step={STOP}.ckpt"))
    assert_equal(whole([first for first, _ in resumed]), whole([last for _, last in stopped]))
    assert len(resumed[0][1]) > len(resumed[0][0])


def test_the_old_ranks_files_go_once_a_checkpoint_does_without_them(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(train, str(tmp_path), "ddp", 2, STOP, None)
    old_files = set(snapshot_files(tmp_path))
    checkpoint = str(tmp_path / "checkpoints" / f"step={STOP}.ckpt")
    train(str(tmp_path), "auto", 1, 2 * STOP - 1, checkpoint)
    assert old_files <= set(snapshot_files(tmp_path))  # the checkpoint from which it could be tried again needs them
    train(str(tmp_path), "auto", 1, 2 * STOP + 1, checkpoint)
    assert snapshot_files(tmp_path)
    assert not old_files & set(snapshot_files(tmp_path))
    assert not list((tmp_path / "merges" / "buffer").glob("rank=*"))


@pytest.mark.parametrize(("before", "after"), [("ddp", "ddp"), ("fsdp2", "fsdp2 x tp")])
def test_two_ranks_become_four(ranks: RankPool, tmp_path: Path, before: str, after: str) -> None:
    stopped = ranks.run(train, str(tmp_path), before, 2, STOP, None)
    pool = RankPool(4)
    try:
        checkpoint = str(tmp_path / "checkpoints" / f"step={STOP}.ckpt")
        resumed = pool.run(train, str(tmp_path), after, 4, STOP + 2, checkpoint)
    finally:
        pool.stop()
    assert_equal(whole([first for first, _ in resumed]), whole([last for _, last in stopped]))
