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
from lightning_ckmerge.config import Constraint, MergeSettings, Triggers
from tests.support.bitwise import Case, fit

PACKAGE = Path(lightning_ckmerge.__file__).parent
# In runs whose learning rate falls, of many trials, or that fail: the field, and the attribute by which it is read.
READ_ELSEWHERE = {"at_low_lr": "at_low_lr", "min_gain_left": "min_gain_left", "on_error": "raises"}
# Where arguments are checked.
CHECKS = {
    (PACKAGE / "config.py", "__post_init__"),
    (PACKAGE / "config.py", "_check_search"),
    (PACKAGE / "checks.py", "check_fields"),
}
# The settings that arguments become, where those have another name.
BECOMES = {"monitor": "objectives", "mode": "objectives", "search_on_train_end": "on_train_end"}


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
    buffer, search, evaluation, artifact, constraint = (
        watched(cls, found) for cls in (BufferConfig, SearchConfig, EvaluationConfig, ArtifactConfig, Constraint)
    )
    with pytest.MonkeyPatch.context() as patch:
        for cls in (MergeSettings, Triggers):
            patch.setattr(f"lightning_ckmerge.plugin.callback.{cls.__name__}", watched(cls, found))
        merge = CheckpointMergeCallback(
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


@pytest.mark.parametrize(
    "cls", [MergeSettings, Triggers, BufferConfig, SearchConfig, EvaluationConfig, ArtifactConfig, Constraint]
)
def test_every_field_is_read(reads: set[tuple[str, str]], cls: Any) -> None:
    unread = {f.name for f in fields(cls)} - {name for owner, name in reads if owner == cls.__name__}
    assert unread - READ_ELSEWHERE.keys() == set()


def test_what_this_run_does_not_read_is_read_elsewhere() -> None:
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py") if p.name != "config.py"]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(READ_ELSEWHERE.values()) - names == set()


def test_every_argument_becomes_a_setting() -> None:
    names = {BECOMES.get(name, name) for name in inspect.signature(CheckpointMergeCallback).parameters}
    assert names == ({f.name for cls in (MergeSettings, Triggers) for f in fields(cls)} - {"triggers"})
