"""The comparison itself: with any one part of what restores a run taken out, it or the search's own proof sees that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ckmerge.errors import ArtifactError, TraceError
from lightning_ckmerge.plugin.evaluate import lightning_loop as evaluation
from lightning_ckmerge.plugin.restore import kept, paused_run, saved_state
from tests.support.bitwise import Case, assert_same_run, fit_plain
from tests.support.models import points_loader


def nothing(*_: Any, **__: Any) -> None:
    return None


def without(name: str, owner: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, nothing)


def without_connector(patch: pytest.MonkeyPatch) -> None:
    """Let go of the metrics that Lightning had logged before a search."""
    original = evaluation.vars if hasattr(evaluation, "vars") else vars
    patch.setattr(
        evaluation,
        "vars",
        lambda *args: {} if type(args[0]).__name__ == "_LoggerConnector" else original(*args),
        raising=False,
    )


PARTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "random state": without("set_random_state", paused_run),
    "modules": without("_take_module", saved_state.SavedState),
    "tensors and buffers": without("_take_tensor", saved_state.SavedState),
    "dicts": without("put_back", kept.Items),
    "lists": without("put_back", kept.Elements),
    "attributes": without("put_back", kept.Attributes),
    "generators": without("put_back", kept.Generator),
    "arrays": without("_take_array", saved_state.SavedState),
    "slots": lambda patch: patch.setattr(saved_state, "slots_of", lambda cls: ()),
    "loaders": without("keep_run", paused_run),
    "weights": lambda patch: patch.setattr(paused_run.PausedRun, "_restore_weights", lambda s: {}),
    "muted callbacks": lambda patch: patch.setattr(evaluation, "VALIDATION_HOOKS", ()),
    "logged metrics": without_connector,
}


def val() -> DataLoader[Any]:
    """Noisy, and shuffled by a generator of its own: a new one for each run."""
    generator = torch.Generator().manual_seed(1)
    return points_loader(train=False, noise="own", shuffle=True, generator=generator)


class Counting(pl.LightningDataModule):
    """Adds noise to each batch by how many have passed."""

    num_batches = 0

    def train_dataloader(self) -> DataLoader[Any]:
        return points_loader(train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return val()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_batches += 1
        return batch[0] + 0.001 * self.num_batches, batch[1]


class Writes(pl.Callback):
    """Leaves a file at the end of each validation, which nobody takes away again."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dirpath = Path(trainer.default_root_dir, "checkpoints")
        dirpath.mkdir(parents=True, exist_ok=True)
        torch.save({}, dirpath / f"heard-{len(list(dirpath.glob('heard-*')))}.ckpt")


def writes() -> list[pl.Callback]:
    return [Writes()]


CASE = Case(datamodule=Counting, callbacks=writes, merge={"every_n_train_steps": 4}, trainer={"max_epochs": 1})


def test_with_all_parts_in_place_nothing_is_noticed(tmp_path: Path) -> None:
    """Goes red if the tests below would fail a run whose guard is whole."""
    assert_same_run(CASE, tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_of_the_guard_is_noticed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_plain(CASE, tmp_path / "plain")  # with nothing missing
    PARTS[part](monkeypatch)
    # ArtifactError: what was left behind changes what the artifact scores when it is read back.
    with pytest.raises((AssertionError, TraceError, ArtifactError)):
        assert_same_run(CASE, tmp_path)
