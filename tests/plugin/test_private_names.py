"""Lightning's private names stand in one file, and the installed Lightning has each of them."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
from lightning.pytorch import loops
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader

import lightning_ckmerge
from lightning_ckmerge.plugin.evaluate.lightning_loop import PRIVATE_NAMES

PACKAGE = Path(lightning_ckmerge.__file__).parent
HOME = "plugin/evaluate/lightning_loop.py"


@pytest.fixture
def roots() -> dict[str, Any]:
    """The objects that ``PRIVATE_NAMES`` begins with; attributes are set when they are built, so classes do not do."""
    trainer = pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(BoringModel())  # sets `_last_val_time`
    make_loop = getattr(loops, "_EvaluationLoop", lambda *_: None)
    return {
        "loops": SimpleNamespace(_EvaluationLoop=make_loop(trainer, TrainerFn.FITTING, RunningStage.VALIDATING)),
        "CombinedLoader": CombinedLoader([], "sequential"),
        "Trainer": trainer,
        "LightningModule": pl.LightningModule(),
    }


def missing_sentence(name: str, roots: dict[str, Any]) -> str | None:
    """Return what to tell people if a name is missing, ``None`` if it is there."""
    root, *parts = name.split(".")
    holder = roots[root]
    for part in parts:
        if getattr(holder, part, None) is None and not hasattr(holder, part):
            return (
                f"Lightning {lightning.__version__} lacks {name}, which is {PRIVATE_NAMES[name]}. Find its successor "
                f"and use it in {HOME}, or exclude this version in pyproject.toml."
            )
        holder = getattr(holder, part)
    return None


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_lightning_has_each_private_name(name: str, roots: dict[str, Any]) -> None:
    sentence = missing_sentence(name, roots)
    assert sentence is None, sentence


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_missing_name_is_told_in_a_plain_sentence(
    name: str, roots: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, *path, last = name.split(".")
    holder = roots[root]
    for part in path:
        holder = getattr(holder, part)
    monkeypatch.delattr(holder if last in vars(holder) else type(holder), last)
    sentence = missing_sentence(name, roots)
    assert sentence is not None
    assert sentence.startswith(f"Lightning {lightning.__version__} lacks {name}, which is ")


def test_no_other_file_uses_a_private_name() -> None:
    """Goes red for ``trainer._logger_connector`` in any other file; names of our own on ``self`` are ours."""
    private = {part for name in PRIVATE_NAMES for part in name.split(".") if part.startswith("_")}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() != HOME:
            found += [f"{path.relative_to(PACKAGE)}: {name}" for name in names_in(path.read_text("utf-8")) & private]
    assert not found


def test_the_home_of_private_names_lists_all_that_it_uses() -> None:
    """Goes red if a private attribute of Lightning's objects is used and not listed."""
    listed = {part for name in PRIVATE_NAMES for part in name.split(".") if part.startswith("_")}
    used = names_in((PACKAGE / HOME).read_text("utf-8"))
    assert {name for name in used if not name.startswith("__")} - {"_NormBase"} == listed


def names_in(source: str) -> set[str]:
    """Underscored names that are imported, or read or set on anything but ``self``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        is_attribute = isinstance(node, ast.Attribute)
        if is_attribute and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
    return {name for name in found if name.startswith("_")}
