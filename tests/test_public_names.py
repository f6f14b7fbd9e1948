"""The names that users may rely on."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import lightning_ckmerge

NAMES = [
    "Artifact",
    "ArtifactConfig",
    "BufferConfig",
    "CheckpointMergeCallback",
    "Constraint",
    "Decay",
    "EvaluationConfig",
    "Grouped",
    "Interval",
    "MergedEnsemble",
    "Pairwise",
    "SearchConfig",
    "Space",
    "Window",
    "build_ensemble",
    "load_ensemble",
    "load_merged",
    "search_checkpoints",
    "study_checkpoints",
]


def test_the_public_names_are_the_documented_ones() -> None:
    assert lightning_ckmerge.__all__ == NAMES
    assert set(NAMES) <= set(dir(lightning_ckmerge))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_it_says_and_is_documented(name: str) -> None:
    thing = getattr(lightning_ckmerge, name)
    assert thing.__name__ == name
    assert inspect.getdoc(thing)


def test_type_checkers_see_the_same_names() -> None:
    """They do not run `__getattr__`."""
    tree = ast.parse(Path(str(lightning_ckmerge.__file__)).read_text(encoding="utf-8"))
    guarded = [n for n in tree.body if isinstance(n, ast.If)]
    imports = {
        alias.name: node.module
        for block in guarded
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(imports) == NAMES
    for name, module in imports.items():
        assert getattr(lightning_ckmerge, name) is getattr(importlib.import_module(str(module)), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'CheckpointMerge'"):
        _ = lightning_ckmerge.CheckpointMerge


def test_the_version_is_the_distributions() -> None:
    root = Path(str(lightning_ckmerge.__file__)).parents[1]
    assert f'version = "{lightning_ckmerge.__version__}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
