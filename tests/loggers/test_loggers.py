"""Real loggers, each with what it can take of a search."""

from __future__ import annotations

import csv
import random
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_ckmerge import EvaluationConfig
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.plugin.publish.loggers import scalars
from lightning_ckmerge.report.figure import draw_search
from tests.support.models import Classifier, points_loader
from tests.support.outcomes import make_outcome
from tests.support.trainers import make_merge, make_trainer

SCALARS = {"merge/val_loss", "merge/latest", "merge/gain", "merge/best_anchor", "merge/seconds", "merge/seconds_total"}


def train(tmp_path: Path, *loggers: Logger) -> list[Artifact]:
    """One search at step 24, with too little data for a verdict: its artifact holds weights, whatever was gained."""
    few = EvaluationConfig(limit_batches=8)
    merge = make_merge(dirpath=tmp_path / "merges", every_n_train_steps=24, evaluation=few)
    trainer = make_trainer(tmp_path, merge, max_steps=26, logger=list(loggers), log_every_n_steps=1)
    pl.seed_everything(1, verbose=False)
    trainer.fit(Classifier(), points_loader(train=True), points_loader(train=False))
    artifacts = [Artifact.open(path) for path in sorted((tmp_path / "merges").glob("step=*"))]
    assert all(artifact.has_weights for artifact in artifacts)
    return artifacts


def test_csv_gets_the_numbers(tmp_path: Path) -> None:
    (artifact,) = train(tmp_path, CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r.get("merge/gain"))
    assert {name for name, value in row.items() if value} >= SCALARS
    assert float(row["merge/gain"]) == pytest.approx(artifact.manifest["verdict"]["gain"])
    assert row["step"] == "24"
    assert float(row["merge/seconds_total"]) >= float(row["merge/seconds"]) > 0


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_gain_stands_beside_the_value_that_it_is_from_and_its_interval(mode: Any) -> None:
    outcome = make_outcome(mode=mode)
    logged = scalars(build_manifest(outcome), 20.0)
    sign = 1 if mode == "min" else -1
    assert sign * (logged["merge/latest"] - logged["merge/val_loss"]) == pytest.approx(logged["merge/gain"])
    assert (logged["merge/gain_low"], logged["merge/gain_high"]) == outcome.verdict.interval
    assert "merge/gain_low" not in scalars(build_manifest(make_outcome(status="unconfirmed")), 20.0)


@pytest.mark.parametrize("apart", [0.0, 1e-9, 0.05])
def test_the_labels_of_the_picture_do_not_meet(apart: float) -> None:
    data = build_manifest(make_outcome())
    data["anchors"][0]["search"]["value"] = data["anchors"][1]["search"]["value"] + apart
    figure = draw_search(data)
    assert figure is not None
    figure.draw_without_rendering()
    labels = [text.get_window_extent() for text in figure.axes[1].texts]
    assert len(labels) == 2
    assert not labels[0].overlaps(labels[1])
    assert not any(label.overlaps(figure.axes[1].bbox) for label in labels)
    assert all(label.x1 <= figure.bbox.x1 for label in labels)


def test_tensorboard_gets_numbers_a_picture_and_the_verdict(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    (artifact,) = train(tmp_path, logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    (picture,) = events.Images("merge/search")
    assert picture.step == 24
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    (text,) = events.Tensors("merge/verdict/text_summary")
    assert artifact.manifest["verdict"]["sentence"].encode() in text.tensor_proto.string_val[0]


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # MLflow's own, of SQLAlchemy
@pytest.mark.parametrize("uploads", [False, True])
def test_mlflow_gets_numbers_a_picture_and_the_artifact(tmp_path: Path, mlflow_uri: str, uploads: bool) -> None:
    """Weights are copied only where the user lets the logger upload checkpoints."""
    from mlflow import MlflowClient

    store = (tmp_path / "store").as_uri()
    logger = MLFlowLogger(f"{uploads}", tracking_uri=mlflow_uri, log_model=uploads, artifact_location=store)
    (artifact,) = train(tmp_path, logger)
    client = MlflowClient(mlflow_uri)
    run = client.get_run(logger.run_id)
    assert run.data.metrics.keys() >= SCALARS
    assert run.data.tags["merge.artifact"] == str(artifact.path)
    folder = f"merges/{artifact.path.name}"
    stored = {item.path.removeprefix(f"{folder}/") for item in client.list_artifacts(logger.run_id, folder)}
    weights = {"model.safetensors"} if uploads else set()
    assert stored == {"manifest.json", "report.html", "report.md", "search.png"} | weights


def test_wandb_gets_numbers_a_picture_and_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the run's own file holds all that a later `wandb sync` would send."""
    import wandb

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="merging")
    try:
        (artifact,) = train(tmp_path, logger)
        assert dict(logger.experiment.summary).keys() >= SCALARS
    finally:
        logger.experiment.finish()
        wandb.teardown()  # `finish` returns before its service has written the last records
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("files/media/images/merge/search_*.png"))
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    assert f"merge-{logger.version}".encode() in content
    assert artifact.manifest["verdict"]["sentence"].encode() in content
    # Weights stay where they are; the artifact refers to them.
    assert (artifact.path / "model.safetensors").as_uri().encode() in content


class Broken(CSVLogger):
    """Its server is away."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("merge/") for name in metrics):
            random.random(), np.random.rand(), torch.rand(())
            raise ConnectionError("no route to host")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_warned_of_once_and_stops_nothing(tmp_path: Path) -> None:
    """Goes red if the search is given up, if the next logger goes without, or if what it drew changes training."""
    broken, sound = (cls(tmp_path / name, name="", version="") for cls, name in ((Broken, "a"), (CSVLogger, "b")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        artifacts = train(tmp_path, broken, sound)
    assert len(artifacts) == 1
    said = [str(w.message) for w in caught if "could not log" in str(w.message)]
    assert len(said) == 1
    assert "Broken could not log a merge search: ConnectionError: no route to host" in said[0]
    assert "merge/gain" in (tmp_path / "b" / "metrics.csv").read_text()
    states = (random.getstate(), torch.get_rng_state().tolist())
    train(tmp_path / "again", CSVLogger(tmp_path / "again", name="", version=""))
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
