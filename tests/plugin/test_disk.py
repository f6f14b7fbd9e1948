"""A disk that fails under a run: training goes on bit for bit, people are told, and all is well when it is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.runs import Claim, read_run
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer import storage
from lightning_ckmerge.search.study import open_storage
from tests.crash.checks import check_checkpoint
from tests.crash.run import CAPACITY, NUM_STEPS, checkpoint_of, make_merge, read_notes, train

# The buffer loses snapshots, and the search of step 5 its artifact; those of 10 and 15 are to be whole.
BREAKS, HEALS = 3, 7
OURS = ["snapshot", "No merge", "segment in progress", "failed: ", "The buffer must"]
needs_mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None, reason="needs to mount file systems"
)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=120)


def umount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=120)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digests of the training state after each batch, on a disk that works."""
    root = tmp_path_factory.mktemp("alone")
    train(root)
    return dict(read_notes(root / "notes-0.txt"))


class Fails(pl.Callback):
    """Breaks the disk at one step, and mends it at a later one."""

    def __init__(self, broken: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.broken = broken
        self.stack = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == BREAKS:
            self.stack.enter_context(self.broken())
        if trainer.global_step == HEALS:
            self.stack.close()


def told(root: Path, place: Path, broken: Callable[[], contextlib.AbstractContextManager[None]]) -> list[str]:
    """Train with a `dirpath` on a disk that breaks and heals; return the warnings."""
    fails = Fails(broken)
    try:
        said = train(root, others=[fails], make=lambda _: make_merge(place, on_error="warn"), expected=OURS)
    finally:
        fails.stack.close()
    return [text for text in said if re.search("|".join(OURS), text)]


def assert_whole(root: Path, place: Path, alone: dict[int, str]) -> None:
    """Training was the same; what came after the disk was well is whole."""
    assert dict(read_notes(root / "notes-0.txt")) == alone
    saved = checkpoint_of(root)
    assert saved is not None
    check_checkpoint(saved)
    merges = place / "merges"
    searches = [r["step"] for r in read_timeline(merges) if r["artifact"]]
    assert searches[-2:] == [10, NUM_STEPS]
    assert all(Artifact.open(p) for p in merges.glob("step=*"))
    assert Artifact.open(merges / "best").has_weights
    assert not list(merges.glob(".tmp-*"))
    open_storage(merges / "study.journal").get_all_studies()


@contextlib.contextmanager
def full(place: Path) -> Iterator[None]:
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Another mount on top of the first, which has files open."""
    mount("--bind", str(place), str(place))
    mount("-o", "remount,ro,bind", str(place))
    try:
        yield
    finally:
        umount(place)


@contextlib.contextmanager
def vanished(place: Path) -> Iterator[None]:
    shutil.rmtree(place / "merges")
    yield


FAULTS = {"full": full, "read-only": read_only, "vanished": vanished}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path))
    yield path
    umount(path)


# What is said of a snapshot that was lost, of an artifact, and of a file that could not be removed.
TOLD: dict[str, list[str]] = {
    "full": [
        r"A snapshot must fit its storage, got OSError: .*No space left.* Free some space, .* steps 3 to 4",
        r"No merge at step 5: a search's journal must be writable, got OSError .*No space left.* Free some space",
    ],
    "read-only": [
        r"A snapshot must fit its storage, got OSError: .*Read-only file system",
        r"No merge at step 5: a search's journal must be writable, got OSError .*Read-only file system",
        r"The buffer must be able to delete its files, .*Read-only file system.* It tries again",
    ],
    "vanished": [
        r"a snapshot's file must be readable, got .*No such file.* to the run. .* merges will miss steps 1 to 2"
    ],
}


@needs_mounts
@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_fails_for_a_while_costs_what_was_written_then(
    name: str, alone: dict[int, str], tmp_path: Path, place: Path
) -> None:
    """Goes red if a fault of the disk reaches training, is not told with its remedy, or outlasts itself."""
    said = told(tmp_path / "run", place, lambda: FAULTS[name](place))
    assert_whole(tmp_path / "run", place, alone)
    assert [pattern for pattern in TOLD[name] if not re.search(pattern, "\n".join(said))] == []
    assert [text for text in said if not re.search("|".join(TOLD[name]), text) and "steps 5 to 6" not in text] == []
    # A run that goes on finds its home, also where that had vanished.
    record = read_run(place / "merges")
    assert record is not None
    assert record.resumable
    claim = Claim(place / "merges", record.run_id)
    assert claim.place.source == claim.place.dirpath == place / "merges"
    claim.release()
    ids = {p.name[:8] for p in (place / "merges" / "buffer").iterdir()}
    assert ids == {record.run_id}
    assert len(list((place / "merges" / "buffer").iterdir())) <= 2 * CAPACITY + 2


def without_links(patch: pytest.MonkeyPatch) -> None:
    for name in ("symlink", "link"):
        patch.setattr(os, name, refuse)


def without_renamed_directories(patch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def of_files(source: Any, target: Any) -> None:
        if os.path.isdir(source):
            refuse()
        rename(source, target)

    patch.setattr(os, "rename", of_files)


def without_speed(patch: pytest.MonkeyPatch) -> None:
    write = storage.write_file

    def slowly(*args: Any) -> Any:
        time.sleep(0.05)
        return write(*args)

    patch.setattr(storage, "write_file", slowly)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


# What such a file system lacks -> the warnings of a run on it.
LACKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int]] = {
    "links": (without_links, 0),
    "renamed directories": (without_renamed_directories, 3),
    "speed": (without_speed, 0),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_file_system_that_lacks_something(
    name: str, alone: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where directories cannot be renamed no artifact appears, not even half of one, and each search says so."""
    make, num_warnings = LACKS[name]
    make(monkeypatch)
    said = told(tmp_path, tmp_path, contextlib.nullcontext)
    monkeypatch.undo()
    assert len(said) == num_warnings
    assert all("must be written whole, got PermissionError" in t and "fix the cause" in t for t in said)
    if num_warnings:
        assert dict(read_notes(tmp_path / "notes-0.txt")) == alone
        assert not [p for p in (tmp_path / "merges").iterdir() if p.name.startswith(("step=", ".tmp-", "best"))]
    else:
        assert_whole(tmp_path, tmp_path, alone)
