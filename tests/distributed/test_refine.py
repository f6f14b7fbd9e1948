"""The refinement by gradients on two ranks: the derivatives are those of the whole search half, and leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_ckmerge import SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.errors import UnsupportedError
from lightning_ckmerge.plugin.evaluate.weight_gradients import GradientRecorder
from tests.support.rank_runs import Classifier, fit, fit_plain, make_rank_merge, points, published, same_trail
from tests.support.ranks import RankPool
from tests.support.slopes import compare_slopes
from tests.support.trainers import SearchNow

REFINE = SearchConfig(max_fraction_of_training=None, n_trials=2, refine="gradient")


def refined_and_plain(strategy: str, accumulate: int, root: str) -> dict[str, Any]:
    merges = (make_rank_merge(root, search=REFINE), make_rank_merge(f"{root}/b", every_n_train_steps=5, search=REFINE))
    options = {"accumulate_grad_batches": accumulate}
    run = fit(strategy, root, merges[0], others=[merges[1], SearchNow()], **options)
    baseline = fit_plain(strategy, root, **options)
    same_gradients = all(
        (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
        for a, b in zip(run.module.parameters(), baseline.module.parameters(), strict=True)
    )
    return {
        "same": same_trail(run, baseline),
        "gradients": same_gradients,
        "scale": run.module.scale == baseline.module.scale,
    }


@pytest.mark.parametrize(
    ("strategy", "accumulate"), [("ddp", 1), ("ddp", 2), ("ddp_find_unused_parameters_true", 1), ("ddp_static", 1)]
)
def test_training_is_the_same_bit_for_bit(ranks: RankPool, tmp_path: Path, strategy: str, accumulate: int) -> None:
    """Goes red if DDP's own forward pass runs with gradients: its reducer then waits for a backward pass."""
    for result in ranks.run(refined_and_plain, strategy, accumulate, str(tmp_path)):
        assert result == {"same": True, "gradients": True, "scale": True}
    names = [t["name"] for path in published(tmp_path) for t in read_manifest(tmp_path / "merges" / path)["trials"]]
    assert "refined-0" in names


class Weighed(Classifier):
    """Logs a mean over samples."""

    def __init__(self) -> None:
        super().__init__(norm=False)

    def validation_step(self, batch: Any, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=len(batch[0]))
        return loss


def slopes(root: str, uneven: bool) -> dict[str, Any]:
    val: Any = DataLoader(points(43), batch_size=8)
    if uneven:
        of_rank = range(24) if dist.get_rank() == 0 else range(24, 38)
        val = DataLoader(Subset(points(43), of_rank), batch_size=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = compare_slopes(monkeypatch)
        options = {"use_distributed_sampler": not uneven, "limit_val_batches": 1.0, "max_steps": 6}
        callback = make_rank_merge(root, search=REFINE, search_on_train_end=False)
        fit("ddp", root, callback, model=Weighed, val=val, **options)
    return found


@pytest.mark.parametrize("uneven", [False, True])
def test_derivatives_are_those_of_all_ranks_batches(ranks: RankPool, tmp_path: Path, uneven: bool) -> None:
    """Goes red if a rank's padding counts, or ranks count alike that have more and fewer samples."""
    first, second = ranks.run(slopes, str(tmp_path), uneven)
    assert first == second
    assert first
    for pairs in first.values():
        for derivative, quotient in pairs:
            assert derivative == pytest.approx(quotient, rel=0.02, abs=2e-5)


def with_fault(root: str) -> dict[str, Any]:
    callback = make_rank_merge(root, search=REFINE, on_error="warn")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            monkeypatch.setattr(GradientRecorder, "watching", lambda self, step: 1 / 0)
        run = fit("ddp", root, callback)
    return {"same": same_trail(run, fit_plain("ddp", root))}


def test_a_fault_on_one_rank_ends_the_refinement_alone(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(with_fault, str(tmp_path)) == [{"same": True}] * 2
    for path in published(tmp_path):
        manifest = read_manifest(tmp_path / "merges" / path)
        assert any(
            "refinement by gradients stopped: rank 1 failed: ZeroDivisionError" in w
            for w in manifest["verdict"]["warnings"]
        )
        assert not any(t["name"].startswith("refined") for t in manifest["trials"])
    assert len(published(tmp_path)) == 2


def sharded(root: str) -> str:
    try:
        fit("fsdp2", root, make_rank_merge(root, search=REFINE))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_sharded_models_are_refused_before_training(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(sharded, str(tmp_path)):
        assert message.startswith("`search.refine` needs a strategy that holds the model whole")
        assert "got ModelParallelStrategy" in message
