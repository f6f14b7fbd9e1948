"""The README keeps its promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.pages import run_python

README = Path(__file__).parents[1] / "README.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_code_trains_searches_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_python(README)
    records = read_timeline(tmp_path / "merges")
    assert [r["step"] for r in records] == [75, 150, 225, 300]
    assert any(r["status"] == "accepted" for r in records)


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
    measured = (README.parent / "docs/quality.md").read_text(encoding="utf-8")
    assert len(rows) == 5
    for confirmed, tested in rows:
        assert f"| {confirmed.strip('*')} | {tested.strip('*')} |" in measured
