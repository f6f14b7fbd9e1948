"""A fault on one rank, at any stage, is every rank's: all go on training, or all raise, and nobody waits."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchmetrics.classification import BinaryAccuracy

from lightning_ckmerge import ArtifactConfig
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer import storage
from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.distributed import ownership
from lightning_ckmerge.plugin.evaluate import lightning_loop as evaluation
from lightning_ckmerge.plugin.evaluate import validation
from lightning_ckmerge.plugin.evaluate.halves import Batches
from lightning_ckmerge.plugin.publish import publisher, reports
from lightning_ckmerge.plugin.restore.paused_run import PausedRun
from lightning_ckmerge.report import run as run_report
from lightning_ckmerge.search.study import SearchStudy
from lightning_ckmerge.tensorfiles.writer import ShardWriter
from tests.support.rank_runs import Classifier, fit, fit_plain, make_rank_merge, same_trail
from tests.support.ranks import RankPool

# What is said of a search that fails, and of a snapshot that is lost.
TOLD = ["boom", "No merge at step", "[Ss]napshot", "failed: "]


class BoomError(OSError):
    """The injected fault."""


# Stage -> what is called there, and at which call it fails; each is within the first search.
STAGES: dict[str, tuple[Any, str, int]] = {
    "pausing": (PausedRun, "__enter__", 1),
    "snapshots": (RollingBuffer, "snapshots", 1),
    "loaders": (validation, "find_loaders", 1),
    "first merge": (Merger, "merge", 1),
    "later merge": (Merger, "merge", 4),
    "publishing": (ownership, "make_buckets", 3),
    "begin": (PausedRun, "begin", 3),
    "reading": (Batches, "__iter__", 2),
    "fetching": (_BaseDataLoaderIter, "__next__", 4),
    "batch": (evaluation, "_record", 4),
    "manifest": (publisher, "build_manifest", 1),
    "gathering": (publisher, "GatheredWeights", 1),
    "weights": (ShardWriter, "_append", 2),
    "checkpoint": (publisher, "dump_weights", 1),
    "restoring": (PausedRun, "__exit__", 1),
}
# What only rank 0 does.
FIRST_RANK_STAGES: dict[str, tuple[Any, str, int]] = {
    "ask": (SearchStudy, "begin", 2),
    "tell": (SearchStudy, "tell", 2),
    "staging": (ArtifactStore, "_open_staging", 1),
    "report": (reports, "render_markdown", 1),
    "rename": (ArtifactStore, "_move", 1),
    "run report": (run_report, "render_run_markdown", 1),
}


class Fault:
    """One call of one function fails on one rank."""

    # On the class: a search puts back what it finds on callbacks, and on whatever they hold.
    counts: ClassVar[dict[int, int]] = {}
    happened_to: ClassVar[set[int]] = set()

    def __init__(self, rank: int, target: tuple[Any, str, int]) -> None:
        self.is_here = dist.get_rank() == rank
        self._holder, self._name, self._call = target
        self.counts[id(self)] = 0
        self.happened_to.discard(id(self))

    @property
    def count(self) -> int:
        return self.counts[id(self)]

    @property
    def happened(self) -> bool:
        return id(self) in self.happened_to

    def __enter__(self) -> Fault:
        self._original: Callable[..., Any] = vars(self._holder)[self._name]

        def failing(*args: Any, **kwargs: Any) -> Any:
            self.counts[id(self)] += 1
            result = self._original(*args, **kwargs) if self._name == "__exit__" else None
            if self.is_here and self.count == self._call:
                self.happened_to.add(id(self))
                raise BoomError(errno.ENOSPC, "boom")
            return result if self._name == "__exit__" else self._original(*args, **kwargs)

        setattr(self._holder, self._name, failing)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._holder, self._name, self._original)


def merge_for(root: str, on_error: str, **options: Any) -> Any:
    artifact = ArtifactConfig(max_shard_size="600B", formats=("safetensors", "ckpt"))
    return make_rank_merge(root, artifact=artifact, on_error=on_error, **options)


class FaultAtEachSearch(pl.Callback):
    """One stage after another fails, each in the search of its own step."""

    FIRST = 4  # by then the buffer holds what a search needs

    def __init__(self, rank: int, stages: list[str]) -> None:
        self.faults = [Fault(rank, {**STAGES, **FIRST_RANK_STAGES}[stage]) for stage in stages]
        self._stack = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stack.close()
        if 0 <= (i := trainer.global_step + 1 - self.FIRST) < len(self.faults):
            self._stack.enter_context(self.faults[i])

    def on_train_end(self, *_: Any) -> None:
        self._stack.close()


def faults_in_one_run(rank: int, strategy: str, stages: list[str], root: str) -> dict[str, Any]:
    """Search after each step; all but the last search fail, each at a stage of its own."""
    options: dict[str, Any] = {"max_epochs": 3, "max_steps": FaultAtEachSearch.FIRST + len(stages)}
    at_each = FaultAtEachSearch(rank, stages)
    merge = merge_for(root, "warn", every_n_train_steps=1)
    run = fit(strategy, root, merge, others=[at_each], expected=TOLD, **options)
    missed = {s: f.count for s, f in zip(stages, at_each.faults, strict=True) if f.is_here and not f.happened}
    return {"same": same_trail(run, fit_plain(strategy, root, **options)), "called only": missed}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [1, 0])
def test_training_goes_on_and_the_next_search_succeeds(
    ranks: RankPool, tmp_path: Path, strategy: str, rank: int
) -> None:
    stages = [*STAGES, *(FIRST_RANK_STAGES if rank == 0 else ())]
    if strategy == "fsdp2":
        stages.remove("publishing")  # nothing is held twice
    for result in ranks.run(faults_in_one_run, rank, strategy, stages, str(tmp_path)):
        assert result == {"same": True, "called only": {}}
    merges = tmp_path / "merges"
    assert not [p for p in merges.rglob("*") if p.name.startswith(".tmp-")]
    # What fails after the rename has been published all the same, and what a report cannot show, too.
    late = [i for i, stage in enumerate(stages) if stage in ("restoring", "report", "run report")]
    records = [(record["step"] - FaultAtEachSearch.FIRST, record) for record in read_timeline(merges)]
    assert [i for i, record in records if i >= 0 and record["artifact"]] == [*late, len(stages)]
    failed = {i: record["reason"] for i, record in records if i >= 0 and not record["artifact"]}
    assert sorted(failed) == [i for i in range(len(stages)) if i not in late]
    assert all("boom" in reason for reason in failed.values())


def faults(rank: int, stages: list[str], root: str) -> dict[str, str]:
    """Run once a stage, whose first search raises."""
    results: dict[str, str] = {}
    for i, stage in enumerate(stages):
        try:
            with Fault(rank, STAGES[stage]):
                fit("ddp", root, merge_for(f"{root}/{i}", "raise"))
        except Exception as error:
            results[stage] = type(error).__name__
    return results


def test_all_ranks_raise(ranks: RankPool, tmp_path: Path) -> None:
    stages = ["snapshots", "later merge", "batch", "weights"]
    first, second = ranks.run(faults, 1, stages, str(tmp_path))
    assert set(first.values()) == {"PeerError"}
    assert second == {
        "snapshots": "BoomError",
        "later merge": "BoomError",
        "batch": "BoomError",
        "weights": "ArtifactError",
    }


class FailsInValidation(Classifier):
    """On rank 1, in the first or last batch of a search; metrics are reduced over ranks after the last.

    Where no batch fails, rank 1 logs its loss under another name.
    """

    def __init__(self, failing_batch: int | None) -> None:
        super().__init__()
        self.failing_batch = failing_batch
        self.accuracy = BinaryAccuracy()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self.net(batch[0]).argmax(1), batch[1])
        self.log("val_accuracy", self.accuracy)
        if self.failing_batch is None:
            return
        # The run itself validates at step 12 only.
        if self.global_rank == 1 and self.trainer.global_step == 6 and batch_idx == self.failing_batch:
            raise BoomError("boom")

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        is_other = self.failing_batch is None and self.global_rank == 1 and self.trainer.global_step == 6
        super().log("other" if is_other and name == "val_loss" else name, *args, **kwargs)


def in_validation(failing_batch: int | None, root: str) -> bool:
    model = partial(FailsInValidation, failing_batch)
    found = fit("ddp", root, merge_for(root, "warn"), model=model, val_check_interval=1.0, expected=TOLD)
    baseline = fit_plain("ddp", root, model=model, val_check_interval=1.0)
    return same_trail(found, baseline)


@pytest.mark.parametrize("failing_batch", [0, 5])
def test_a_validation_step_fails(ranks: RankPool, tmp_path: Path, failing_batch: int) -> None:
    assert ranks.run(in_validation, failing_batch, str(tmp_path)) == [True, True]
    failed, _ = records = read_timeline(tmp_path / "merges")
    assert [r["step"] for r in records] == [6, 12]
    assert failed["status"] == "skipped"
    assert "rank 1 failed: BoomError: boom" in failed["reason"]


def test_another_metric_on_one_rank_keeps_nobody_waiting(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(in_validation, None, str(tmp_path)) == [True, True]
    assert [r["step"] for r in read_timeline(tmp_path / "merges")] == [6, 12]


def with_lost_snapshot(root: str) -> bool:
    """The disk of rank 1 is full for its second snapshot."""
    with Fault(1, (storage, "write_file", 2)):
        found = fit("ddp", root, merge_for(root, "raise", every_n_train_steps=3), expected=TOLD)
    return same_trail(found, fit_plain("ddp", root))


def test_rings_stay_alike_when_a_rank_loses_a_snapshot(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(with_lost_snapshot, str(tmp_path)) == [True, True]
    dirpaths = sorted((tmp_path / "merges" / "buffer").iterdir())
    first, second = ([p.name for p in sorted(d.iterdir())] for d in dirpaths)
    assert first == second
    assert not any("000000003-000000004" in name for name in first)
    assert [r["step"] for r in read_timeline(tmp_path / "merges")] == [3, 6, 9, 12]
