"""What must hold of a run's files after it has died, and of all that it left once it has reached its end."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lightning_ckmerge.artifact.load import ARTIFACT_NAME, Artifact, best_target
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.runs import find_run, list_runs
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer.storage import FILE_NAME
from lightning_ckmerge.tensorfiles.durable import file_record
from tests.crash.run import CAPACITY, checkpoint_of, read_notes

# Snapshots that are kept, one too many, a pool, all that the last checkpoint needs, and two segments in progress, as
# the buffer itself counts; and once more of that, which a process leaves that dies before it has tidied up.
MAX_SNAPSHOTS = 2 * (2 * CAPACITY + 4)
# A staged artifact, a link or a small file a death, until the next search sweeps them.
MAX_STAGED = 2
EXPECTED = {
    *("best", "buffer", "report.html", "report.md", "run.json", "run.lock", "standing.json", "study.journal"),
    "timeline.jsonl",
}


@dataclass(frozen=True)
class Left:
    """What a run that has reached its end is known by.

    Args:
        trails: Digests of the training state after each batch, a dictionary a rank.
        snapshots: Names of the buffer's files, without the run's own number.
        last: The last search: its snapshots' places and hashes, and all scores.
        best: The best artifact's value.
    """

    trails: list[dict[int, str]]
    snapshots: list[str]
    last: Any
    best: float

    @classmethod
    def by(cls, root: Path, num_ranks: int) -> Left:
        """Return what the run in ``root`` has left."""
        dirpath = find_run(root / "merges")
        path = max(_artifacts(dirpath), key=lambda p: read_manifest(p)["step"])
        best = best_target(dirpath)
        assert best is not None
        return cls(
            trails=[dict(read_notes(root / f"notes-{rank}.txt")) for rank in range(num_ranks)],
            snapshots=sorted(_without_id(p, dirpath) for p in _snapshots(dirpath)),
            last=_essence(read_manifest(path)),
            best=read_manifest(best)["verdict"]["value"],
        )


def check_death(root: Path, num_deaths: int) -> None:
    """Look at what a dead process has left, as any reader may, and as a resume will.

    Args:
        root: The run's directory.
        num_deaths: How often the run has died.

    Raises:
        AssertionError: Something is half written, missing, unreadable or grows.
        CkmergeError: An artifact or the timeline does not verify.
    """
    for dirpath in list_runs(root / "merges").values():
        for path in _artifacts(dirpath):
            Artifact.open(path)
        if os.path.lexists(dirpath / "best"):
            best = Artifact.open(dirpath / "best")
            assert best.has_weights, f"best is a record: {best.path}"
            assert best.manifest["verdict"]["status"] == "accepted"
        accepted = [r for r in read_timeline(dirpath) if r["status"] == "accepted"]
        # `best` follows the first record.
        assert len(accepted) < 2 or os.path.lexists(dirpath / "best"), "the last good artifact is gone"
        _read_study(dirpath / "study.journal")
        staged = [p.name for p in dirpath.glob(".tmp-*")]
        assert len(staged) <= MAX_STAGED * num_deaths, f"staged files pile up: {staged}"
        snapshots = [p.name for p in _snapshots(dirpath)]
        assert len(snapshots) <= MAX_SNAPSHOTS * len(_rank_dirs(dirpath)), f"snapshots pile up: {snapshots}"
    if (checkpoint := checkpoint_of(root)) is not None:
        check_checkpoint(checkpoint)


def check_checkpoint(path: Path) -> None:
    """Raise unless a checkpoint can be read, and all snapshots that it names are there, byte for byte."""
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [s for key, s in states.items() if key.startswith("CheckpointMergeCallback")]
    for rank, buffer in enumerate(state["buffers"]):
        directory = Path(state["dirpath"], "buffer")
        if len(state["buffers"]) > 1:
            directory /= f"rank={rank:05d}-of-{len(state['buffers']):05d}"
        for stored in [*(e["stored"] for e in buffer["entries"]), *([buffer["file"]] if buffer["file"] else [])]:
            found = file_record(directory / stored["name"])
            assert found == {"bytes": stored["num_bytes"], "sha256": stored["sha256"]}, stored["name"]


def check_end(root: Path, expected: Left) -> None:
    """Compare a run that has died and gone on with one that never died.

    Raises:
        AssertionError: They differ, or the run has left something behind.
    """
    for rank, trail in enumerate(expected.trails):
        notes = read_notes(root / f"notes-{rank}.txt")
        wrong = [batch for batch, found in notes if found != trail[batch]]
        assert not wrong, f"training differs on rank {rank} after batches {wrong}"
        assert dict(notes) == trail, f"batches are missing on rank {rank}: {trail.keys() - dict(notes).keys()}"
    found = Left.by(root, len(expected.trails))
    # Those of the checkpoint before the last go with the next step. There is none if the run died after its last.
    assert set(found.snapshots) >= set(expected.snapshots), f"{found.snapshots} instead of {expected.snapshots}"
    assert len(found.snapshots) <= MAX_SNAPSHOTS * len(expected.trails), f"snapshots pile up: {found.snapshots}"
    assert found.last == expected.last, "the last search differs"
    assert found.best == expected.best, "another merge is the best"
    dirpath = find_run(root / "merges")
    names = {p.name for p in dirpath.iterdir() if not ARTIFACT_NAME.fullmatch(p.name)}
    others = {p.name for p in list_runs(root / "merges").values()}
    assert names - others <= EXPECTED, f"orphans: {sorted(names - others - EXPECTED)}"
    with_weights = [p.name for p in _artifacts(dirpath) if (p / "model.safetensors").exists()]
    assert len(with_weights) <= 2, f"artifacts pile up: {with_weights}"


def _artifacts(dirpath: Path) -> list[Path]:
    return [p for p in sorted(dirpath.glob("step=*")) if ARTIFACT_NAME.fullmatch(p.name)]


def _rank_dirs(dirpath: Path) -> list[Path]:
    return sorted((dirpath / "buffer").glob("rank=*")) or [dirpath / "buffer"]


def _snapshots(dirpath: Path) -> list[Path]:
    return [p for p in (dirpath / "buffer").rglob("*") if FILE_NAME.fullmatch(p.name)]


def _without_id(path: Path, dirpath: Path) -> str:
    return str(path.relative_to(dirpath).with_name(path.name[9:]))


def _essence(manifest: dict[str, Any]) -> Any:
    scored = [*manifest["anchors"], *manifest["trials"]]
    scores = [[t["name"], t["coefficients"], t["search"]["value"]] for t in scored]
    snapshots = [[s["kind"], s["first_step"], s["last_step"], s["sha256"]] for s in manifest["snapshots"]]
    return json.loads(json.dumps([manifest["step"], snapshots, scores, manifest["verdict"]["value"]]))


def _read_study(path: Path) -> None:
    if path.exists():
        storage = JournalStorage(JournalFileBackend(str(path)))
        for name in optuna.get_all_study_names(storage):
            names = [t.user_attrs.get("name") for t in optuna.load_study(study_name=name, storage=storage).trials]
            assert len(names) <= 20, f"trials pile up: {names}"
