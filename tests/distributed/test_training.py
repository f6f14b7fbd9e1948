"""Training on several ranks is, batch by batch and bit for bit, what it is without the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.rank_runs import Classifier, TiedGPT, fit, fit_plain, make_rank_merge, published, same_trail
from tests.support.ranks import RankPool
from tests.support.trainers import SearchNow

MODELS = {"classifier": Classifier, "gpt2": TiedGPT, "even": lambda: Classifier(width=32, norm=False)}


def both_runs(strategy: str, model: str, accumulate: int, root: str, more: Any = ()) -> dict[str, Any]:
    """Searches at a batch end, at a validation's end, at the epoch's and at the run's."""
    world_size = torch.distributed.get_world_size()
    options = {"accumulate_grad_batches": accumulate, "devices": world_size, **dict(more)}
    merges = (
        make_rank_merge(root, every_n_train_steps=None, every_n_epochs=1),
        make_rank_merge(f"{root}/b", every_n_train_steps=5),
    )
    run = fit(strategy, root, merges[0], model=MODELS[model], others=[merges[1], SearchNow()], **options)
    baseline = fit_plain(strategy, root, model=MODELS[model], **options)
    best = merges[0].best_artifact
    return {"same": same_trail(run, baseline), "scale": run.module.scale == baseline.module.scale, "best": str(best)}


@pytest.mark.parametrize(
    ("strategy", "model", "accumulate"),
    [
        ("ddp", "classifier", 1),
        ("ddp", "classifier", 2),
        ("ddp", "gpt2", 1),
        ("ddp_find_unused_parameters_true", "classifier", 1),
        ("fsdp2", "classifier", 1),
        ("fsdp2", "classifier", 2),
        ("tp", "even", 1),
    ],
)
def test_two_ranks(ranks: RankPool, tmp_path: Path, strategy: str, model: str, accumulate: int) -> None:
    first, second = ranks.run(both_runs, strategy, model, accumulate, str(tmp_path))
    assert first == second
    assert first["same"]
    assert first["scale"]
    assert len(read_timeline(tmp_path / "merges")) >= 2
    assert len(read_timeline(tmp_path / "b" / "merges")) >= 2
    assert published(tmp_path)


def test_fsdp2_with_tensor_parallelism_on_four_ranks(tmp_path: Path) -> None:
    pool = RankPool(4)
    try:
        results = pool.run(both_runs, "fsdp2 x tp", "even", 1, str(tmp_path))
    finally:
        pool.stop()
    assert results == [results[0]] * 4
    assert results[0]["same"]
    assert published(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs: torch's SyncBatchNorm, FSDP1 under Lightning"
)
@pytest.mark.parametrize(("strategy", "model"), [("ddp", "classifier"), ("fsdp", "even")])
def test_two_gpus(ranks: RankPool, tmp_path: Path, strategy: str, model: str) -> None:
    options = {"accelerator": "gpu", "sync_batchnorm": strategy == "ddp"}
    first, second = ranks.run(both_runs, strategy, model, 1, str(tmp_path), options)
    assert first == second
    assert first["same"]
    assert published(tmp_path)
