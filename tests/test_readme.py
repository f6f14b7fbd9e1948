"""The README keeps its promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

import lightning_ckmerge
from lightning_ckmerge import CheckpointMergeCallback

README = Path(__file__).parents[1] / "README.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_code_names_what_there_is() -> None:
    """Goes red if the lines that people copy first do not fit the package. The quickstart's code runs in tests/docs."""
    tree = ast.parse(block("python"))
    (imported,) = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert imported.module == "lightning_ckmerge"
    assert {a.name for a in imported.names} <= set(lightning_ckmerge.__all__)
    (call,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "CheckpointMergeCallback"
    ]
    CheckpointMergeCallback(**{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None})


def test_the_yaml_is_one_of_the_callback() -> None:
    entry = yaml.safe_load(block("yaml"))["trainer"]["callbacks"][0]
    assert entry["class_path"] == "lightning_ckmerge.CheckpointMergeCallback"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CheckpointMergeCallback, "callback")
    config = parser.parse_object({"callback": entry["init_args"]})
    assert parser.instantiate_classes(config).callback.settings.search.n_trials == 16


def test_it_reads_as_well_on_a_package_index() -> None:
    """There the repository's own files are no links; their paths are named instead, and exist."""
    text = README.read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []
    paths = re.findall(r"`((?:docs/)?[\w-]+\.md)`", text)
    assert paths != []
    assert [path for path in paths if not (README.parent / path).is_file()] == []


def test_its_figures_are_those_of_the_benchmark() -> None:
    rows = re.findall(
        r"^\| (?!merge|---)[^|]+ \| ([^|]+) \| ([^|]+) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    measured = (README.parent / "docs/evidence.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    for confirmed, tested in rows:
        assert f"| {confirmed.strip('*')} | {tested.strip('*')} |" in measured
