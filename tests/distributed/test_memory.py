"""A rank's part of the buffer is a share of the model: in bytes that are held, not in bytes that were planned."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_module

from benchmarks.multi_gpu_table import plan_rank, table
from lightning_ckmerge import BufferConfig, CheckpointMergeCallback
from lightning_ckmerge.distributed.comm import Ranks
from lightning_ckmerge.distributed.ownership import Ownership
from tests.support.rank_runs import Classifier, fit, make_rank_merge
from tests.support.ranks import RankPool

CONFIG = BufferConfig(every_n_train_steps=1, update_every_n_steps=1, capacity=4, storage="cpu")


class Weigh(pl.Callback):
    """Adds up the memory behind the buffer's snapshots at the end of training."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        [callback] = [c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)]
        snapshots = callback._run._buffer.rolling.snapshots()  # type: ignore[union-attr]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for s in snapshots for t in s.tensors}
        self.num_snapshots = len(snapshots)
        self.num_bytes = sum(s.nbytes() for s in storages.values())


def weigh(root: str, strategy: str, devices: int) -> tuple[int, int, str]:
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = rank_zero_module.log
    logger.addHandler(handler)
    scales = Weigh()
    merge = make_rank_merge(root, every_n_train_steps=None, search_on_train_end=False, buffer=CONFIG)
    try:
        # 10 KB, of which the cuts, at whole rows, can move 0.6 %.
        fit(strategy, root, merge, model=partial(Classifier, width=256, norm=False), others=[scales], devices=devices)
    finally:
        logger.removeHandler(handler)
    return scales.num_snapshots, scales.num_bytes, "\n".join(t for t in texts if "lightning-ckmerge" in t)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_hold_half_each(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    single_count, single, _ = weigh(str(tmp_path / "one"), "auto", 1)
    results = ranks.run(weigh, str(tmp_path / "two"), strategy, 2)
    for count, num_bytes, _ in results:
        assert count == single_count == CONFIG.capacity
        assert abs(num_bytes / (single / 2) - 1) < 0.1
    assert sum(num_bytes for _, num_bytes, _ in results) == single
    print(f"{strategy}: {single} bytes on one rank, {[n for _, n, _ in results]} on two")
    model_bytes = single // CONFIG.capacity
    planned = plan_rank(model_bytes // 4, 2, CONFIG, is_sharded=strategy != "ddp", dtype=torch.float32)
    assert f"{planned.buffer_memory / 1000:.1f} kB in memory and at most" in results[0][2]


def peak_of_publishing(bucket_bytes: int) -> tuple[int, int]:
    """Most memory that is allocated while merges are published, and the model's size."""
    comm = Ranks()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(40)))
    ownership = Ownership(model, comm, bucket_bytes)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ownership.publish()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    comm.close()
    return peak, sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("bucket_bytes", [100_000, 500_000])
def test_publishing_takes_one_bucket(ranks: RankPool, bucket_bytes: int) -> None:
    for peak, model_bytes in ranks.run(peak_of_publishing, bucket_bytes):
        print(f"bucket of {bucket_bytes}: peak {peak} of a model of {model_bytes}")
        assert bucket_bytes / 2 < peak <= 1.1 * bucket_bytes  # gloo's own control messages
        assert model_bytes > 3 * bucket_bytes


def test_the_documented_table_is_what_the_plan_computes() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "multi-gpu.md").read_text(encoding="utf-8")


def test_sharding_moves_nothing_and_ranks_share() -> None:
    whole, shard = (plan_rank(10**9, 8, BufferConfig(), is_sharded=is_sharded) for is_sharded in (False, True))
    assert shard.received == 0 < whole.received < 2 * 10**9
    assert shard.search_memory == whole.search_memory // 8
    assert (
        shard.buffer_memory
        == whole.buffer_memory
        == plan_rank(10**9, 1, BufferConfig(), is_sharded=True).buffer_memory // 8
    )
    assert shard.snapshot == 4 * 10**9
