"""What fails around training: disks, files, memory. Training goes on; what is lost is said, and never merged."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Stored
from lightning_ckmerge.errors import CkmergeError
from tests.support.rolling import Run, files, spans

ROOT = Path(__file__).parents[2]


def test_a_directory_that_cannot_be_written_loses_its_snapshots_only(tmp_path: Path) -> None:
    run = Run()
    place = tmp_path / "buffer"
    buffer = run.buffer(DiskStorage(place))
    place.write_text("a file is in the way")
    run.train(buffer, range(1, 11))
    assert spans(buffer.snapshots()) == []
    warnings = buffer.take_warnings()
    assert ["steps 1 to 5" in warnings[0], "steps 6 to 10" in warnings[1]] == [True, True]
    place.unlink()
    run.train(buffer, range(11, 18))
    assert spans(buffer.snapshots()) == [(11, 15), (16, 17)]
    assert buffer.take_warnings() == []
    buffer.close()


def test_a_state_taken_on_a_full_disk_says_that_the_segment_starts_again(tmp_path: Path) -> None:
    run = Run()
    place = tmp_path / "buffer"
    buffer = run.buffer(DiskStorage(place))
    place.write_text("a file is in the way")
    run.train(buffer, range(1, 4))
    state = buffer.state_dict()
    assert not state["saved"]
    assert len(buffer.take_warnings()) == 1
    place.unlink()
    after = run.buffer(DiskStorage(place))
    after.load_state_dict(state)
    assert "starts again after step 3" in after.take_warnings()[0]
    run.train(after, range(4, 10))
    assert spans(after.snapshots()) == [(4, 8), (9, 9)]
    after.close()


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from lightning_ckmerge.buffer.storage import DiskStorage
    from tests.support.rolling import Run, files, spans

    run, place = Run(), Path(sys.argv[1])
    buffer = run.buffer(DiskStorage(place), capacity=3, layout=sys.argv[2])
    run.train(buffer, range(1, 16))
    buffer.snapshots()
    kept = files(place)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    run.train(buffer, range(16, 21))
    assert spans(buffer.snapshots()) == [(1, 5), (6, 10), (11, 15)], spans(buffer.snapshots())
    assert files(place) == kept
    (warning,) = buffer.take_warnings()
    assert "File too large" in warning and "steps 16 to 20" in warning and "Free some space" in warning, warning
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run.train(buffer, range(21, 26))
    assert spans(buffer.snapshots())[-1] == (21, 25)
    assert buffer.take_warnings() == []
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("layout", ["uniform", "geometric"])
def test_a_full_disk_loses_one_snapshot(tmp_path: Path, layout: str) -> None:
    code = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path), layout]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


class NoSpaceForPools(DiskStorage):
    """A disk on which a snapshot fits while the pool of two does not (another process may be faster)."""

    def write(self, name: str, *args: Any) -> Stored:
        if name.endswith("000000006-000000015-mean.safetensors"):
            raise OSError(28, "No space left on device")
        return super().write(name, *args)


def test_no_space_for_a_pool_costs_its_older_half(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(NoSpaceForPools(tmp_path), capacity=2)
    run.train(buffer, range(1, 21))
    assert spans(buffer.snapshots()) == [(11, 15), (16, 20)]
    (warning,) = buffer.take_warnings()
    assert "steps from 11 on are kept" in warning
    assert len(files(tmp_path)) == 2
    buffer.close()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_snapshot_damaged_between_runs_is_dropped_with_a_warning(tmp_path: Path) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path))
    run.train(before, range(1, 19))
    state = before.state_dict()
    damage(tmp_path / state["entries"][1]["stored"]["name"])
    damage(tmp_path / state["file"]["name"])
    (tmp_path / state["entries"][2]["stored"]["name"]).unlink()
    after = run.buffer(DiskStorage(tmp_path))
    after.load_state_dict(state)
    assert spans(after.snapshots()) == [(1, 5)]
    missing, in_progress, damaged = after.take_warnings()
    assert "missing or incomplete" in missing
    assert "steps 11 to 15" in missing
    assert "SHA-256" in in_progress
    assert "starts again after step 18" in in_progress
    assert "SHA-256" in damaged
    assert "steps 6 to 10" in damaged
    run.train(after, range(19, 30))
    assert spans(after.snapshots()) == [(1, 5), (19, 23), (24, 28), (29, 29)]
    assert after.take_warnings() == []
    after.close()


@pytest.mark.parametrize(("damaged", "left"), [(0, (11, 15)), (1, (6, 10))])
def test_a_damaged_snapshot_is_never_pooled(tmp_path: Path, damaged: int, left: tuple[int, int]) -> None:
    run = Run()
    before = run.buffer(DiskStorage(tmp_path), capacity=2)
    run.train(before, range(1, 16))
    state = before.state_dict()
    damage(tmp_path / state["entries"][damaged]["stored"]["name"])
    after = run.buffer(DiskStorage(tmp_path), capacity=2)
    after.load_state_dict(state)
    run.train(after, range(16, 21))
    assert spans(after.snapshots()) == [left, (16, 20)]
    (warning,) = after.take_warnings()
    assert "SHA-256" in warning
    after.close()


def test_no_memory_for_a_snapshot_loses_it_only() -> None:
    """An accelerator that is full raises RuntimeError; no snapshot is worth the run."""

    class Full(MemoryStorage):
        def write(self, name: str, *args: Any) -> Stored:
            if name.startswith("0123abcd-000000006"):
                raise RuntimeError("out of memory")
            return super().write(name, *args)

    run = Run()
    buffer = run.buffer(Full())
    run.train(buffer, range(1, 16))
    assert spans(buffer.snapshots()) == [(1, 5), (11, 15)]
    (warning,) = buffer.take_warnings()
    assert "must fit its storage, got RuntimeError: out of memory" in warning
    assert "steps 6 to 10" in warning
    buffer.close()


def test_a_file_that_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    run = Run()
    buffer = run.buffer(DiskStorage(tmp_path), capacity=2, layout="uniform")
    run.train(buffer, range(1, 11))
    oldest = tmp_path / "0123abcd-000000001-000000005-mean.safetensors"
    buffer.snapshots()
    oldest.unlink()
    oldest.mkdir()
    run.train(buffer, range(11, 16))
    buffer.close()
    (warning,) = buffer.take_warnings()
    assert oldest.name in warning


def test_what_the_buffer_raises_is_the_packages_own(tmp_path: Path) -> None:
    with pytest.raises(CkmergeError):
        Run().buffer(DiskStorage(tmp_path)).load_state_dict({})
