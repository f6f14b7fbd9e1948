"""A run that stops and goes on in a new process equals one that never stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.ranks import forkserver
from tests.support.resuming import main
from tests.support.trainers import manifests

NUM_STEPS = 22


def start(root: Path, **options: Any) -> BaseProcess:
    """Begin to train in a new process, forked from one that has imported Lightning and trained nothing."""
    root.mkdir(parents=True, exist_ok=True)
    process: BaseProcess = forkserver().Process(target=main, args=(root, options))
    process.start()
    return process


def wait(process: BaseProcess, code: int = 0) -> None:
    process.join(600)
    assert process.exitcode == code, "its traceback is on stderr"


def train(root: Path, **options: Any) -> dict[str, str]:
    """Train in this process; return a digest of the state after each batch."""
    root.mkdir(parents=True, exist_ok=True)
    main(root, options)
    return notes(root)


def notes(root: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((root / "notes.json").read_text())
    return found


def snapshots(manifest: dict[str, Any]) -> Sequence[tuple[Any, ...]]:
    return [(s["kind"], s["first_step"], s["last_step"], s["sha256"]) for s in manifest["snapshots"]]


def scores(manifest: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(t["name"], t["coefficients"], t["search"]["value"]) for t in [*manifest["anchors"], *manifest["trials"]]]


def studies(root: Path) -> dict[str, optuna.Study]:
    journal = JournalStorage(JournalFileBackend(str(root / "merges" / "study.journal")))
    names = optuna.get_all_study_names(journal)
    return {name: optuna.load_study(study_name=name, storage=journal) for name in names}


@pytest.mark.parametrize(("accumulate", "save_at"), [(1, 13), (3, 12)], ids=["amid a segment", "accumulation"])
def test_a_resumed_run_equals_an_uninterrupted_one(accumulate: int, save_at: int, tmp_path: Path) -> None:
    """Weights after every later batch, snapshots, schedule, searches: all are the same, segments of four steps too."""
    shared = {"accumulate_grad_batches": accumulate}
    train(tmp_path / "halves", max_steps=15, save_at=save_at, **shared)
    assert [m["step"] for m in manifests(tmp_path / "halves" / "merges")] == [10]
    saved = str(tmp_path / "halves" / "saved.ckpt")
    rest = start(tmp_path / "halves", max_steps=NUM_STEPS, ckpt_path=saved, **shared)
    uninterrupted = train(tmp_path / "whole", max_steps=NUM_STEPS, **shared)
    wait(rest)
    resumed = notes(tmp_path / "halves")
    assert [int(n) for n in resumed] == list(range(accumulate * save_at + 1, accumulate * NUM_STEPS + 1))
    assert resumed == {batch: uninterrupted[batch] for batch in resumed}
    one, two = (manifests(tmp_path / name / "merges") for name in ("whole", "halves"))
    assert [m["step"] for m in one] == [m["step"] for m in two] == [10, 20]
    for before, after in zip(one, two, strict=True):
        assert snapshots(before) == snapshots(after)
        assert scores(before) == scores(after)
    assert len(read_timeline(tmp_path / "halves" / "merges")) == 2
    assert len({name.split("-")[0] for name in studies(tmp_path / "halves")}) == 1  # one run


@pytest.mark.parametrize("search", [{}, {"space": "auto"}], ids=["default", "auto"])
def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, search: dict[str, str]) -> None:
    """Killed while it scores trials; the search at the same step asks for none of those again."""
    root = tmp_path / "killed"
    wait(start(root, max_steps=NUM_STEPS, save_at=7, dies_after=60, search=search), code=9)
    assert not manifests(root / "merges")
    (study,) = studies(root).values()
    told = {t.user_attrs["name"]: t.value for t in study.trials if t.state.is_finished()}
    assert told
    train(root, max_steps=11, ckpt_path=str(root / "saved.ckpt"), search=search)
    (manifest,) = manifests(root / "merges")
    (study,) = studies(root).values()
    again = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    names = [t.user_attrs["name"] for t in again]
    assert len(names) == len(set(names))
    assert told.items() <= {t.user_attrs["name"]: t.value for t in again}.items()
    assert len(manifest["trials"]) == 3
