"""Scores over ranks: the value of one process on the same data, however a sampler pads and loaders differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from optuna.study import Study
from optuna.terminator import BaseTerminator
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, Subset

from lightning_ckmerge import EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.distributed.comm import Alone, Comm, Ranks
from lightning_ckmerge.plugin.evaluate.batch_values import BatchRecorder
from lightning_ckmerge.plugin.run import MergeRun
from tests.support.rank_runs import Classifier, fit, make_rank_merge, points
from tests.support.ranks import RankPool

NUM_SAMPLES = 43


def sample_values(x: Tensor) -> Tensor:
    """No weight in it, so that ranks of all numbers have the same."""
    return x.double().square().sum(1)


class SampleMean(Classifier):
    """Logs a mean over samples in float64, and how far the weights are from training's own: not at all for these."""

    def __init__(self, sync_dist: bool) -> None:
        super().__init__(norm=False)
        self.sync_dist = sync_dist
        self.trained = 0.0

    def optimizer_step(self, *args: Any) -> None:
        super().optimizer_step(*args)
        self.trained = self.total()

    def total(self) -> float:
        return sum(float(p.double().sum()) for p in self.parameters())

    def validation_step(self, batch: Any, _: int) -> None:
        values = sample_values(batch[0])
        value = values.mean() + self.total() - self.trained
        self.log("val_loss", value, sync_dist=self.sync_dist, batch_size=len(values))


def latest_value(root: str, sync_dist: bool, uneven: bool, devices: int) -> float:
    """The value of the latest weights in the run's one search, on all 43 samples."""
    val: Any = DataLoader(points(NUM_SAMPLES), batch_size=8)
    if uneven:  # three batches on one rank, two on the other, without a sampler that evens them out
        of_rank = range(24) if dist.get_rank() == 0 else range(24, NUM_SAMPLES - 5)
        val = DataLoader(Subset(points(NUM_SAMPLES), of_rank), batch_size=8)
    callback = make_rank_merge(root, every_n_train_steps=6, search_on_train_end=False, save_top_k=0)
    options = {"use_distributed_sampler": not uneven, "limit_val_batches": 1.0, "max_steps": 6, "devices": devices}
    fit("ddp" if devices > 1 else "auto", root, callback, model=partial(SampleMean, sync_dist), val=val, **options)
    manifest = read_manifest(next(Path(root, "merges").glob("step=*")))
    return float(manifest["anchors"][0]["search"]["value"])


@pytest.mark.parametrize("sync_dist", [True, False])
def test_a_padded_sampler_changes_no_value(ranks: RankPool, tmp_path: Path, sync_dist: bool) -> None:
    """Padding gives 44 samples; Lightning's own mean over ranks would count one of them twice."""
    two = ranks.run(latest_value, str(tmp_path / "two"), sync_dist, False, 2)
    one = latest_value(str(tmp_path / "one"), sync_dist, False, 1)
    exact = float(sample_values(points(NUM_SAMPLES)[:][0]).mean())
    assert two[0] == two[1]
    assert math.isclose(two[0], one, rel_tol=1e-9)
    assert math.isclose(one, exact, rel_tol=1e-9)


@pytest.mark.parametrize("sync_dist", [True, False])
def test_ranks_may_have_different_numbers_of_batches(ranks: RankPool, tmp_path: Path, sync_dist: bool) -> None:
    exact = float(sample_values(points(NUM_SAMPLES)[: NUM_SAMPLES - 5][0]).mean())
    for value in ranks.run(latest_value, str(tmp_path), sync_dist, True, 2):
        assert math.isclose(value, exact, rel_tol=1e-9)


def record(comm: Comm, values: Sequence[float], stop_after: int | None) -> tuple[list[float], list[float], int, float]:
    """Feed a rank's share of ``values``, two samples a batch but for the last."""
    own = list(values)[comm.rank :: comm.world_size]
    batches = [own[i : i + 2] for i in range(0, len(own), 2)]
    keep_going = None if stop_after is None else lambda values_B, sizes_B: len(values_B) < stop_after
    recorder = BatchRecorder(["loss"], [frozenset()], keep_going, comm)
    total = size = 0.0
    for i, batch in enumerate(batches):
        if recorder.stopped:
            break
        recorder.begin_batch()
        total, size = total + sum(batch), size + len(batch)
        recorder.take({"loss": (total, size)}, dataloader_idx=0, batch_idx=i)
    recorder.end_loader()
    metrics = recorder.finish({"loss": math.nan})
    found = recorder.of["loss"]
    return found.values_B, found.sizes_B, recorder.num_batches, metrics["loss"]


def record_on_ranks(values: Sequence[float], stop_after: int | None) -> Any:
    comm = Ranks()
    result = record(comm, values, stop_after)
    comm.close()
    return result


@pytest.mark.parametrize("num_values", [1, 7, 8, 9, 13])
def test_batches_are_paired_over_ranks(ranks: RankPool, num_values: int) -> None:
    values = [float(i**2) for i in range(num_values)]
    first, second = ranks.run(record_on_ranks, values, None)
    assert first[:2] == second[:2]
    # Batch b is what all ranks evaluate b-th: four samples.
    expected = [values[i : i + 4] for i in range(0, num_values, 4)]
    assert first[0] == [sum(batch) / len(batch) for batch in expected]
    assert first[1] == [len(batch) for batch in expected]
    assert first[3] == second[3] == record(Alone(), values, None)[3] == sum(values) / num_values


def test_ranks_drop_a_candidate_together(ranks: RankPool) -> None:
    """Seven batches on one rank, six on the other; both stop at the same one."""
    first, second = ranks.run(record_on_ranks, [float(i) for i in range(25)], 3)
    assert first == second
    assert len(first[0]) == first[2] == 4  # the fourth was begun when the third was known
    assert record(Alone(), [float(i) for i in range(25)], 3)[2] == 3


def collectives_of_merges(root: str) -> list[int]:
    counts = []
    original = Merger.merge

    def counted(self: Merger, c_K: Sequence[float]) -> None:
        with CommDebugMode() as comms:
            original(self, c_K)
        counts.append(comms.get_total_counts())

    Merger.merge = counted  # type: ignore[method-assign]
    try:
        fit("fsdp2", root, make_rank_merge(root), model=partial(Classifier, norm=False))
    finally:
        Merger.merge = original  # type: ignore[method-assign]
    return counts


def test_a_search_over_shards_merges_without_a_collective(ranks: RankPool, tmp_path: Path) -> None:
    for counts in ranks.run(collectives_of_merges, str(tmp_path)):
        assert len(counts) > 10
        assert set(counts) == {0}


def messages_of_a_search(root: str, strategy: str, n_trials: int) -> tuple[int, int]:
    """How often ranks talk in one search without races, and how many batches a rank scores a candidate on."""
    counts = {"messages": 0, "batches": 0}
    exchange, search, begin_batch = Ranks.exchange, MergeRun.search, BatchRecorder.begin_batch

    def counted(self: Ranks, value: Any) -> list[Any]:
        counts["messages"] += 1
        return exchange(self, value)

    def one_search(self: MergeRun) -> Any:
        counts.update(messages=0, batches=0)
        return search(self)

    def one_batch(self: BatchRecorder, *args: Any) -> None:
        counts["batches"] += 1
        begin_batch(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "exchange", counted)
        patch.setattr(MergeRun, "search", one_search)
        patch.setattr(BatchRecorder, "begin_batch", one_batch)
        options = {
            "search": SearchConfig(max_fraction_of_training=None, n_trials=n_trials),
            "evaluation": EvaluationConfig(staged=False, confirm_fraction=0.01),
        }
        callback = make_rank_merge(root, every_n_train_steps=1000, **options)
        fit(strategy, root, callback, model=partial(Classifier, norm=False))
    manifest = read_manifest(next(Path(root, "merges").glob("step=*")))
    return counts["messages"], counts["batches"] // len([*manifest["anchors"], *manifest["trials"]])


@pytest.mark.parametrize(("strategy", "each"), [("ddp", 10), ("fsdp2", 9)])
def test_ranks_talk_once_a_batch_and_a_few_times_a_trial(
    ranks: RankPool, tmp_path: Path, strategy: str, each: int
) -> None:
    """Before each batch; and whether to go on, where, that the merge is made, before rank 0's buffers are sent, whether
    hooks have moved the weights, the loader's end, that of all loaders, the value, and that it is told. Ranks that hold
    the model whole ask before they send each other its parts.
    """
    few = ranks.run(messages_of_a_search, str(tmp_path / "few"), strategy, 2)
    more = ranks.run(messages_of_a_search, str(tmp_path / "more"), strategy, 5)
    for (some, num_batches), (all_, _) in zip(few, more, strict=True):
        assert num_batches > 1
        assert all_ - some == 3 * (num_batches + each)


class AfterTwo(BaseTerminator):
    """Says stop after two of the sampler's trials."""

    num_asked = 0

    def should_terminate(self, study: Study) -> bool:
        type(self).num_asked += 1
        return sum(t.user_attrs["name"].startswith("trial-") for t in study.trials) == 2


def search_until_told(root: str) -> tuple[int, int]:
    """How often this rank asked the terminator in two searches, and how many trials the last one has."""
    AfterTwo.num_asked = 0
    search = SearchConfig(max_fraction_of_training=None, n_trials=6, terminator=AfterTwo())
    fit("ddp", root, make_rank_merge(root, search=search), model=partial(Classifier, norm=False))
    manifest = read_manifest(max(Path(root, "merges").glob("step=*")))
    assert "`search.terminator` (AfterTwo) stopped the search" in manifest["cost"]["stopped_early"]
    return AfterTwo.num_asked, len(manifest["trials"])


def test_the_first_rank_asks_whether_to_stop_and_all_do(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(search_until_told, str(tmp_path)) == [(4, 2), (0, 2)]
