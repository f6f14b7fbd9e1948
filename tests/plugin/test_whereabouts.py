"""Where artifacts go: a directory that can be written to, or an error before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.errors import ConfigError
from tests.support.models import Classifier, points_loader
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
    "URL": lambda _: ("s3://bucket/run", {}),
    "URL as path": lambda _: (Path("gs://bucket/run"), {}),
    "chained URL": lambda _: ("simplecache::s3://bucket/run", {}),
    "root is a URL": lambda _: (None, {"default_root_dir": "s3://bucket/run"}),
    "logger at a URL": lambda _: (None, {"logger": CSVLogger("memory://run", version=0)}),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_directory_is_an_error_before_training_that_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    dirpath, options = UNUSABLE[name](tmp_path)
    merge = CheckpointMergeCallback(dirpath=dirpath)
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
