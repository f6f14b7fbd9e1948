"""Runs that leave their searches to followers, and followers in processes of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.due import list_due, read_results
from lightning_ckmerge.cli.main import app
from tests.support.offline import PointsData, Wandering, write_config
from tests.support.ranks import forkserver
from tests.support.trainers import train
from tests.support.waiting import wait_until

EVERY = 20
NUM_STEPS = 40
# As in YAML, for runs and followers alike.
MERGE: dict[str, Any] = {
    "every_n_train_steps": EVERY,
    "search": {"n_trials": 3, "max_fraction_of_training": None, "where": "follower"},
    "buffer": {"every_n_train_steps": 3, "capacity": 4},
    "save_top_k": -1,
    "on_error": "raise",
}


class InStep(pl.Callback):
    """Waits after a search is due until it has a result, so that no test depends on who is faster."""

    def __init__(self, dirpath: Path) -> None:
        self.dirpath = dirpath

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            due = trainer.global_step
            wait_until(lambda: any(r.step == due for r in read_results(self.dirpath).values()), every_s=0.02)


def fit(root: Path, *callbacks: pl.Callback, max_steps: int = NUM_STEPS, **merge: Any) -> CheckpointMergeCallback:
    """Train, leaving searches to followers unless ``merge`` says otherwise."""
    options = {**MERGE, **merge}
    options["search"] = SearchConfig(**{**MERGE["search"], **merge.get("search", {})})
    options["buffer"] = BufferConfig(**{**MERGE["buffer"], **merge.get("buffer", {})})
    options["evaluation"] = EvaluationConfig(**merge.get("evaluation", {}))
    own = CheckpointMergeCallback(dirpath=root / "merges", **options)
    model: Callable[[], pl.LightningModule] = Wandering
    train(model, datamodule=PointsData(), root=root, callbacks=[own, *callbacks], max_steps=max_steps)
    return own


def config_of(root: Path, **merge: Any) -> Path:
    """Write the config that goes with ``fit``."""
    search = {**MERGE["search"], **merge.pop("search", {})}
    return write_config(root, **{**MERGE, "dirpath": str(root / "merges"), **merge, "search": search})


def _follow(args: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with output.open("w") as file, redirect_stdout(file):
        app(args)


class FollowerProcess:
    """``ckmerge follow`` in a process of its own; use it as a context, which ends it."""

    def __init__(self, root: Path, *more: object, name: str = "follower", **environment: str) -> None:
        self._output = root / f"{name}.json"
        words = ("follow", root / "merges", "--config", root / "run.yaml", "--poll", 0.02, "--json", *more)
        args = ([str(w) for w in words], self._output, environment)
        self.process = forkserver().Process(target=_follow, args=args)
        self.process.start()

    def result(self, code: int = 0) -> Any:
        """Wait for its end, and return what it prints."""
        self.process.join(200)
        assert self.process.exitcode == code, "its messages are on stderr"
        return json.loads(self._output.read_text())

    def kill(self) -> None:
        """Kill it without a word."""
        self.process.kill()
        self.process.join()

    def __enter__(self) -> FollowerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def num_due(dirpath: Path) -> int:
    return len(list_due(dirpath))
