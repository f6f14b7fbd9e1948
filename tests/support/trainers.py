"""Small Trainers and merge callbacks: what tests vary is named, all else is quiet, short and loud about faults."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest
from tests.support.warnings import only_expected

NUM_TRIALS = 2
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_trainer(root: Path | str | None = None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer that says, logs and saves nothing unless ``options`` ask for it; ``root`` is its directory."""
    if any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks):
        options.setdefault("enable_checkpointing", True)
    return pl.Trainer(callbacks=[*callbacks], **{**QUIET, "default_root_dir": root, **options})


def train(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    *data: Any,
    root: Path | str,
    callbacks: Sequence[pl.Callback] = (),
    seed: int | None = 1,
    ckpt_path: Path | str | None = None,
    datamodule: pl.LightningDataModule | None = None,
    expected: Sequence[str] = (),
    **options: Any,
) -> pl.Trainer:
    """Run ``fit`` on ``data``, the loaders of training and validation, and return the Trainer.

    Args:
        model: A module, or a function that makes one once the random numbers are seeded.
        seed: None leaves random numbers as they are.
        expected: Patterns of warnings that may be shown beside those of the inventory.
        options: The Trainer's.
    """
    if seed is not None:
        pl.seed_everything(seed, verbose=False)
    module = model if isinstance(model, pl.LightningModule) else model()
    trainer = make_trainer(root, *callbacks, **options)
    with only_expected(*expected):
        trainer.fit(module, *data, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


def make_merge(**overrides: Any) -> CheckpointMergeCallback:
    """Return a callback that searches often, with few trials, keeps all artifacts and fails loudly."""
    options: dict[str, Any] = {
        "search": SearchConfig(n_trials=NUM_TRIALS, anchors=["uniform"], max_fraction_of_training=None),
        "buffer": BufferConfig(every_n_train_steps=2),
        "on_error": "raise",
        "save_top_k": -1,
        "search_on_train_end": False,
    }
    if not {"every_n_epochs", "train_time_interval"} & overrides.keys():
        options["every_n_train_steps"] = 5
    return CheckpointMergeCallback(**{**options, **overrides})


def merge_callbacks(trainer: pl.Trainer) -> list[CheckpointMergeCallback]:
    return [c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)]


def manifests(dirpath: Path) -> list[dict[str, Any]]:
    """Return the manifests of all artifacts in ``dirpath``, by step."""
    return [read_manifest(path) for path in sorted(dirpath.glob("step=*"))]


class SearchNow(pl.Callback):
    """Searches in a hook: at each call once training has begun, or once at each of ``steps``.

    At a validation's end Lightning has switched gradients off, and its own validation loop is still running.
    """

    def __init__(self, hook: str = "on_validation_end", steps: Container[int] | None = None, min_step: int = 1) -> None:
        self.steps, self.min_step = steps, min_step
        self.searched: list[int] = []
        setattr(self, hook, self._search)

    def _search(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self.steps is None:
            due = not trainer.sanity_checking and step >= self.min_step
        else:
            due = step in self.steps and step not in self.searched
        if due:
            self.searched.append(step)
            search_now(trainer)


def search_now(trainer: pl.Trainer) -> None:
    """Search with all merge callbacks."""
    for callback in merge_callbacks(trainer):
        callback.search_now()
