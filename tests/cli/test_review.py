from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.artifact.load import load_merged
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.runs import Claim
from lightning_ckmerge.report.markdown import render_markdown
from lightning_ckmerge.report.text import ReportPlace
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.outcomes import LocalWeights, Publish, TiedModel, make_outcome, tensors_of


@pytest.fixture
def merges(publish: Publish, tmp_path: Path) -> Path:
    """A run with a rejected, an accepted and an outranked search."""
    publish(step=100, status="rejected", weights=None)
    publish(step=200, value=1.5, save_top_k=1)
    publish(step=300, value=1.7, save_top_k=1)
    return tmp_path / "merges"


def test_list_tells_each_search_and_what_is_left_of_it(merges: Path) -> None:
    found = ckmerge_json("list", merges)
    assert found["best"] == "step=000000200"
    assert [(s["step"], s["status"], s["holds"]) for s in found["searches"]] == [
        (100, "rejected", "record"),
        (200, "accepted", "weights"),
        (300, "accepted", "record"),
    ]
    assert [s["gain"] for s in found["searches"]] == [0.05] * 3
    assert found["searches"][1]["value"] == 1.5
    assert "other_runs" not in found
    lines = [line.split() for line in ckmerge("list", merges).output.splitlines() if "step=" in line]
    assert [line[0] for line in lines] == ["100", "200", "300"]
    assert "(best)" in lines[1]


def test_list_sees_removed_and_damaged_artifacts(merges: Path) -> None:
    (merges / "step=000000200" / "manifest.json").write_text("{")
    (merges / "step=000000300").rename(merges / "elsewhere")
    assert [s["holds"] for s in ckmerge_json("list", merges)["searches"]] == ["record", "damaged", "removed"]


@pytest.fixture
def runs(publish: Publish, tmp_path: Path) -> Path:
    """Two runs in one directory; the second was rejected."""
    dirpath = tmp_path / "merges"
    for step, value, status in ((100, 1.5, "accepted"), (7, 1.9, "rejected")):
        claim = Claim(dirpath)
        store = ArtifactStore(claim.place.dirpath, mode="min", save_top_k=1, max_shard_size=1 << 30)
        weights = LocalWeights(tensors_of(TiedModel()))
        store.publish(build_manifest(make_outcome(step=step, value=value, status=status)), weights)
        claim.release()
    return dirpath


def test_list_shows_all_runs_of_a_directory_and_marks_the_newest(runs: Path) -> None:
    found = ckmerge_json("list", runs)
    (other,) = found["other_runs"]
    assert [[s["step"] for s in run["searches"]] for run in (found, other)] == [[7], [100]]
    assert (found["run"], other["run"]) == (str(runs / "run=2"), str(runs / "run=1"))
    assert (found["best"], other["best"]) == (None, "step=000000100")
    lines = ckmerge("list", runs).output.splitlines()
    assert [line for line in lines if "run=" in line] == [str(runs / "run=1"), f"{runs / 'run=2'}, the newest run"]
    for name, step in (("run=1", 100), ("run=2", 7)):
        assert [s["step"] for s in ckmerge_json("list", runs / name)["searches"]] == [step]
        assert "newest" not in ckmerge("list", runs / name).output


@pytest.mark.parametrize("command", ["show", "verify", "report"])
def test_each_run_of_a_directory_can_be_named_and_a_choice_is_told(runs: Path, command: str) -> None:
    for first in (runs / "run=1", runs / "run=1" / "best", runs / "run=1" / "step=000000100"):
        result = ckmerge(command, first)
        assert "step=000000100" in result.output
        assert "note" not in result.stderr
    told = ckmerge(command, runs / "best")
    assert f"note: {runs / 'best'} belongs to run=1: the newest run, run=2, has no accepted merge yet." in told.stderr
    assert "the newest run, run=2" in ckmerge_json(command, runs / "best")["note"]
    if command == "report":
        assert f"For another, pass its path, such as {runs / 'run=1'}." in ckmerge_json("report", runs)["note"]
    else:
        error = ckmerge(command, runs, code=2).stderr
        assert error.endswith(f"newest of 2 runs in {runs}. For another, pass its path, such as {runs / 'run=1'}.\n")


def test_loading_tells_which_of_several_runs_it_took(runs: Path) -> None:
    with pytest.warns(UserWarning, match="belongs to run=1: the newest run, run=2, has no accepted merge yet"):
        taken = load_merged(runs / "best", TiedModel())
    assert taken.path == load_merged(runs / "run=1", TiedModel()).path == runs / "step=000000100"


def test_list_of_a_directory_without_searches_says_what_to_name(tmp_path: Path) -> None:
    assert "Name the callback's `dirpath`" in ckmerge("list", tmp_path, code=2).stderr


def test_off_a_terminal_nothing_is_coloured(merges: Path) -> None:
    assert "\x1b" not in ckmerge("list", merges).output + ckmerge("show", merges).output


def test_show_prints_the_verdict_first_and_the_manifest_as_json(publish: Publish, merges: Path) -> None:
    artifact = publish(step=400, value=1.0, warnings=("A larger window may gain more.",))
    assert ckmerge_json("show", artifact.path) == artifact.manifest
    text = ckmerge("show", merges).output
    assert text.splitlines()[2].rstrip() == "Accepted: The verdict on val_loss is: accepted."
    assert "A larger window may gain more." in text
    assert f'load_merged("{(merges / "best").resolve().as_posix()}", model)' in text
    assert all(a["name"] in text for a in artifact.manifest["anchors"])


def test_what_is_unconfirmed_is_said_once_and_named_where_nothing_was_accepted(publish: Publish) -> None:
    artifact = publish(step=100, status="unconfirmed")
    manifest = artifact.path / "manifest.json"
    told = "Unconfirmed: merging lowers val_loss."
    manifest.write_text(manifest.read_text().replace(artifact.manifest["verdict"]["sentence"], told))
    assert ckmerge("show", artifact.path).output.splitlines()[2].rstrip() == told
    merges = artifact.path.parent
    error = ckmerge("show", merges, code=2).stderr
    assert (
        f"got 1 search in {merges}: 1 unconfirmed. Name an artifact by its own directory, such as {artifact.path}"
        in error
    )


def test_what_has_been_removed_is_said(publish: Publish, tmp_path: Path) -> None:
    """Goes red if a step that the timeline knows is answered as any misspelt path."""
    for step in (100, 200):
        publish(step=step, value=1.0 / step, save_top_k=1)
    gone = tmp_path / "merges" / "step=000000100"
    error = ckmerge("show", gone, code=2).stderr
    assert f"got {gone}: its search was accepted, and the directory has been removed since" in error
    assert "since" not in ckmerge("show", tmp_path / "merges" / "step=000000300", code=2).stderr


@pytest.mark.parametrize("command", ["show", "report", "list", "verify"])
def test_a_file_is_no_artifact(publish: Publish, command: str) -> None:
    page = publish().path / "manifest.json"
    assert str(page) in ckmerge(command, page, code=2).stderr


def test_a_runs_page_loads_from_anywhere(merges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a search's does. Goes red if the code on it has the path that the command was given."""
    monkeypatch.chdir(merges.parent)
    ckmerge("report", "merges")
    told = (merges / "report.md").read_text()
    assert f'load_merged("{merges.resolve() / "step=000000200"}", model)' in told


def test_show_tells_every_metric_on_every_loader(publish: Publish) -> None:
    artifact = publish(others={"val_loss/dataloader_idx_1": 3.0})
    lines = [" ".join(line.split()) for line in ckmerge("show", artifact.path).output.splitlines()]
    assert "val_loss monitored 2.0500 2.0120 2.0000 −0.0500" in lines
    assert "val_loss/dataloader_idx_1 3.0500 3.0120 3.0000 −0.0500" in lines


def test_names_are_shown_as_they_are(publish: Publish) -> None:
    """Square brackets are rich's markup."""
    artifact = publish(monitor="loss[bold]/x")
    assert "loss[bold]/x" in ckmerge("show", artifact.path).output


def test_the_report_of_a_search_is_printed_and_its_files_are_left_alone(publish: Publish) -> None:
    artifact = publish()
    assert ckmerge("report", artifact.path).output == render_markdown(
        artifact.manifest, ReportPlace(path=artifact.path)
    )
    assert ckmerge_json("verify", artifact.path)["ok"]


def test_the_report_of_a_run_is_written_anew(merges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    found: dict[str, Any] = ckmerge_json("report", merges, "--open")
    page = merges / "report.html"
    assert Path(found["html"]) == page
    assert opened == [page.resolve().as_uri()]
    assert (merges / "report.md").read_text() == found["markdown"] == ckmerge("report", merges).output
    assert "step=000000200" in page.read_text()
    assert sorted(p.name for p in merges.glob(".tmp-*")) == []
