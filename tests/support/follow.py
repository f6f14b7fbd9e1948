"""Runs that leave their searches to followers, and followers in processes of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from torch import Tensor

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.due import read_results
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
GATE = "CKMERGE_TEST_GATE"


class Gated(Wandering):
    """In validation, tells that it is there, and waits until the gate is opened: a file ``open``."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        gate = Path(os.environ[GATE])
        (gate / str(os.getpid())).touch()
        wait_until((gate / "open").exists, every_s=0.01)
        return super().validation_step(batch, batch_idx)


class InStep(pl.Callback):
    """Waits after a search is due until it has a result, so that no test depends on who is faster."""

    def __init__(self, dirpath: Path) -> None:
        self.dirpath = dirpath

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % EVERY == 0:
            due = trainer.global_step
            wait_until(lambda: any(r.step == due for r in read_results(self.dirpath).values()), every_s=0.02)


def make_callback(root: Path, **merge: Any) -> CheckpointMergeCallback:
    """Return a callback that leaves its searches to followers unless ``merge`` says otherwise."""
    options = {**MERGE, **merge}
    options["search"] = SearchConfig(**{**MERGE["search"], **merge.get("search", {})})
    options["buffer"] = BufferConfig(**{**MERGE["buffer"], **merge.get("buffer", {})})
    options["evaluation"] = EvaluationConfig(**merge.get("evaluation", {}))
    return CheckpointMergeCallback(**{"dirpath": root / "merges", **options})


def fit(
    root: Path,
    *callbacks: pl.Callback,
    max_steps: int = NUM_STEPS,
    trainer: dict[str, Any] | None = None,
    expected: Sequence[str] = (),
    **merge: Any,
) -> CheckpointMergeCallback:
    """Train, and return the merge callback."""
    own = make_callback(root, **merge)
    # Most of these runs are followed later or never.
    expected = ["no follower came before the next search was due", *expected]
    options = {"max_steps": max_steps, "expected": expected, **(trainer or {})}
    train(Wandering, datamodule=PointsData(), root=root, callbacks=[own, *callbacks], **options)
    return own


def config_of(root: Path, *, model: type[Wandering] = Wandering, **merge: Any) -> Path:
    """Write the config that goes with ``fit``."""
    search = {**MERGE["search"], **merge.pop("search", {})}
    path = write_config(root, **{**MERGE, "dirpath": str(root / "merges"), **merge, "search": search})
    config = yaml.safe_load(path.read_text())
    config["model"]["class_path"] = f"{model.__module__}.{model.__name__}"
    # Lightning refuses it beside `enable_progress_bar: false`.
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.RichProgressBar"})
    path.write_text(yaml.safe_dump(config))
    return path


def _follow(args: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with output.open("w") as file, redirect_stdout(file):
        app(args)


class FollowerProcess:
    """``ckmerge follow`` in a process of its own; use it as a context, which ends it."""

    def __init__(self, root: Path, *more: object, name: str = "follower", gate: Path | None = None) -> None:
        self._output = root / f"{name}.json"
        words = ("follow", root / "merges", "--config", root / "run.yaml", "--poll", 0.02, "--json", *more)
        environment = {GATE: str(gate)} if gate is not None else {}
        self.process = forkserver().Process(target=_follow, args=([str(w) for w in words], self._output, environment))
        self.process.start()

    def result(self, code: int = 0) -> Any:
        """Wait for its end, and return what it prints."""
        self.process.join(200)
        assert self.process.exitcode == code, "its messages are on stderr"
        return json.loads(self._output.read_text())

    def wait_for_gate(self, gate: Path) -> None:
        """Wait until it is in the middle of a search."""
        wait_until((gate / str(self.process.pid)).exists, every_s=0.02)

    def kill(self) -> None:
        """Kill it without a word."""
        self.process.kill()
        self.process.join()

    def __enter__(self) -> FollowerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def die(root: Path, step: int) -> None:
    """Train, and die without a word at a step."""

    class Die(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                wait_until(lambda: list((root / "merges").rglob("index.json")))
                os.kill(os.getpid(), 9)
                time.sleep(60)

    fit(root, Die())
