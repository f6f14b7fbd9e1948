"""The refinement by gradients under a Trainer: its derivatives, its artifact, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ckmerge import ArtifactConfig, BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.checkpoints.rebuild import rebuild
from lightning_ckmerge.core.spaces import Grouped
from lightning_ckmerge.errors import ConfigError, SearchError
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.markdown import render_markdown
from tests.support.models import Noisy
from tests.support.slopes import compare_slopes
from tests.support.trainers import make_trainer

NUM_STEPS = 80


def run(root: Path, make: type[LightningModule], val: Any = None, **options: Any) -> CheckpointMergeCallback:
    seed_everything(0)
    module = make()
    defaults: dict[str, Any] = {
        "dirpath": root / "merges",
        "every_n_train_steps": NUM_STEPS,
        "on_error": "raise",
        "buffer": BufferConfig(every_n_train_steps=4, update_every_n_steps=1),
        "search": searching(),
        "save_top_k": -1,
    }
    callback = CheckpointMergeCallback(**{**defaults, **options})
    trainer = make_trainer(root, callback, max_steps=NUM_STEPS)
    train = DataLoader(torch.randint(16, (2048,)), batch_size=8)
    trainer.fit(module, train, val or loader(torch.arange(16).repeat(52)))
    torch.save(module.state_dict(), root / "latest.pt")
    return callback


def loader(symbols: Tensor, batch_size: int = 13) -> DataLoader[Any]:
    symbols_dataset: Dataset[Any] = symbols  # type: ignore[assignment]
    return DataLoader(symbols_dataset, batch_size=batch_size)


def searching(**options: Any) -> SearchConfig:
    space = Grouped(factors={"embeddings": 2.0, "mlp": 0.25})
    defaults = {"space": space, "n_trials": 4, "refine": "gradient", "max_fraction_of_training": None}
    return SearchConfig(**{**defaults, **options})


def the_manifest(root: Path) -> dict[str, Any]:
    (path,) = (root / "merges").glob("step=*")
    return read_manifest(path)


def refined(manifest: dict[str, Any]) -> list[str]:
    return [t["name"] for t in manifest["trials"] if t["name"].startswith("refined-")]


@pytest.mark.parametrize(
    ("monitor", "mode", "val"),
    [
        # Eight batches, each of all symbols: a quotient takes two evaluations for each group and snapshot.
        ("val_loss", "min", loader(torch.arange(16).repeat(52), batch_size=104)),
        ("val_gain", "max", loader(torch.arange(16).repeat(52), batch_size=104)),
        # The last batch is smaller, and counts less.
        ("val_loss/dataloader_idx_1", "min", [loader(torch.arange(16)), loader(torch.arange(16).repeat(2) // 2, 6)]),
    ],
)
def test_derivatives_are_those_of_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: str, mode: str, val: Any
) -> None:
    found = compare_slopes(monkeypatch)
    run(tmp_path, Noisy, val, monitor=monitor, mode=mode)
    assert set(found) == set(Noisy().state_dict())
    for pairs in found.values():
        for derivative, quotient in pairs:
            assert derivative == pytest.approx(quotient, rel=0.02, abs=1e-4)


def test_a_refined_merge_is_better_recorded_and_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    callback = run(tmp_path, Noisy)
    artifact = callback.best_artifact
    assert artifact is not None
    manifest = artifact.manifest
    assert manifest["verdict"]["warnings"] == []
    trials = {t["name"]: t["search"]["value"] for t in (*manifest["anchors"], *manifest["trials"])}
    winner = min(trials, key=lambda name: trials[name])
    assert winner in refined(manifest)
    assert manifest["coordinates"] is None
    assert set(manifest["groups"]) == set(Noisy().state_dict())
    assert manifest["cost"]["seconds"]["gradients"] > 0
    latest = torch.load(tmp_path / "latest.pt")
    rebuilt = rebuild(artifact, tmp_path / "merges" / "buffer", latest)
    assert rebuilt.different == ()
    for render in (render_markdown, render_html):
        assert winner in render(manifest)


def test_a_space_without_groups_is_refined_tensor_by_tensor_too(tmp_path: Path) -> None:
    run(tmp_path, Noisy, search=searching(space="decay"))
    manifest = the_manifest(tmp_path)
    assert refined(manifest)
    rows = {name: tuple(group["coefficients"]) for name, group in manifest["groups"].items()}
    assert rows.keys() == Noisy().state_dict().keys()
    assert len(set(rows.values())) > 2


class ReturnsNothing(Noisy):
    def validation_step(self, *args: Any) -> None:
        super().validation_step(*args)


class Detached(Noisy):
    def validation_step(self, *args: Any) -> Tensor:
        return super().validation_step(*args).detach()


class UsesNumPy(Noisy):
    def validation_step(self, *args: Any) -> Tensor:
        loss = super().validation_step(*args)
        loss.numpy()
        return loss


def test_a_loss_that_is_not_returned_is_missed_before_training(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"needs `validation_step` to return the loss.*got NoneType"):
        run(tmp_path, ReturnsNothing, on_error="warn")


@pytest.mark.parametrize(
    ("module", "monitor", "message"),
    [
        (Noisy, "val_size", "to be the mean over batches of the loss.*got val_size .* where the loss is"),
        (Noisy, "val_late", "to be the mean over batches of the loss.*'val_late', which has no value by batch"),
        (Detached, "val_loss", "a loss that depends on the weights"),
        (UsesNumPy, "val_loss", r"RuntimeError: Can't call numpy\(\)"),
    ],
)
def test_what_it_cannot_differentiate_it_says_and_the_search_stands(
    tmp_path: Path, module: Any, monitor: str, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    run(tmp_path, module, monitor=monitor, on_error="warn")
    manifest = the_manifest(tmp_path)
    assert not refined(manifest)
    assert len(manifest["trials"]) == 4
    (warning,) = (w for w in manifest["verdict"]["warnings"] if "refinement" in w)
    assert re.search(f"The refinement by gradients stopped: .*{message}", warning)


def test_where_errors_are_raised_so_is_this_one(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="to be the mean over batches of the loss"):
        run(tmp_path, Noisy, monitor="val_size")


def test_what_has_no_gradient_is_refused_when_built() -> None:
    search = SearchConfig(refine="gradient")
    with pytest.raises(ConfigError, match=r"`search.refine` follows the gradient of one metric, got 2"):
        CheckpointMergeCallback(monitor=["val_loss", "val_acc"], mode=["min", "max"], search=search)
    with pytest.raises(ConfigError, match=r'`search.refine` needs `artifact.adapters` "factors", got "products"'):
        CheckpointMergeCallback(search=search, artifact=ArtifactConfig(adapters="products"))
