"""Several runs at a time: in one directory, from one checkpoint, in one Trainer; and one after another in a process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ckmerge.artifact import runs
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import DirectoryLock, list_runs
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.artifact.upload import find_remote_fault
from lightning_ckmerge.buffer.storage import FILE_NAME
from lightning_ckmerge.plugin.dirpath import find_fault
from tests.crash.checks import check_checkpoint
from tests.crash.run import SAVE_EVERY, checkpoint_of, make_merge, read_notes, train

STOP = 2 * SAVE_EVERY + 1
MEET = STOP + 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digests of the training state after each batch of a run that is alone."""
    root = tmp_path_factory.mktemp("alone")
    train(root)
    return dict(read_notes(root / "notes-0.txt"))


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= STOP


class Meets(pl.Callback):
    """Does something in the middle of a run, which lives on."""

    def __init__(self, other: Callable[[], object]) -> None:
        self.other = other

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == MEET:
            self.other()


def go_on(root: Path, name: str, *others: pl.Callback) -> None:
    """Resume the run ``first`` under another name, in the same `dirpath`."""
    train(root / name, ckpt_path=checkpoint_of(root / "first"), others=others, make=lambda _: make_merge(root))


def in_another_process(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Resume as another process would, which sees nothing of this one's locks but what the file system tells."""
    with patch.context() as other:
        other.setattr(DirectoryLock, "_held", set())
        go_on(root, "third")


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre says, mounted without `flock`


@pytest.mark.parametrize("knows_locks", [True, False])
def test_two_living_runs_from_one_checkpoint_share_no_file(
    knows_locks: bool, alone: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if both write snapshots under the checkpoint's names, or one tidies up what the other needs."""
    train(tmp_path / "first", others=[Stops()], make=lambda _: make_merge(tmp_path))
    if knows_locks:
        other = partial(go_on, tmp_path, "third")
    else:
        monkeypatch.setattr(runs, "_lock", no_locks)
        other = partial(in_another_process, tmp_path, monkeypatch)
    go_on(tmp_path, "second", Meets(other))
    merges, ids = tmp_path / "merges", []
    for name in ("second", "third"):
        found = dict(read_notes(tmp_path / name / "notes-0.txt"))
        assert found == {batch: alone[batch] for batch in found}
        saved = checkpoint_of(tmp_path / name)
        assert saved is not None
        check_checkpoint(saved)
        ids.append(ids_of(saved))
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]) == 2
    where = [p for p in list_runs(merges).values() if read_timeline(p)]
    assert len(where) == (2 if knows_locks else 1)
    assert all(Artifact.open(p) for d in where for p in d.glob("step=*"))
    # Nothing of the run that both went on from is left: each has a newer checkpoint.
    left = {p.name[:8] for d in where for p in (d / "buffer").iterdir() if FILE_NAME.fullmatch(p.name)}
    assert left == {*ids[0], *ids[1]}


def ids_of(checkpoint: Path) -> set[str]:
    """Return how the snapshots' names begin that a checkpoint names."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = [s for key, s in states.items() if key.startswith("CheckpointMerge")]
    return {e["stored"]["name"][:8] for buffer in state["buffers"] for e in buffer["entries"]}


def test_several_callbacks_in_one_trainer_resume_apart(alone: dict[int, str], tmp_path: Path) -> None:
    """Their buffers live side by side, and each goes on from its own state."""

    def with_another(*others: pl.Callback) -> None:
        another = make_merge(tmp_path / "another", every_n_train_steps=4)
        train(tmp_path / "one", others=[another, *others])

    with_another(Stops())
    with_another()
    notes = read_notes(tmp_path / "one" / "notes-0.txt")
    assert all(alone[batch] == found for batch, found in notes)
    steps = [[r["step"] for r in read_timeline(tmp_path / name / "merges")] for name in ("one", "another")]
    assert steps == [[5, 7, 10, 15], [4, 7, 8, 12, 15]]  # at 7 the first ended
    merges = [tmp_path / name / "merges" for name in ("one", "another")]
    assert len({next((d / "buffer").iterdir()).name[:8] for d in merges}) == 2


def test_twenty_runs_in_one_process_leave_nothing_open(alone: dict[int, str], tmp_path: Path) -> None:
    """All in one `dirpath`; threads, locks and files are given back, and each run has its own directory."""
    before = (len(os.listdir("/proc/self/fd")), threading.active_count()) if os.path.isdir("/proc/self/fd") else None
    for number in range(20):
        train(tmp_path / f"run-{number}", num_steps=3, make=lambda _: make_merge(tmp_path))
        if before is not None and number == 0:
            before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    if before is not None:  # files of earlier tests may be closed meanwhile
        assert len(os.listdir("/proc/self/fd")) <= before[0]
        assert threading.active_count() <= before[1]
    assert DirectoryLock._held == set()
    assert len(list_runs(tmp_path / "merges")) == 20
    trails = {tuple(read_notes(tmp_path / f"run-{number}" / "notes-0.txt")) for number in range(20)}
    (trail,) = trails
    assert all(alone[batch] == found for batch, found in trail)


def test_runs_that_begin_at_once_do_not_refuse_a_directory_that_one_of_them_makes(tmp_path: Path) -> None:
    """Goes red if a directory counts as not writable since another run makes it, or removes it, at the same time."""
    dirpath = tmp_path / "runs" / "merges"
    with ThreadPoolExecutor(8) as pool:
        for place in (lambda: find_fault(dirpath), lambda: find_remote_fault(f"file://{dirpath}")):
            found = [pool.submit(place) for _ in range(400)]
            assert {f.result() for f in found} == {None}
