"""What a user's validation may do in the middle of a search: training is the same, and the run's record says why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.crash import run
from tests.crash.run import NUM_STEPS, Regression, make_merge, read_notes, train
from tests.plugin.test_lifecycle import searching

# The search that fails; those of steps 10 and 15 are to be whole.
FAULTY = 5


def raises(error: BaseException) -> Callable[[Any], None]:
    def act(module: Any) -> None:
        raise error

    return act


def scales(factor: float) -> Callable[[Any], None]:
    def act(module: Any) -> None:
        Faulty.factor = factor

    return act


def logs_nothing(module: Any) -> None:
    Faulty.name = None


def logs_another(module: Any) -> None:
    Faulty.name = "other"


class Faulty(Regression):
    """Does something from one batch of one evaluation of the first search on, to the end of that evaluation.

    The class holds its state, which a search does not put back.
    """

    act: ClassVar[Callable[[Any], None]]
    at: ClassVar[tuple[int, int]]
    count: ClassVar[int] = 0
    factor: ClassVar[float] = 1.0
    name: ClassVar[str | None] = "val_loss"

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            Faulty.factor, Faulty.name = 1.0, "val_loss"
        if searching(self.trainer) and self.trainer.global_step == FAULTY:
            Faulty.count += batch_idx == 0
            if (Faulty.count, batch_idx) == self.at:
                Faulty.act(self)
        if Faulty.name is not None:
            self.log(Faulty.name, Faulty.factor * self.loss(*batch), sync_dist=True)


# Fault -> what validation does, in which evaluation and batch, and the reason in the run's record; none: the search
# goes on without that candidate. Evaluation 1 is of the latest weights.
FAULTS: dict[str, tuple[Callable[[Any], None], tuple[int, int], str | None]] = {
    "an error": (raises(ValueError("no such batch")), (2, 3), "ValueError: no such batch"),
    "no memory on a GPU": (raises(torch.OutOfMemoryError("CUDA out")), (3, 0), "OutOfMemoryError: CUDA out"),
    "no memory": (raises(MemoryError("no memory")), (4, 2), "MemoryError: no memory"),
    "the loader's end": (raises(StopIteration()), (2, 3), "the same batches, got 3 of one and 5 of another"),
    "not a number": (scales(float("nan")), (2, 1), None),
    "infinite": (scales(float("inf")), (3, 2), None),
    "nothing logged": (logs_nothing, (3, 0), "a metric that validation logs, got 'val_loss'. Logged are: nothing"),
    "another metric": (logs_another, (2, 0), "a metric that validation logs, got 'val_loss'. Logged are: other"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digests of the training state after each batch."""
    root = tmp_path_factory.mktemp("alone")
    train(root)
    return dict(read_notes(root / "notes-0.txt"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_evaluation(
    name: str, alone: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if a fault reaches training, is lost to the history, or keeps the next search from its artifact."""
    act, at, reason = FAULTS[name]
    monkeypatch.setattr(run, "Regression", Faulty)
    for attribute, value in (("act", staticmethod(act)), ("at", at), ("count", 0)):
        monkeypatch.setattr(Faulty, attribute, value, raising=False)
    make = partial(make_merge, on_error="warn", save_top_k=-1)
    said = train(tmp_path, make=make, expected=["No merge at step 5"])
    assert Faulty.count >= at[0]
    assert dict(read_notes(tmp_path / "notes-0.txt")) == alone
    records = {r["step"]: r for r in read_timeline(tmp_path / "merges")}
    assert list(records) == [FAULTY, 10, NUM_STEPS]
    told = [text for text in said if "No merge at step 5" in text]
    if reason is None:
        assert told == []
        assert Artifact.open(tmp_path / "merges" / records[FAULTY]["artifact"]).has_weights
    else:
        assert records[FAULTY]["status"] == "skipped"
        assert records[FAULTY]["reason"].startswith("The search failed: ")
        assert reason in records[FAULTY]["reason"]
        assert len(told) == 1
    assert all(Artifact.open(tmp_path / "merges" / records[step]["artifact"]) for step in (10, NUM_STEPS))
