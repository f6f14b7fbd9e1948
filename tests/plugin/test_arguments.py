"""Each argument is read by the package: one that is documented and checked, and then forgotten, promises too much."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lightning_ckmerge
from lightning_ckmerge import ArtifactConfig, BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.config import Constraint
from tests.plugin.runs import Case, fit

PACKAGE = Path(lightning_ckmerge.__file__).parent
# In runs whose learning rate falls, or of many trials.
READ_ELSEWHERE = {"at_low_lr", "min_gain_left"}
# Where arguments are checked.
CHECKS = {(PACKAGE / "config.py", "__post_init__"), (PACKAGE / "plugin" / "callback.py", "__init__")}
# What the callback keeps its arguments in, where that has another name.
KEPT_IN = dict.fromkeys(["every_n_train_steps", "every_n_epochs", "train_time_interval"], "triggers")


def watched(cls: type, reads: set[tuple[str, str]]) -> Any:
    """Return ``cls`` so that the package's reads of its attributes are noted; those of checks do not count."""

    def note(self: Any, name: str) -> Any:
        code = sys._getframe(1).f_code
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE) and (path, code.co_name) not in CHECKS:
            reads.add((cls.__name__, name))
        return object.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": note})


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """The reads of a run with searches."""
    found: set[tuple[str, str]] = set()
    buffer, search, evaluation, artifact, constraint, callback = (
        watched(cls, found)
        for cls in (BufferConfig, SearchConfig, EvaluationConfig, ArtifactConfig, Constraint, CheckpointMergeCallback)
    )
    merge = callback(
        every_n_train_steps=5,
        buffer=buffer(every_n_train_steps=2),
        search=search(
            n_trials=1,
            max_fraction_of_training=None,
            constraints=[constraint(monitor="val_acc", mode="max", allowance=1)],
        ),
        evaluation=evaluation(),
        artifact=artifact(),
        on_error="raise",
    )
    fit(Case(trainer={"max_steps": 6}), tmp_path_factory.mktemp("run"), [merge])
    return found


@pytest.mark.parametrize("cls", [BufferConfig, SearchConfig, EvaluationConfig, ArtifactConfig, Constraint])
def test_every_field_is_read(reads: set[tuple[str, str]], cls: Any) -> None:
    unread = {f.name for f in fields(cls)} - {name for owner, name in reads if owner == cls.__name__}
    assert unread - READ_ELSEWHERE == set()


def test_what_this_run_does_not_read_is_read_elsewhere() -> None:
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py") if p.name != "config.py"]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert READ_ELSEWHERE - names == set()


def test_every_argument_is_read(reads: set[tuple[str, str]]) -> None:
    names = {KEPT_IN.get(name, name) for name in inspect.signature(CheckpointMergeCallback).parameters}
    assert names - {name for owner, name in reads if owner == "CheckpointMergeCallback"} == set()
