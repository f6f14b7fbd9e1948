"""Run ``fit`` with and without the merge callback, and compare all that can be seen of the two runs."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.models import Classifier, points_loader
from tests.support.trainers import NUM_TRIALS, QUIET, SearchNow, make_merge, manifests, merge_callbacks
from tests.support.warnings import only_expected


class Recorder(pl.Callback):
    """Keeps a digest of everything at each batch end, validation end and epoch end."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, str]]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._record("train batch", trainer, pl_module, batch=batch, outputs=outputs)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.records.append(("validation batch", {"batch": digest(batch)}))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record("epoch", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record("end", trainer, pl_module)

    def _record(self, when: str, trainer: pl.Trainer, module: pl.LightningModule, **more: Any) -> None:
        state = {
            **{f"weights.{n}": p for n, p in module.named_parameters()},
            **{f"grad.{n}": p.grad for n, p in module.named_parameters()},
            **{f"buffer.{n}": b for n, b in module.named_buffers()},
            **{f"optimizer.{i}": o.state_dict() for i, o in enumerate(trainer.optimizers)},
            **{f"scheduler.{i}": c.scheduler.state_dict() for i, c in enumerate(trainer.lr_scheduler_configs)},
            **{f"own.{n}": v for n, v in getattr(module, "own_state", dict)().items()},
            **more,
            "modes": [m.training for m in module.modules()],
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "torch": torch.get_rng_state(),
            "python": hash(random.getstate()),
            "numpy": np.random.get_state(),
            "progress": trainer.fit_loop.state_dict(),
            "steps": (trainer.global_step, trainer.current_epoch, trainer.should_stop, str(trainer.state.stage)),
            "callback_metrics": trainer.callback_metrics,
            "logged_metrics": trainer.logged_metrics,
            "progress_bar_metrics": trainer.progress_bar_metrics,
            "no_grad": torch.is_grad_enabled(),
        }
        self.records.append((f"{when} at step {trainer.global_step}", {k: digest(v) for k, v in state.items()}))


@dataclass
class Case:
    """How to build one run; each part is built anew for the run with the merge callback and for the one without.

    Args:
        callbacks: The user's, in both runs.
        searching: Callbacks that ask for searches, in the run with the merge callback alone.
        merge: Arguments of the merge callback.
        expected: Patterns of warnings that the runs may show beside those of the inventory.
    """

    model: Callable[[], pl.LightningModule] = Classifier
    train: Callable[[], Any] = lambda: points_loader(train=True)
    val: Callable[[], Any] = lambda: points_loader(train=False)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[pl.Callback]] = tuple
    searching: Callable[[], Sequence[pl.Callback]] = tuple
    merge: Mapping[str, Any] = field(default_factory=dict)
    datamodule: Callable[[], pl.LightningDataModule] | None = None
    make_trainer: Callable[..., Any] = pl.Trainer
    expected: Sequence[str] = ()


@dataclass
class Run:
    """What is left of a run."""

    root: Path
    trainer: pl.Trainer
    module: pl.LightningModule
    recorder: Recorder
    callbacks: list[pl.Callback]


def fit(case: Case, root: Path, merges: Sequence[pl.Callback] = (), seed: int = 1) -> Run:
    """Train once. The merge callbacks come first and the recorder last, so that it sees what they leave."""
    pl.seed_everything(seed, verbose=False)
    module = case.model()
    recorder = Recorder()
    checkpoint = ModelCheckpoint(root / "checkpoints", save_top_k=2, monitor="train_loss", save_last=True)
    callbacks = [*merges, *case.callbacks(), *(case.searching() if merges else ()), recorder]
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        callbacks.append(checkpoint)
    options = {
        "max_epochs": 2,
        **QUIET,
        "enable_checkpointing": True,
        "logger": CSVLogger(root, name="logs", version=0),
        "default_root_dir": root,
        "log_every_n_steps": 1,
        **case.trainer,
    }
    trainer = case.make_trainer(callbacks=callbacks, **options)
    data: dict[str, Any] = (
        {"datamodule": case.datamodule()}
        if case.datamodule
        else {
            "train_dataloaders": case.train(),
            "val_dataloaders": case.val(),
        }
    )
    with only_expected(*case.expected):
        trainer.fit(module, **data)
    return Run(root, trainer, module, recorder, callbacks)


_PLAIN_RUNS: dict[Any, Run] = {}


def fit_plain(case: Case, root: Path) -> Run:
    """Return the run without the merge callback; once a session for all cases that differ in what merges alone.

    ``root`` is where it is trained if it has not been. pytest keeps it until the session's end.
    """
    options = tuple((name, repr(value)) for name, value in sorted(case.trainer.items()))
    key = (case.model, case.train, case.val, options, case.callbacks, case.datamodule, case.make_trainer)
    if key not in _PLAIN_RUNS:
        _PLAIN_RUNS[key] = fit(case, root)
    return _PLAIN_RUNS[key]


def assert_same_run(case: Case, tmp_path: Path, *, merges: int = 1, min_searches: int = 1) -> Run:
    """Train with and without the callback; every recorded digest, file and counter must be equal.

    Returns:
        The run with the callback, in which searches did take place.
    """
    plain = fit_plain(case, tmp_path / "plain")
    merged = fit(case, tmp_path / "merged", [make_merge(**case.merge) for _ in range(merges)])
    compare_runs(plain, merged)
    assert_searched(merged, min_searches)
    return merged


def compare_runs(plain: Run, merged: Run) -> None:
    """Compare all that can be seen of two runs but what the merge callback is there for."""
    assert [when for when, _ in merged.recorder.records] == [when for when, _ in plain.recorder.records]
    for (when, before), (_, after) in zip(plain.recorder.records, merged.recorder.records, strict=True):
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"{when}: {', '.join(changed)} changed"
    expected, actual = plain.module.state_dict(), merged.module.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert read_csv(merged.root) == read_csv(plain.root)
    compare_checkpoints(plain, merged)
    assert {k: digest(v) for k, v in other_states(merged).items()} == {
        k: digest(v) for k, v in other_states(plain).items()
    }


def compare_checkpoints(plain: Run, merged: Run) -> None:
    """The same files with the same content, and the same best one."""
    names = sorted(p.name for p in (plain.root / "checkpoints").glob("*"))
    assert names == sorted(p.name for p in (merged.root / "checkpoints").glob("*"))
    for name in names:
        before, after = (torch.load(r.root / "checkpoints" / name, weights_only=False) for r in (plain, merged))
        for checkpoint, run in ((before, plain), (after, merged)):
            states = checkpoint.pop("callbacks", {})
            # A Timer's state is a time.
            others = {k: v for k, v in states.items() if "CheckpointMerge" not in k and not k.startswith("Timer")}
            checkpoint["others"] = relative(others, run.root)
        assert {k: digest(v) for k, v in before.items()} == {k: digest(v) for k, v in after.items()}, name


def other_states(run: Run) -> dict[str, Any]:
    """The final state of all callbacks but the merge callbacks and those that ask for searches."""
    ours = (CheckpointMergeCallback, SearchNow, Timer)  # a Timer holds a time
    others = [c for c in run.callbacks if not isinstance(c, ours)]
    return {c.state_key.replace(str(run.root), ""): relative(c.state_dict(), run.root) for c in others}


def relative(value: Any, root: Path) -> Any:
    """Take the run's directory out of every path."""
    if isinstance(value, Mapping):
        return {relative(k, root): relative(v, root) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [relative(v, root) for v in value]
    return value.replace(str(root), "") if isinstance(value, str) else value


def read_csv(root: Path) -> list[dict[str, str]]:
    """The rows of the run's own metrics."""
    path = root / "logs" / "version_0" / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("merge/")} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def merges_dir(run: Run) -> Path:
    return run.root / "logs" / "version_0" / "merges"


def assert_searched(run: Run, min_searches: int = 1) -> None:
    """Each callback's searches were published whole: anchors, trials, verdict."""
    for callback in merge_callbacks(run.trainer):
        dirpath = callback._resolved_dirpath
        assert dirpath is not None
        published = manifests(dirpath)
        assert len(published) == len(read_timeline(dirpath)) >= min_searches
        for manifest in published:
            assert len(manifest["anchors"]) >= 2
            assert sum(t["name"].startswith("trial-") for t in manifest["trials"]) == NUM_TRIALS


def digest(value: Any) -> str:
    """A SHA-256 over the value's bits, so that equal means ``torch.equal``."""
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
            yield b","
    else:
        yield json.dumps(value, default=repr).encode()
