"""At its end a run says which weights to use, and applies those that are best on unseen batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, load_merged
from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.standing import read_standing
from tests.support import trainers
from tests.support.trainers import make_merge
from tests.support.warnings import only_expected

NUM_STEPS, SEARCHED = 16, 8


class Circling(pl.LightningModule):
    """Its weights go around the optimum, so that their mean is better; from some step on they are at a place."""

    def __init__(self, ends_at: float | None) -> None:
        super().__init__()
        self.ends_at = ends_at
        self.weight = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return (self.weight * 0).sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = torch.tensor(float(self.trainer.global_step))
        away = self.ends_at is not None and step > SEARCHED
        place = torch.tensor([self.ends_at or 0.0, 0.0]) if away else torch.stack([step.sin(), step.cos()])
        self.weight.data.copy_(place)

    def validation_step(self, batch: Tensor, _: int) -> None:
        loss = (self.weight - 0.01 * batch).square().sum(-1).mean()
        self.log("val_loss", loss)
        self.log("val_good", -loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(root: Path, ends_at: float | None, **options: Any) -> tuple[Circling, CheckpointMergeCallback, pl.Trainer]:
    buffer = BufferConfig(every_n_train_steps=2, update_every_n_steps=1)
    merge = make_merge(dirpath=root / "merges", every_n_train_steps=SEARCHED, buffer=buffer, **options)
    module, data = Circling(ends_at), torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    loaders = DataLoader(torch.zeros(20, 1)), DataLoader(data)
    # One step less, so that the last search is before the end.
    trainer = trainers.train(module, *loaders, root=root, callbacks=[merge], max_steps=NUM_STEPS - 1)
    return module, merge, trainer


@pytest.mark.parametrize(
    "objective", [("val_loss", "min"), ("val_good", "max"), (["val_loss", "val_good"], ["min", "max"])]
)
@pytest.mark.parametrize("ends_at", [None, 0.0], ids=["best is better", "final weights are better"])
def test_best_is_measured_against_the_final_weights(
    tmp_path: Path, ends_at: float | None, objective: tuple[Any, Any]
) -> None:
    monitor, mode = objective
    _, merge, trainer = train(tmp_path, ends_at, monitor=monitor, mode=mode)
    standing = read_standing(tmp_path / "merges")
    assert standing is not None
    assert standing.is_final
    assert (standing.step, standing.best_step) == (trainer.global_step, SEARCHED) == (NUM_STEPS - 1, SEARCHED)
    assert standing.is_stale is (ends_at is not None)
    assert standing.best_value == pytest.approx(read_manifest(tmp_path / "merges" / "best")["verdict"]["value"])
    assert standing.interval is not None
    assert (standing.interval[1] < 0) is standing.is_stale
    if standing.is_stale:
        with pytest.warns(UserWarning, match="Use the final weights of step 15, not"):
            assert merge.best_artifact is not None
    assert read_history(tmp_path / "merges").standing == standing
    assert standing.advice in (tmp_path / "merges" / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize("save_top_k", [0, 1])
@pytest.mark.parametrize("ends_at", [None, 0.0], ids=["best is better", "final weights are better"])
def test_the_better_weights_are_applied(tmp_path: Path, ends_at: float | None, save_top_k: int) -> None:
    """Also where no search ran at the end, and where no artifact is to be kept."""
    module, _, _ = train(tmp_path, ends_at, apply="on_train_end", save_top_k=save_top_k)
    [path] = (tmp_path / "merges").glob("step=*")
    if save_top_k:
        expected = Circling(None)
        with only_expected("se the final weights"):
            load_merged(tmp_path / "merges", expected)
        assert torch.equal(module.weight, expected.weight) is (ends_at is None)
    else:
        assert json.loads((path / "manifest.json").read_text())["files"].keys() == {"report.html", "report.md"}
        assert not (tmp_path / "merges" / "best").exists()
    # On the circle, or at the optimum; the mean of the circle is near it, too.
    assert module.weight.norm() < 0.7
    assert bool(module.weight.norm() == 0) is (ends_at is not None)


def test_a_better_accepted_merge_outranks_the_last_searchs_when_it_is_applied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are accepted, and `save_top_k` keeps the earlier one alone."""
    with caplog.at_level("INFO"):
        module, merge, _ = train(tmp_path, 3.0, apply="on_train_end", save_top_k=1, search_on_train_end=True)
    expected, best = Circling(None), merge.best_artifact
    assert best is not None
    load_merged(best, expected)
    assert torch.equal(module.weight, expected.weight)
    assert f"The module now holds `best`, the merge of step {best.manifest['step']}" in caplog.text
    printed = [word.rstrip(".") for word in caplog.text.split() if word.startswith(str(tmp_path / "merges"))]
    assert printed
    assert all(Path(word).exists() for word in printed)
