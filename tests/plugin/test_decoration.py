"""What is shown of a search may fail in any way: the artifact stands, and it is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from lightning_ckmerge import ArtifactConfig, EvaluationConfig
from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.plugin import run
from lightning_ckmerge.plugin.publish import loggers, pretrained, reports
from lightning_ckmerge.report import run as run_report
from tests.plugin.test_lifecycle import longer
from tests.support.bitwise import Case, fit
from tests.support.models import Classifier
from tests.support.trainers import make_merge

FEW = EvaluationConfig(limit_batches=8)
ERRORS = (ValueError, KeyError, RuntimeError, RecursionError)
# What shows a search, by the place where it is called.
DECORATIONS: dict[str, tuple[Any, str]] = {
    "search's report": (reports, "render_html"),
    "search's text": (reports, "render_markdown"),
    "run's report": (run_report, "render_run_html"),
    "numbers": (loggers, "scalars"),
    "logger": (CSVLogger, "log_metrics"),
    "bar": (TQDMProgressBar, "init_validation_tqdm"),
    "line": (run, "say"),
}


@pytest.mark.parametrize(("name", "error"), [*zip(DECORATIONS, ERRORS * 2, strict=False)])
def test_a_result_is_not_lost_to_its_decoration(
    name: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, attribute = DECORATIONS[name]
    original = getattr(holder, attribute)

    def fails(*args: Any, **kwargs: Any) -> Any:
        text = str(args[-1]) if args else ""
        if name == "line" and "Merge search" not in text:
            return original(*args, **kwargs)
        if name == "logger" and not any(key.startswith("merge/") for key in kwargs.get("metrics") or args[1]):
            return original(*args, **kwargs)
        raise error("no picture")

    monkeypatch.setattr(holder, attribute, fails)
    merge = make_merge(apply="on_train_end", every_n_epochs=100, search_on_train_end=True)
    case = longer()
    case.trainer = {**case.trainer, "enable_progress_bar": name == "bar"}
    case.expected = ["no picture"]
    ended = fit(case, tmp_path, [merge])
    (artifact,) = [Artifact.open(path) for path in tmp_path.rglob("step=*")]
    assert artifact.manifest["verdict"]["status"] == "accepted"
    assert_holds(artifact, ended.module.state_dict())


def test_a_card_that_fails_is_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> str:
        raise KeyError("metrics")

    monkeypatch.setattr(pretrained, "render_card", fails)
    with pytest.warns(UserWarning, match="The model card failed: KeyError"):
        assert pretrained._card({}) == ""


class Elsewhere(CheckpointIO):
    """Writes where the user wants it, in a form of its own."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        pass

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        pass


@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, Elsewhere])
def test_an_artifact_is_whole_whatever_plugin_writes_the_runs_checkpoints(plugin: Any, tmp_path: Path) -> None:
    merge = make_merge(artifact=ArtifactConfig(formats=("safetensors", "ckpt")), evaluation=FEW, every_n_train_steps=10)
    own = plugin()
    case = Case(trainer={"plugins": [own]}, callbacks=lambda: [NoCheckpoint()])
    ended = fit(case, tmp_path, [merge])
    (artifact,) = [Artifact.open(path) for path in tmp_path.rglob("step=*")]
    saved = torch.load(artifact.path / "model.ckpt", weights_only=True)["state_dict"]
    assert_holds(artifact, saved)
    assert "model.ckpt" in artifact.manifest["files"]
    assert ended.trainer.strategy.checkpoint_io is own


def assert_holds(artifact: Artifact, weights: dict[str, Any]) -> None:
    expected = Classifier()
    load_merged(artifact, expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())


class NoCheckpoint(pl.callbacks.ModelCheckpoint):
    """Stands for the checkpoints of the helper, and writes none."""

    def __init__(self) -> None:
        super().__init__(save_top_k=0)
