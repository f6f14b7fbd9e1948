"""Where artifacts go: a directory that can be written to, or an error before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.publish.publisher import whereabouts
from tests.support.models import Classifier, points_loader
from tests.support.outcomes import LocalWeights, TiedModel, make_outcome, tensors_of
from tests.support.trainers import make_trainer

Arguments = Callable[[Path], tuple[Any, dict[str, Any]]]
# The callback's `dirpath`, and the Trainer's arguments.
UNUSABLE: dict[str, Arguments] = {
    "a file": lambda root: (root / "file", {}),
    "below a file": lambda root: (root / "file" / "merges", {}),
    "a name too long": lambda root: (root / "new" / ("x" * 300), {}),
    "a path too long": lambda root: (root / "/".join(["x" * 250] * 20), {}),
    "a NUL": lambda root: (f"{root}/a\0b", {}),
    "no file system for files": lambda _: (Path("/proc/merges"), {}),
    "URL of no known kind": lambda _: ("nosuch://bucket/run", {}),
    "URL as path": lambda _: (Path("nosuch://bucket/run"), {}),
    "URL below a file": lambda root: (f"file://{root}/file/merges", {}),
    "root is a URL": lambda root: (None, {"default_root_dir": f"file://{root}/file"}),
    "URL for what must be local": lambda _: ("memory://run", {"buffer": {"dirpath": "memory://run"}}),
    "URL not given": lambda root: (root / "merges", {"buffer": {"dirpath": root}}),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_directory_is_an_error_before_training_that_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    dirpath, options = UNUSABLE[name](tmp_path)
    merge = CheckpointMergeCallback(dirpath=dirpath, buffer=options.pop("buffer", {}))
    trainer = make_trainer(None, merge, **{"max_steps": 1, **options})
    with pytest.raises(ConfigError, match="URL" if "URL" in name else "must be a directory that can be written to"):
        trainer.fit(Classifier(), points_loader(train=True), points_loader(train=False))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_home_directory_is_known_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    merge = CheckpointMergeCallback(dirpath="~/merges")
    trainer = make_trainer(tmp_path, merge, max_steps=1)
    trainer.fit(Classifier(), points_loader(train=True), points_loader(train=False))
    assert merge._resolved_dirpath == tmp_path / "merges"


@pytest.mark.parametrize(
    ("status", "save_top_k", "told"),
    [
        ("accepted", 2, "Artifact: {path}"),
        ("unconfirmed", 1, "Artifact: {path}"),
        ("rejected", 1, "Record: {path} (weights not kept: the search was rejected)"),
        ("accepted", 0, "Record: {path} (weights not kept: `save_top_k` is 0)"),
        ("accepted", 1, "Record: {path} (weights not kept: `save_top_k` is 1, and better merges are kept)"),
    ],
)
def test_a_directory_without_weights_is_told_as_a_record(
    status: Any, save_top_k: int, told: str, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path, mode="min", save_top_k=save_top_k, max_shard_size=1 << 30)
    weights = LocalWeights(tensors_of(TiedModel()))
    store.publish(build_manifest(make_outcome(step=1, value=1.0)), weights)
    artifact = store.publish(build_manifest(make_outcome(step=2, value=2.0, status=status)), weights)
    assert whereabouts(artifact, store) == told.format(path=artifact.path)
