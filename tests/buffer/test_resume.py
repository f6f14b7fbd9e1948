"""A resumed buffer equals an uninterrupted one; a crash at any moment leaves a checkpoint with all that it names."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage
from lightning_ckmerge.errors import SnapshotError
from tests.support.rolling import RUN_ID, Run, assert_same, files, spans

END = 83


def through_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state as Lightning would: saved and loaded without unpickling objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [1, 5, 23, 40, 42, 80])
@pytest.mark.parametrize("layout", ["uniform", "geometric"])
@pytest.mark.parametrize(
    "overrides", [{}, {"update_every_n_steps": 3}, {"dtype": "bfloat16"}, {"snapshot": "point"}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, at: int, layout: str, overrides: dict[str, Any]
) -> None:
    run = Run()
    whole = run.buffer(DiskStorage(tmp_path / "whole"), capacity=4, layout=layout, **overrides)
    run.train(whole, range(1, END + 1))

    before = run.buffer(DiskStorage(tmp_path / "parts"), capacity=4, layout=layout, **overrides)
    run.train(before, range(1, at + 1))
    state = through_checkpoint(before.state_dict())
    # It trains on, and dies without another checkpoint: what it does to the files must not matter.
    run.train(before, range(at + 1, at + 38))
    before.close()

    after = run.buffer(DiskStorage(tmp_path / "parts"), capacity=4, layout=layout, run_id="ffffffff", **overrides)
    after.load_state_dict(state)
    run.train(after, range(at + 1, END + 1))
    assert_same(after.snapshots(), whole.snapshots())
    assert not after.take_warnings()
    assert state["saved"]
    whole.close(), after.close()


def test_a_run_of_unknown_length_goes_on_with_longer_segments(tmp_path: Path) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path), segment_steps=1, double_segments=True)
    run.train(before, range(1, 102))
    after = run.buffer(DiskStorage(tmp_path), segment_steps=1, double_segments=True)
    after.load_state_dict(before.state_dict())
    assert after.segment_steps == before.segment_steps == 2


def test_a_state_taken_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path / "buffer"))
    buffer.load_state_dict(run.buffer(DiskStorage(tmp_path / "buffer")).state_dict())
    run.train(buffer, range(1, 8))
    assert spans(buffer.snapshots()) == [(1, 5), (6, 7)]
    buffer.close()


def test_memory_starts_empty_and_says_so() -> None:
    run = Run()
    before = run.buffer(MemoryStorage())
    run.train(before, range(1, 14))
    state = through_checkpoint(before.state_dict())
    assert not state["saved"]
    after = run.buffer(MemoryStorage())
    after.load_state_dict(state)
    assert any("starts empty at step 13" in warning for warning in after.take_warnings())
    run.train(after, range(14, 20))
    assert spans(after.snapshots()) == [(14, 18), (19, 19)]
    after.close()


def test_snapshots_of_another_kind_are_left_out_and_kept_for_their_checkpoint(tmp_path: Path) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path))
    run.train(before, range(1, 14))
    state = before.state_dict()
    needed = files(tmp_path)
    after = run.buffer(DiskStorage(tmp_path), snapshot="point")
    after.load_state_dict(state)
    assert any("same kind" in warning for warning in after.take_warnings())
    run.train(after, range(14, 19))
    assert spans(after.snapshots()) == [(14, 18)]
    assert needed < files(tmp_path)
    after.state_dict()
    run.train(after, range(19, 20))
    assert not needed & files(tmp_path)
    after.close()


def test_a_new_state_frees_old_files_only_when_training_goes_on(tmp_path: Path) -> None:
    """The checkpoint with the new state is written after ``state_dict`` returns; until then the old one must do."""
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    run.train(buffer, range(1, 13))
    old = buffer.state_dict()
    needed = files(tmp_path)
    assert len(needed) == 3
    run.train(buffer, range(13, 38))
    buffer.state_dict()
    assert needed < files(tmp_path)
    resumed = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    run.train(buffer, range(38, 39))
    assert not needed & files(tmp_path)
    assert len(files(tmp_path)) == 3
    resumed.load_state_dict(old)
    snapshots, mean = resumed.take_warnings()
    assert "got 2 of 2 missing or incomplete" in snapshots
    assert "The segment starts again after step 12" in mean
    buffer.close()


def test_files_that_no_checkpoint_needs_go_at_once(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), capacity=3)
    run.train(buffer, range(1, 61))
    buffer.snapshots()
    assert len(files(tmp_path)) == 3
    buffer.close()


def test_two_checkpoints_of_one_step_share_the_file_in_progress(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path))
    run.train(buffer, range(1, 8))
    first = buffer.state_dict()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert buffer.state_dict() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    buffer.close()


def test_one_file_in_progress_stays_of_many_checkpoints(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), segment_steps=50)
    for step in range(1, 40):
        run.train(buffer, [step])
        buffer.state_dict()
        assert len(files(tmp_path)) <= 2
    run.train(buffer, range(40, 51))
    buffer.state_dict()
    run.train(buffer, [51])
    assert files(tmp_path) == {f"{RUN_ID}-000000001-000000050-mean.safetensors"}
    buffer.close()


def test_closing_frees_what_only_the_checkpoint_before_needed(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    run.train(buffer, range(1, 11))
    buffer.state_dict()
    run.train(buffer, range(11, 21))
    buffer.state_dict()
    assert len(files(tmp_path)) == 4
    buffer.close()
    assert len(files(tmp_path)) == 2


def test_closing_after_a_fault_keeps_what_the_checkpoint_before_needs(tmp_path: Path) -> None:
    """Training may have died while it wrote the last one, as on a full disk or with a rank that is gone."""
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    run.train(buffer, range(1, 11))
    state = buffer.state_dict()
    run.train(buffer, range(11, 21))
    buffer.state_dict()
    buffer.close(is_saved=False)
    resumed = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    resumed.load_state_dict(state)
    assert spans(resumed.snapshots()) == [(1, 5), (6, 10)]
    assert resumed.take_warnings() == []
    resumed.close()


def test_looking_at_a_run_leaves_its_files_alone(tmp_path: Path) -> None:
    """``Trainer.test(ckpt_path=...)`` loads the state of an old step, too; what came after must stay."""
    run = Run()
    before = run.buffer(DiskStorage(tmp_path))
    run.train(before, range(1, 14))
    state = before.state_dict()
    run.train(before, range(14, 60))
    before.state_dict()
    before.close()
    left = files(tmp_path)
    looking = run.buffer(DiskStorage(tmp_path))
    looking.load_state_dict(state)
    looking.close()
    assert files(tmp_path) == left


def test_loading_removes_only_what_a_crash_of_this_run_left(tmp_path: Path) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path))
    run.train(before, range(1, 14))
    state = before.state_dict()
    named = files(tmp_path)
    left = {
        f"{RUN_ID}-000000011-000000015-mean.safetensors",
        f"{RUN_ID}-000000011-000000015-mean.safetensors.tmp",
    }
    foreign = {
        "fedcba98-000000011-000000015-mean.safetensors",
        f"{RUN_ID}-notes.txt",
        f"{RUN_ID}-000000011-000000015-mean.safetensors.bak",
        "model.safetensors",
    }
    for name in left | foreign:
        (tmp_path / name).write_bytes(b"x")
    after = run.buffer(DiskStorage(tmp_path))
    after.load_state_dict(state)
    assert files(tmp_path) == named | foreign | left
    run.train(after, range(14, 15))
    assert files(tmp_path) == named | foreign
    run.train(after, range(15, 200))
    after.close()
    assert foreign < files(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"run_id": "../../etc"}, {"entries": [{}]}, {"progress": None}, {"unknown": 1}, {"file": {"name": "x"}}],
    ids=str,
)
def test_what_is_no_state_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path))
    run.train(buffer, range(1, 8))
    with pytest.raises(SnapshotError, match="must come from `state_dict`"):
        run.buffer(DiskStorage(tmp_path)).load_state_dict({**buffer.state_dict(), **change})
    buffer.close()


def test_a_name_that_leaves_the_directory_is_never_opened_or_removed(tmp_path: Path) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path / "buffer"))
    run.train(before, range(1, 14))
    state = before.state_dict()
    stored = state["entries"][0]["stored"]
    inside = tmp_path / "buffer" / stored["name"]
    outside = tmp_path / stored["name"]
    inside.rename(outside)
    stored["name"] = f"../{stored['name']}"
    after = run.buffer(DiskStorage(tmp_path / "buffer"))
    after.load_state_dict(state)
    assert spans(after.snapshots()) == [(6, 10), (11, 13)]
    assert len(after.take_warnings()) == 1
    run.train(after, range(14, 200))
    after.close()
    assert outside.is_file()
