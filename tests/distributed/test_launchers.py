"""Lightning's own launchers: nothing is taken from attributes of a process that did not train."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ckmerge.plugin.dirpath import SpawnedDirpath

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork", "ddp_find_unused_parameters_true"])
def test_the_launching_process_finds_the_best_artifact(tmp_path: Path, strategy: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.launch", strategy, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("steps", "best")))
    # A spawned or forked run leaves no step count behind, but its artifacts.
    assert lines["steps"] == ("0" if strategy in ("ddp_spawn", "ddp_fork") else "48")
    best = Path(lines["best"])
    assert best.parent == (tmp_path / "logs" / "version_0" / "merges").resolve()
    assert (best / "manifest.json").is_file()
    assert list(tmp_path.glob("ckmerge-*")) == []


def leave(whereabouts: SpawnedDirpath, path: Path) -> None:
    whereabouts.leave(path)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_path_comes_back(tmp_path: Path, method: str) -> None:
    whereabouts = SpawnedDirpath()
    assert whereabouts.find() is None
    process = multiprocessing.get_context(method).Process(target=leave, args=(whereabouts, tmp_path))
    process.start()
    process.join()
    assert whereabouts.find() == tmp_path
    whereabouts.leave(tmp_path / "own")  # a later run, in this process, knows better
    assert whereabouts.find() is None


def test_nothing_stays_behind(tmp_path: Path) -> None:
    whereabouts = SpawnedDirpath()
    note = copy.deepcopy(whereabouts._note)
    note.write_text("x")
    pickle.loads(pickle.dumps(whereabouts))
    gc.collect()
    assert note.exists()
    del whereabouts
    gc.collect()
    assert not note.exists()
