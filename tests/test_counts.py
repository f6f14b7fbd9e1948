"""What things cost, in counts: never in seconds, which say more about the machine than about the code."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.buffer.rolling import RollingBuffer
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Stored
from lightning_ckmerge.core import merge_plan
from lightning_ckmerge.core.layout import Flats, OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import BLOCK_NUMEL, pool_means, update_means
from lightning_ckmerge.core.merge_plan import MergePlan
from lightning_ckmerge.core.native.fused import load_kernel
from tests.support.trainers import make_trainer

BLOCK_BYTES = 8 * BLOCK_NUMEL
NUMEL = 5 * BLOCK_NUMEL + 3
NUM_TRIALS = 4
CAPACITY = 4


class Allocations(TorchDispatchMode):
    """Notes each operator of this thread, and the bytes of memory that its result did not share with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


def tensors(dtype: torch.dtype, num: int = 1) -> list[Tensor]:
    return [torch.full((NUMEL,), float(k), dtype=dtype) for k in range(num)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_merge_allocates_no_more_than_blocks(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_plan, "MIN_FUSED_NUMEL", 1 if fused else 1 << 60)
    if fused and load_kernel() is None:
        pytest.skip("needs a C compiler for a processor with FMA")
    plan = MergePlan(tensors(dtype), [tensors(torch.float32), tensors(dtype), tensors(dtype)], ["parameter"])
    with Allocations() as allocations:
        plan.merge([0.25, 0.25, 0.5])
    assert max(allocations.sizes, default=0) <= BLOCK_BYTES
    if fused:
        assert allocations.operators == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_is_updated_in_place(dtype: torch.dtype) -> None:
    """Goes red if bfloat16 weights are widened as a whole."""
    means, weights = tensors(torch.float32), tensors(dtype)
    for num_updates in (1, 2):
        with Allocations() as allocations:
            update_means(means, weights, num_updates)
        assert max(allocations.sizes, default=0) <= BLOCK_BYTES


def test_what_allocates_is_seen() -> None:
    """Otherwise the tests above would pass whatever they ran."""
    with Allocations() as allocations:
        pool_means(*tensors(torch.float32, 2), 0.5)
    assert max(allocations.sizes) == 4 * NUMEL


class Watched(DiskStorage):
    """Counts what is written and read."""

    def __init__(self, dirpath: Path) -> None:
        super().__init__(dirpath)
        self.num_writes = 0
        self.num_reads = 0

    def write(self, name: str, layout: TensorLayout, blocks: Iterable[Tensor]) -> Stored:
        self.num_writes += 1
        return super().write(name, layout, blocks)

    def read(self, stored: Stored, layout: TensorLayout) -> Flats:
        self.num_reads += 1
        return super().read(stored, layout)


def make_buffer(storage: DiskStorage | MemoryStorage, **overrides: Any) -> RollingBuffer:
    layout = TensorLayout([OwnedTensor(name="w", role="parameter", tensor=torch.empty(NUMEL))])
    config = BufferConfig(capacity=CAPACITY, **overrides)
    return RollingBuffer(config, layout, storage, device="cpu", run_id="0" * 8, segment_steps=5, double_segments=False)


@pytest.mark.parametrize("layout", ["geometric", "uniform"])
def test_a_segment_costs_a_write_and_a_merge_of_two_at_most(tmp_path: Path, layout: str) -> None:
    storage = Watched(tmp_path)
    buffer = make_buffer(storage, layout=layout)
    num_segments = 12
    for step in range(1, 5 * num_segments + 1):
        buffer.update(tensors(torch.float32), step)
    buffer.close()
    pooled = storage.num_writes - num_segments
    assert storage.num_reads == 2 * pooled
    assert pooled == 0 if layout == "uniform" else 0 < pooled <= num_segments - CAPACITY


def test_the_disk_holds_capacity_times_the_model(tmp_path: Path) -> None:
    """In a run without checkpoints, between two segments' ends."""
    buffer = make_buffer(DiskStorage(tmp_path))
    for step in range(1, 61):
        buffer.update(tensors(torch.float32), step)
    buffer.close()
    num_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert CAPACITY * 4 * NUMEL <= num_bytes <= 1.01 * CAPACITY * 4 * NUMEL


def test_training_steps_touch_the_weights_only_when_an_update_is_due() -> None:
    buffer = make_buffer(MemoryStorage(), update_every_n_steps=3)
    weights = tensors(torch.float32)
    for step in range(1, 11):
        buffer.update(weights, step)
    touched = []
    for step in range(11, 21):
        buffer.first_step()  # waits for the writer, which gives its accumulator back
        with Allocations() as allocations:
            buffer.update(weights, step)
        if allocations.operators:
            touched.append(step)
        assert max(allocations.sizes, default=0) <= BLOCK_BYTES
    buffer.close()
    assert touched == [13, 15, 18, 20]


class Layers(pl.LightningModule):
    """Many small tensors."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(num_layers)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class CountsCalls(CheckpointMergeCallback):
    """Counts the functions that each step's hook calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        num_calls = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            super().on_train_batch_end(*args)
        finally:
            sys.setprofile(None)
        self.calls.append(num_calls)


@pytest.mark.parametrize("snapshot", ["mean", "point"])
def test_what_a_step_costs_does_not_grow_with_the_model_when_nothing_is_due(snapshot: Any, tmp_path: Path) -> None:
    """Goes red if each step lists the live tensors."""
    calls = []
    for num_layers in (1, 40):
        buffer = BufferConfig(every_n_train_steps=9, update_every_n_steps=3, snapshot=snapshot, storage="cpu")
        space: Any = "grouped" if snapshot == "mean" else "pairwise"
        search = SearchConfig(space=space)
        merge = CountsCalls(
            dirpath=tmp_path, every_n_train_steps=100, search_on_train_end=False, buffer=buffer, search=search
        )
        trainer = make_trainer(tmp_path, merge, max_steps=8)
        trainer.fit(Layers(num_layers), DataLoader(torch.ones(16, 2), 2))
        calls.append([n for i, n in enumerate(merge.calls, start=1) if i % 3])
    small, large = calls
    assert len(small) == 6
    assert small == large
    assert max(large) < 100


class Counts:
    """On a class, which the guard around a search does not put back."""

    num_forward_passes = 0


class Wide(pl.LightningModule):
    """A model far larger than its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1 << 15, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        Counts.num_forward_passes += 1
        self.log("val_loss", (self.layer(batch) - 1).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


class SearchAtEnd(pl.Callback):
    """Searches with everything counted."""

    def __init__(self, merge: CheckpointMergeCallback) -> None:
        self.merge = merge
        self.manifest: dict[str, Any] = {}
        self.sizes: list[int] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Counts.num_forward_passes = 0
        with Allocations() as allocations:
            artifact = self.merge.search_now()
        assert artifact is not None
        self.manifest = read_manifest(artifact.path)
        self.sizes = allocations.sizes


def test_a_search_runs_the_forward_passes_it_needs_and_holds_one_copy_of_the_weights(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    merge = CheckpointMergeCallback(
        dirpath=tmp_path,
        every_n_train_steps=1000,
        search_on_train_end=False,
        buffer=BufferConfig(every_n_train_steps=2, storage="cpu"),
        search=SearchConfig(n_trials=NUM_TRIALS, max_fraction_of_training=None),
        evaluation=EvaluationConfig(staged=False),
        on_error="raise",
    )
    once = SearchAtEnd(merge)
    data = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    model = Wide()
    options: dict[str, Any] = {"limit_val_batches": 0.5, "check_val_every_n_epoch": 1000, "num_sanity_val_steps": 0}
    trainer = make_trainer(tmp_path, merge, once, max_steps=8, **options)
    trainer.fit(model, DataLoader(data, 2), DataLoader(data, 2))
    manifest = once.manifest
    num_candidates = len(manifest["anchors"]) + len(manifest["trials"])
    assert len(manifest["trials"]) == NUM_TRIALS
    num_confirmed = sum(t["confirm"] is not None for t in (*manifest["anchors"], *manifest["trials"]))
    assert num_confirmed <= 3
    num_scored = 2 * num_candidates + 2 * num_confirmed
    assert num_scored == manifest["cost"]["num_batches"]
    assert Counts.num_forward_passes == num_scored + 1  # the artifact, read back, on one confirmation batch
    copies = [size for size in once.sizes if size >= model.layer.weight.nbytes / 2]
    # The guard's copy; the other one is a view of the artifact's file, mapped when it is read back.
    assert copies == [model.layer.weight.nbytes] * 2
