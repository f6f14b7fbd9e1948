"""Due searches, as a run leaves them on the disk for followers: what belongs together, and what came of it.

::

    <dirpath>/follow/
      run.json                              the run's sign of life, and its end
      due/step=000000300-5e1f0a2b/          a due search; the digits name the session of training
        rank=00000-of-00002/
          index.json                        what this rank has left; written last, by one rename
          *-latest.safetensors              its part of the latest weights
          *-open.safetensors                its part of the mean of the segment in progress
        lease-000.json                      the follower that works on it
      results/step=000000300-5e1f0a2b.json  what came of it

A due search is whole once each rank's index is there. No rank waits for another, nor for a follower.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_ckmerge.buffer.state import Entry
from lightning_ckmerge.buffer.storage import Stored
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import SnapshotError
from lightning_ckmerge.tensorfiles.durable import replace_json
from lightning_ckmerge.tensorfiles.untrusted import read_json

FOLLOW_NAME = "follow"
INDEX_NAME = "index.json"
RUN_SIGN_NAME = "run.json"
DUE_NAME = re.compile(r"step=(\d{9,})-([0-9a-f]{8})")
PART_NAME = re.compile(r"rank=(\d{5,})-of-(\d{5,})")
SCHEMA_VERSION = 1

Trigger = Literal["scheduled", "asked", "end"]
ResultStatus = Literal["published", "skipped", "evicted"]
RunState = Literal["training", "ended", "stopped"]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts about a run at a due moment that its snapshots do not tell; rank 0's count.

    Args:
        trigger: Why the search is due.
        monitors: The names of the monitored metrics.
        epoch: The epoch, counted from 0.
        training_s: Seconds of training so far.
        since: The step at which the buffer last started again; searches before it were of another model.
        rates: The state of the learning rates.
        validated: Step and value of the run's own validations so far.
    """

    trigger: Trigger
    monitors: list[str]
    epoch: int
    training_s: float
    since: int
    rates: dict[str, Any]
    validated: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class DuePart:
    """One rank's part of a due search.

    Args:
        run_id: The run's.
        step: Optimizer steps taken.
        rank: Of how many ``world_size`` says.
        buffer: Where this rank's snapshots lie, relative to the run's directory.
        snapshots: The kept ones, oldest first.
        open: The mean of the segment in progress, where it has begun; its file lies beside the index.
        latest: The file of the latest weights, beside the index.
        info: The facts about the run.
    """

    run_id: str
    step: int
    rank: int
    world_size: int
    buffer: str
    snapshots: tuple[Entry, ...]
    open: Entry | None
    latest: Stored
    info: RunInfo

    @property
    def names(self) -> frozenset[str]:
        """The snapshots' files that it needs."""
        return frozenset(e.stored.name for e in self.snapshots)

    def write(self, directory: Path) -> None:
        """Write the index by one rename."""
        replace_json(directory / INDEX_NAME, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> DuePart:
        """Return a part whose index is there.

        Raises:
            FileNotFoundError: It is not.
            SnapshotError: It is damaged.
        """
        path = directory / INDEX_NAME
        try:
            found = read_json(path, allow_nan=True)
            if found.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError("schema_version")
            info = found.pop("info")
            info = RunInfo(**{**info, "validated": [(int(s), float(v)) for s, v in info["validated"]]})
            snapshots = tuple(_entry(e) for e in found.pop("snapshots"))
            opened = found.pop("open")
            part = cls(
                **{**found, "latest": Stored(**found["latest"])},
                snapshots=snapshots,
                open=_entry(opened) if opened else None,
                info=info,
            )
            _check(part, directory)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise SnapshotError(
                f"the index of a due search must be one that this version of the package wrote, got "
                f"{type(error).__name__}: {error} in {path}. Run the follower with the run's own version."
            ) from error
        return part


@dataclass(frozen=True, kw_only=True)
class DueSearch:
    """A search that a run has left for followers, whole.

    Args:
        path: Its directory.
        parts: Of all ranks, by rank.
    """

    path: Path
    parts: tuple[DuePart, ...]

    @property
    def name(self) -> str:
        """The name of its directory, and of its result."""
        return self.path.name

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.parts[0].step

    @property
    def run_id(self) -> str:
        """The run's."""
        return self.parts[0].run_id

    @property
    def info(self) -> RunInfo:
        """The facts about the run."""
        return self.parts[0].info

    @property
    def part_dirpaths(self) -> list[Path]:
        """Where the ranks' parts lie, by rank."""
        return [part_dirpath(self.path, p.rank, p.world_size) for p in self.parts]

    @property
    def buffer_dirpaths(self) -> list[Path]:
        """Where the ranks' snapshots lie, by rank."""
        return [self.path.parents[2] / p.buffer for p in self.parts]

    def is_whole(self) -> bool:
        """Whether all indices are still there: a run that takes a due search away takes them first."""
        return all((path / INDEX_NAME).is_file() for path in self.part_dirpaths)


@dataclass(frozen=True, kw_only=True)
class DueResult:
    """The end of a due search.

    Args:
        due: Its name.
        run_id: The run's.
        step: Its step.
        status: ``published``; ``skipped``: a follower gave it up; ``evicted``: none came in time.
        reason: Why it was not published.
        artifact: Name of the artifact.
        coordinates: Of the best candidate, where the next search starts.
        latest: The latest weights' value on the confirmation half.
        num_validated: Of the run's own validations, those that the timeline has by then.
        seconds: The time that it took.
    """

    due: str
    run_id: str
    step: int
    status: ResultStatus
    reason: str | None = None
    artifact: str | None = None
    coordinates: dict[str, float] | None = None
    latest: float | None = None
    num_validated: int = 0
    seconds: float = 0.0

    def write(self, dirpath: Path) -> None:
        """Write it by one rename into a run's directory."""
        path = _results(dirpath) / f"{self.due}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(path, asdict(self))


@dataclass(frozen=True, kw_only=True)
class RunSign:
    """A run's sign of life.

    Args:
        run_id: The run's.
        session: Eight hexadecimal digits; another after each restart.
        state: ``training``, or how it ended.
        beat: Counts on while the run lives.
        step: Optimizer steps so far.
        left: Due searches that this session has left so far.
        names: Names of snapshots' files that nobody needs once all followers are done, by the rank's directory.
    """

    run_id: str
    session: str
    state: RunState
    beat: int
    step: int
    left: int
    names: dict[str, list[str]] = field(default_factory=dict)

    def write(self, dirpath: Path) -> None:
        """Write it by one rename into the run's directory."""
        (dirpath / FOLLOW_NAME).mkdir(parents=True, exist_ok=True)
        replace_json(dirpath / FOLLOW_NAME / RUN_SIGN_NAME, asdict(self))

    @classmethod
    def read(cls, dirpath: Path) -> RunSign | None:
        """Return a run's sign of life; ``None`` where there is none yet."""
        try:
            return cls(**read_json(dirpath / FOLLOW_NAME / RUN_SIGN_NAME))
        except (OSError, ValueError, TypeError):
            return None


def due_path(dirpath: Path, step: int, session: str) -> Path:
    """Return where a due search lies in a run's directory."""
    return dirpath / FOLLOW_NAME / "due" / f"step={step:09d}-{session}"


def part_dirpath(due: Path, rank: int, world_size: int) -> Path:
    """Return where a rank leaves its part of a due search."""
    return due / f"rank={rank:05d}-of-{world_size:05d}"


def list_due(dirpath: Path) -> list[Path]:
    """Return the directories of a run's due searches, whole or not, by step."""
    root = dirpath / FOLLOW_NAME / "due"
    try:
        found = [p for p in root.iterdir() if DUE_NAME.fullmatch(p.name)]
    except OSError:
        return []
    return sorted(found, key=lambda p: (due_step(p), p.name))


def due_step(due: Path) -> int:
    """Return the step of a due search, by the name of its directory."""
    match = DUE_NAME.fullmatch(due.name)
    assert match is not None
    return int(match[1])


def read_due(due: Path) -> DueSearch | None:
    """Return a due search; ``None`` unless it is whole.

    Raises:
        SnapshotError: An index is damaged.
    """
    try:
        present = [(path, match) for path in due.iterdir() if (match := PART_NAME.fullmatch(path.name))]
        parts = [DuePart.read(path) for path, _ in present if (path / INDEX_NAME).is_file()]
    except OSError:  # it is being taken away
        return None
    parts.sort(key=lambda p: p.rank)
    is_whole = bool(parts) and [p.rank for p in parts] == list(range(parts[0].world_size))
    return DueSearch(path=due, parts=tuple(parts)) if is_whole else None


def remove_part(directory: Path) -> None:
    """Take a rank's part away, its index first."""
    (directory / INDEX_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def remove_due(due: Path) -> None:
    """Take a due search away whose parts are gone."""
    if not any(PART_NAME.fullmatch(p.name) for p in due.glob("rank=*")):
        shutil.rmtree(due, ignore_errors=True)


def read_results(dirpath: Path) -> dict[str, DueResult]:
    """Return the results of a run's due searches, by name, in the order of their steps."""
    found = ((name, read_result(dirpath, name)) for name in sorted(result_names(dirpath)))
    return {name: result for name, result in found if result is not None}


def read_result(dirpath: Path, due: str) -> DueResult | None:
    """Return the result of a due search; ``None`` unless there is one that can be read."""
    try:
        return DueResult(**read_json(_results(dirpath) / f"{due}.json", allow_nan=True))
    except (OSError, ValueError, TypeError):
        return None


def result_names(dirpath: Path) -> set[str]:
    """Return the names of the due searches that have come to their end, by a single look at a directory."""
    try:
        names = os.listdir(_results(dirpath))
    except OSError:
        return set()
    return {due for name in names if DUE_NAME.fullmatch(due := name.removesuffix(".json"))}


def has_result(dirpath: Path, due: str) -> bool:
    """Whether a due search has come to its end."""
    return (_results(dirpath) / f"{due}.json").is_file()


def earlier(results: Mapping[str, DueResult], due: DueSearch) -> Iterator[DueResult]:
    """Yield the published searches of the same run, and of the same model, before a due one, by step."""
    own = (r for r in results.values() if r.status == "published" and r.run_id == due.run_id)
    yield from (r for r in own if due.info.since <= r.step < due.step)


def _results(dirpath: Path) -> Path:
    return dirpath / FOLLOW_NAME / "results"


def _entry(found: Mapping[str, Any]) -> Entry:
    return Entry(segment=Segment(**found["segment"]), stored=Stored(**found["stored"]))


def _check(part: DuePart, directory: Path) -> None:
    """Names come from a file: one that leaves its directory must not be opened."""
    match = PART_NAME.fullmatch(directory.name)
    if match is None or (int(match[1]), int(match[2])) != (part.rank, part.world_size):
        raise ValueError(f"rank {part.rank} of {part.world_size}")
    if part.step != due_step(directory.parent) or not re.fullmatch("[0-9a-f]{8}", part.run_id):
        raise ValueError(f"step {part.step} of run {part.run_id!r}")
    if not re.fullmatch(r"buffer(/rank=\d{5,}-of-\d{5,})?", part.buffer):
        raise ValueError(f"buffer {part.buffer!r}")
