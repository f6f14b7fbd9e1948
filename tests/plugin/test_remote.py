"""Runs whose artifacts go to a URL."""

from __future__ import annotations

import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_ckmerge import load_merged
from lightning_ckmerge.artifact import upload
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.remote import open_url
from tests.support.bitwise import Case, assert_same_run, fit
from tests.support.commands import ckmerge_json
from tests.support.filesystems import odd_disk
from tests.support.models import Classifier
from tests.support.trainers import make_merge

MERGE: dict[str, Any] = {"save_top_k": 1}


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(upload, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/merges"


def files_at(url: str) -> dict[str, bytes]:
    fs, root = open_url(url)
    return {name.removeprefix(root).lstrip("/"): fs.cat_file(name) for name in fs.find(root)}


def files_of(dirpath: Path) -> dict[str, bytes]:
    found = (p for p in dirpath.rglob("*") if p.is_file() and dirpath / "best" not in p.parents)
    return {p.relative_to(dirpath).as_posix(): p.read_bytes() for p in found}


class Opens(pl.Callback):
    """Opens a gate when training ends."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate

    def on_train_end(self, *_: Any) -> None:
        self.gate.set()


def test_no_step_waits_for_an_upload_and_all_is_there_in_the_end(tmp_path: Path) -> None:
    """Hangs if training waits: no write ends before training does."""
    gate = threading.Event()
    with odd_disk(gate=gate):
        remote = tmp_path / "remote"
        case = Case(merge={**MERGE, "dirpath": f"odd://{remote}"}, callbacks=lambda: [Opens(gate)])
        run = assert_same_run(case, tmp_path)
    (staged,) = (run.root / "ckmerge").iterdir()
    local = files_of(staged)
    kept = {name for name in local if not name.startswith(("buffer/", "run."))}
    assert {n: b for n, b in files_of(remote).items() if n in kept} == {n: local[n] for n in kept}
    assert files_of(remote).keys() - kept == {"run.json"}
    loaded = load_merged(f"odd://{remote}/step=000000010", Classifier())
    assert loaded.manifest == Artifact.open(staged / "step=000000010").manifest


def test_a_later_run_has_a_directory_of_its_own(tmp_path: Path, url: str) -> None:
    for name in ("one", "two"):
        fit(Case(trainer={"max_epochs": 1}), tmp_path / name, [make_merge(dirpath=url, **MERGE)])
    names = files_at(url)
    assert {n for n in names if n.endswith("timeline.jsonl")} == {"timeline.jsonl", "run=2/timeline.jsonl"}
    listed = ckmerge_json("list", url)
    assert listed["run"].endswith("run=2")
    assert [each["run"].endswith("run=1") for each in listed["other_runs"]] == [True]


def test_a_resumed_run_whose_disk_was_lost_goes_on_with_its_artifacts(tmp_path: Path, url: str) -> None:
    fit(Case(trainer={"max_epochs": 1}), tmp_path, [make_merge(dirpath=url, **MERGE)])
    before = files_at(url)
    shutil.rmtree(tmp_path / "ckmerge")
    merge = make_merge(dirpath=url, **MERGE)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[merge],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    case = Case()
    trainer.fit(case.model(), case.train(), case.val(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    after = files_at(url)
    assert not any(name.startswith("run=2") for name in after)
    assert after["timeline.jsonl"].startswith(before["timeline.jsonl"])
    assert len(after["timeline.jsonl"].splitlines()) > len(before["timeline.jsonl"].splitlines())


def test_a_url_that_fails_costs_the_uploads_alone(tmp_path: Path) -> None:
    with odd_disk(is_away=True):
        told = "Uploading to odd://.* failed: OSError"
        case = Case(merge={**MERGE, "dirpath": f"odd://{tmp_path}/remote"}, expected=[told])
        run = assert_same_run(case, tmp_path)
        (staged,) = (run.root / "ckmerge").iterdir()
        assert Artifact.open(staged / "step=000000010").has_weights
        assert not list((tmp_path / "remote").rglob("manifest.json"))


def test_the_loggers_directory_may_be_a_url(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    case = Case(trainer={"max_epochs": 2, "logger": False, "default_root_dir": root})
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        fit(case, tmp_path, [make_merge(**MERGE)])
    assert load_merged(f"{root}/merges/step=000000010", Classifier()).has_weights
