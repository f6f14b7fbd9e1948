"""A directory is one run's, over restarts, and a living run's is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ckmerge.artifact.history import history_of, read_history
from lightning_ckmerge.artifact.load import Artifact, best_target
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.runs import Claim, find_run, is_alive, keep_snapshots, likely
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.outcomes import LocalWeights, TiedModel, make_outcome, tensors_of


def publish(claim: Claim, *, step: int, value: float) -> Artifact:
    store = ArtifactStore(claim.place.dirpath, mode="min", save_top_k=1, max_shard_size=1 << 30)
    manifest = {**build_manifest(make_outcome(step=step, value=value)), "run_id": claim.place.run_id}
    return store.publish(manifest, LocalWeights(tensors_of(TiedModel())))


def snapshot(claim: Claim) -> Path:
    path = claim.place.dirpath / "buffer" / f"{claim.place.run_id}-000000001-000000004-mean.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def test_a_later_run_has_a_directory_of_its_own_and_the_names_of_the_directory_are_its(tmp_path: Path) -> None:
    base = tmp_path / "merges"
    first = Claim(base)
    old = publish(first, step=8, value=0.5)
    first.release()
    second = Claim(base)
    assert (first.place.dirpath, second.place.dirpath) == (base, base / "run=2")
    assert find_run(base) == base / "run=2"
    assert best_target(base) == old.path  # until the later run has one
    new = publish(second, step=4, value=0.9)
    assert Artifact.open(base).path == Artifact.open(base / "best").path == (base / "best").resolve() == new.path
    assert best_target(base) == old.path
    assert [len(read_timeline(p)) for p in (base, base / "run=2")] == [1, 1]
    # People who name the directory look at the later run; the earlier one, if it lives, writes its own page.
    assert (read_history(base).dirpath, history_of(base).dirpath) == (base / "run=2", base)
    assert [r["artifact"] for r in history_of(base).timeline] == [old.path.name]
    second.release()
    resumed = Claim(base, first.place.run_id)
    assert (resumed.place.dirpath, resumed.place.source) == (base, base)
    ArtifactStore(base, mode="min", save_top_k=1, max_shard_size=1).show_best(first.place.run_id, "val_loss")
    assert Artifact.open(base).path == Artifact.open(base / "best").path == (base / "best").resolve() == old.path
    resumed.release()


def test_two_runs_that_share_a_directory_are_ranked_apart(tmp_path: Path) -> None:
    """A search from disk does not ask whose directory it is."""
    claim = Claim(tmp_path / "merges")
    old = publish(claim, step=8, value=0.5)
    store = ArtifactStore(tmp_path / "merges", mode="min", save_top_k=1, max_shard_size=1 << 30)
    manifest = {**build_manifest(make_outcome(step=9, value=0.9)), "run_id": "another"}
    new = store.publish(manifest, LocalWeights(tensors_of(TiedModel())))
    assert best_target(tmp_path / "merges") == new.path
    assert old.path.is_dir()
    claim.release()


def test_restarts_that_left_nothing_go_on_in_the_directory_and_sweep_it(tmp_path: Path) -> None:
    for _ in range(3):
        claim = Claim(tmp_path)
        assert claim.place.dirpath == tmp_path
        snapshot(claim)
        claim.release()
    assert len(list((tmp_path / "buffer").iterdir())) == 1


def test_snapshots_that_a_checkpoint_names_are_kept_and_told(tmp_path: Path) -> None:
    first = Claim(tmp_path)
    kept = snapshot(first)
    keep_snapshots(tmp_path)
    first.release()
    second = Claim(tmp_path)
    assert second.place.dirpath == tmp_path / "run=2"
    assert any("1 snapshots of other runs" in note for note in second.place.notes)
    assert kept.is_file()
    second.release()


@pytest.mark.parametrize("moves", [True, False], ids=["dirpath", "default"])
def test_a_run_goes_on_where_it_has_been_unless_it_is_sent_elsewhere(tmp_path: Path, moves: bool) -> None:
    first = Claim(tmp_path / "old")
    keep_snapshots(tmp_path / "old")
    first.release()
    resumed = Claim(tmp_path / "new", first.place.run_id, [tmp_path / "old"], moves=moves)
    assert resumed.place.run_id == first.place.run_id
    assert resumed.place.dirpath == tmp_path / ("new" if moves else "old")
    assert resumed.place.source == tmp_path / "old"
    assert (tmp_path / "new").exists() is moves
    resumed.release()


def test_a_copied_project_is_found_before_the_original(tmp_path: Path) -> None:
    old = tmp_path / "a" / "logs" / "merges"
    first = Claim(old)
    first.release()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "logs").rename(tmp_path / "b" / "logs")
    resumed = Claim(tmp_path / "new", first.place.run_id, likely(old, [tmp_path / "b"]), moves=False)
    assert resumed.place.dirpath == tmp_path / "b" / "logs" / "merges"
    resumed.release()


@pytest.fixture
def living(tmp_path: Path) -> Iterator[tuple[Path, str, subprocess.Popen[str]]]:
    """A run in another process, which ends when its input does."""
    code = (
        "import sys; from pathlib import Path; from lightning_ckmerge.artifact.runs import Claim; "
        "print(Claim(Path(sys.argv[1])).place.run_id, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "merges")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield tmp_path / "merges", process.stdout.readline().strip(), process
    process.communicate("", timeout=600)


def test_a_living_run_is_left_alone_and_a_dead_one_is_known(
    living: tuple[Path, str, subprocess.Popen[str]],
) -> None:
    base, run_id, process = living
    fresh, branch = Claim(base), Claim(base, run_id)
    assert [c.place.dirpath for c in (fresh, branch)] == [base / "run=2", base / "run=3"]
    assert branch.place.run_id != run_id
    assert branch.place.source == base
    assert "is still running" in branch.place.notes[0]
    process.kill()
    process.wait()
    assert not is_alive(base)
    resumed = Claim(base, run_id)
    assert (resumed.place.dirpath, resumed.place.run_id) == (base, run_id)
    again = Claim(base, run_id)  # in this very process
    assert again.place.run_id != run_id
    for claim in (fresh, branch, resumed, again):
        claim.release()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"run_id": 1}', "\xff"])
def test_a_damaged_record_is_that_of_a_run_nobody_knows(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    claim = Claim(tmp_path)
    assert claim.place.dirpath == tmp_path / "run=2"
    claim.release()
