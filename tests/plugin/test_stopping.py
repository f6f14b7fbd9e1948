"""A search that has found enough, under a Trainer: from YAML, and in what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from optuna.terminator import BestValueStagnationEvaluator, Terminator

from lightning_ckmerge import CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.errors import ConfigError
from tests.support.offline import PointsData, Wandering

STAGNATION = {
    "class_path": "optuna.terminator.Terminator",
    "init_args": {
        "improvement_evaluator": {
            "class_path": "optuna.terminator.BestValueStagnationEvaluator",
            "init_args": {"max_stagnation_trials": 2},
        },
        "min_n_trials": 1,
    },
}
REASONS = {
    "default": ({}, "less than `search.min_gain_left`"),
    "terminator": (
        {"min_gain_left": 0.0, "terminator": STAGNATION},
        "`search.terminator` (Terminator) stopped the search",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_search_from_yaml_stops_once_enough_is_found(name: str, tmp_path: Path) -> None:
    """Which is no shortage: the verdict does not warn of it."""
    options, reason = REASONS[name]
    trained = fit(tmp_path, {"n_trials": 40, "max_fraction_of_training": None, **options})
    manifest = read_manifest(trained / "best")
    stopped, warnings = manifest["cost"]["stopped_early"], manifest["verdict"]["warnings"]
    assert stopped.startswith(f"after {len(manifest['anchors'])} anchors and {len(manifest['trials'])} trials: ")
    assert stopped.endswith(reason)
    assert len(manifest["trials"]) < 40
    assert not any("stopped" in w for w in warnings)
    assert stopped.partition(":")[0] in (trained / "best" / "report.html").read_text()
    assert read_timeline(trained)


def test_a_terminator_follows_one_metric() -> None:
    """Optuna's take a study of one direction."""
    terminator = Terminator(BestValueStagnationEvaluator())
    with pytest.raises(ConfigError, match=r"`search\.terminator` follows one metric, got 2 in `monitor`\."):
        CheckpointMergeCallback(monitor=["a", "b"], search=SearchConfig(terminator=terminator))


def fit(root: Path, search: dict[str, Any]) -> Path:
    """Train as a YAML says, and return the merges' directory."""
    arguments = {"dirpath": str(root / "merges"), "search": search, "buffer": {"every_n_train_steps": 5}}
    arguments |= {"every_n_train_steps": 80, "on_error": "raise"}
    callback = {"class_path": "lightning_ckmerge.CheckpointMergeCallback", "init_args": arguments}
    trainer = {"accelerator": "cpu", "max_steps": 80, "logger": False, "callbacks": [callback]}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": {**trainer, **quiet}}))
    LightningCLI(Wandering, PointsData, args=["fit", "--config", str(config)], save_config_callback=None)
    return root / "merges"
