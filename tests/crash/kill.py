"""Where a process dies: at a system call on its files, at a line of code, or at a moment; by SIGKILL, from within.

Calls and lines are counted, so that a first run, which lives, tells how many there are and at which stage each of them
is. A moment falls between two lines of Python, or into a call of C that has given up the interpreter's lock.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

from lightning_ckmerge.artifact.publish import ArtifactStore

Kind = Literal["call", "line", "moment"]

# Audited by Python before they happen; writing goes on between them, and lines are there for that.
CALLS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate")
OTHER = "between"

# What a process is doing, by the innermost function of these on its stack: file -> function -> stage.
PLACES: dict[str, dict[str, str]] = {
    "lightning_ckmerge/artifact/runs.py": {
        "__init__": "claiming the directory",
        "keep_snapshots": "run.json",
        "release": "releasing the directory",
    },
    "lightning_ckmerge/buffer/rolling.py": {
        "update": "segment update",
        "_finish_segment": "capture",
        "_store": "background write",
        "_save_mean": "segment in progress to a file",
        "state_dict": "buffer's state",
        "load_state_dict": "buffer's resume",
        "snapshots": "reading snapshots",
        "close": "closing the buffer",
    },
    "lightning_ckmerge/buffer/archive.py": {
        "_pool": "pooling",
        "_delete": "deleting snapshots",
        "release": "deleting snapshots",
    },
    "lightning_ckmerge/plugin/restore/paused_run.py": {"__enter__": "pausing the run", "__exit__": "restoring the run"},
    "lightning_ckmerge/plugin/evaluate/scorer.py": {"score": "scoring", "load": "loading the winner"},
    "lightning_ckmerge/search/study.py": {"__init__": "opening the study", "tell": "study append", "_ask": "study ask"},
    "lightning_ckmerge/search/engine.py": {
        "confirm": "confirmation",
        "run": "search",
    },
    "lightning_ckmerge/pipeline.py": {"_outcome": "verdict"},
    "lightning_ckmerge/artifact/weights.py": {"write_weights": "staging weights"},
    "lightning_ckmerge/artifact/manifest.py": {"write_manifest": "manifest write"},
    "lightning_ckmerge/artifact/publish.py": {
        "_sweep": "sweeping",
        "_open_staging": "staging",
        "_stage": "staging",
        "_move_best": "best",
        "_retain": "eviction",
        "compare": "standing",
    },
    "lightning_ckmerge/artifact/timeline.py": {"append_timeline": "timeline append"},
    "lightning_ckmerge/artifact/standing.py": {"write_standing": "standing"},
    "lightning_ckmerge/plugin/publish/publisher.py": {
        "_check": "reading the artifact back",
        "_write_report": "report",
        "show_run": "run's report",
        "sum_up": "summary",
    },
    "lightning_ckmerge/plugin/run.py": {"_look_back": "comparing best and final weights"},
    "lightning/fabric/utilities/cloud_io.py": {"_atomic_save": "Lightning's checkpoint"},
    "lightning/pytorch/callbacks/model_checkpoint.py": {
        "_save_topk_checkpoint": "Lightning's checkpoint",
        "_save_last_checkpoint": "Lightning's checkpoint",
        "_remove_checkpoint": "Lightning's checkpoint removed",
    },
}
# Files whose lines are counted: those above, and those that write for them.
TRACED = (
    *PLACES,
    "lightning_ckmerge/buffer/segment_mean.py",
    "lightning_ckmerge/buffer/state.py",
    "lightning_ckmerge/buffer/storage.py",
    "lightning_ckmerge/buffer/writer.py",
    "lightning_ckmerge/plugin/rank/buffer.py",
    "lightning_ckmerge/plugin/rank/resume.py",
    "lightning_ckmerge/tensorfiles/durable.py",
    "lightning_ckmerge/tensorfiles/writer.py",
    "optuna/storages/journal/_file.py",
)


def stage_of(frame: FrameType | None) -> str:
    """Return what a stack is doing."""
    while frame is not None:
        code = frame.f_code
        if code is ArtifactStore._move.__code__:
            return "before the rename" if frame.f_lineno <= RENAME_LINE else "after the rename"
        if (places := _places(code)) and (stage := places.get(code.co_name)):
            return stage
        frame = frame.f_back
    return OTHER


def _places(code: CodeType) -> dict[str, str] | None:
    parts = code.co_filename.split(os.sep)
    for file, places in PLACES.items():
        names = file.split("/")
        if parts[-len(names) :] == names:
            return places
    return None


def _rename_line() -> int:
    lines, first = inspect.getsourcelines(ArtifactStore._move)
    (line,) = [i for i, text in enumerate(lines) if "os.rename(staging" in text]
    return first + line


RENAME_LINE = _rename_line()
STAGES = {stage for places in PLACES.values() for stage in places.values()} | {"before the rename", "after the rename"}


class Killer:
    """Counts, and ends the process at one count, having said where.

    Args:
        kind: What is counted.
        at: The count at which the process dies, from 1; seconds, for a moment; 0: never.
        root: Calls below it alone count.
        said: A file for the stage at which the process dies.
        signum: Ends it, or stops it.
    """

    def __init__(self, kind: Kind, at: float, root: Path, said: Path, signum: signal.Signals = signal.SIGKILL) -> None:
        self._signum = signum
        self.stages: list[str] = []
        self._count = 0
        self._at = at
        self._root = str(root)
        self._said = said
        self._is_armed = True
        self._owner = os.getpid()
        start: dict[Kind, Callable[[], None]] = {
            "call": self._count_calls,
            "line": self._count_lines,
            "moment": self._wait,
        }
        start[kind]()

    def end(self) -> None:
        """Count no more."""
        self._is_armed = False
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _happens(self, frame: FrameType | None) -> None:
        if not self._is_armed or os.getpid() != self._owner:
            return
        self._count += 1
        if not self._at:
            self.stages.append(stage_of(frame))
        elif self._count == self._at:
            self._die(stage_of(frame))

    def _die(self, stage: str) -> None:
        self._is_armed = False
        descriptor = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, stage.encode())
        os.kill(os.getpid(), self._signum)
        time.sleep(600)  # the signal is on its way

    def _count_calls(self) -> None:
        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event in CALLS and self._is_armed and self._is_ours(args):
                self._happens(sys._getframe(1))

        fsync = os.fsync

        def counted(descriptor: Any) -> None:
            self._happens(sys._getframe(1))
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(audit)

    def _is_ours(self, args: tuple[Any, ...]) -> bool:
        path = args[0]
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._root)

    def _count_lines(self) -> None:
        traced: dict[CodeType, bool] = {}

        def local(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                self._happens(frame)
            return local

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            code = frame.f_code
            if code not in traced:
                traced[code] = code.co_filename.replace(os.sep, "/").endswith(TRACED)
            return local if traced[code] else None

        threading.settrace(trace)
        sys.settrace(trace)

    def _wait(self) -> None:
        if self._at:
            main = threading.main_thread().ident
            threading.Thread(target=self._die_later, args=(self._at, main), daemon=True).start()

    def _die_later(self, seconds: float, main: int | None) -> None:
        time.sleep(seconds)
        if self._is_armed:
            frames = sys._current_frames()
            writers = [t.ident for t in threading.enumerate() if t.name == "ckmerge-writer"]
            stages = [stage_of(frames.get(i or 0)) for i in (*writers, main)]
            self._die(next((s for s in stages if s != OTHER), OTHER))
