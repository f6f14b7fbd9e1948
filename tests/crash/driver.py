"""Kills runs at chosen points, looks at what is left, lets them go on, and compares them with one that never died."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.crash.checks import Left, check_death, check_end
from tests.crash.kill import Killer, Kind
from tests.crash.run import TIMEOUT, train

# A run takes seconds. One that takes minutes hangs.
LIMIT_S = 300.0
KINDS: tuple[Kind, ...] = ("call", "line", "call", "line", "moment")
# A run that goes on dies again, as often as not.
AGAIN = 0.4


@dataclass(frozen=True)
class Point:
    """Where a process is to die: at the n-th count of a kind, or after seconds."""

    kind: Kind
    at: float


@dataclass
class Result:
    """The outcome.

    Args:
        stages: How often a process died at each stage.
        kinds: How often by each kind of point.
        num_runs: Runs that were brought to their end.
        failures: Promises that did not hold, with the way there.
    """

    stages: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def num_deaths(self) -> int:
        """Points at which a process did die."""
        return sum(self.kinds.values())


def fork(work: Callable[[], Any], log: Path) -> int:
    """Do something in a child of this process, and return its exit code, negative for a signal.

    Raises:
        AssertionError: It hangs.
    """
    pid = start(work, log)
    return wait(pid)


def start(work: Callable[[], Any], log: Path) -> int:
    """Begin something in a child of this process."""
    if pid := os.fork():
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            work()
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
    os._exit(code)


def wait(pid: int, limit_s: float = LIMIT_S) -> int:
    """Return a child's exit code."""
    deadline = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"a process has not come to its end in {limit_s:g} s")
        time.sleep(0.002)


class Matrix:
    """Runs of one process each.

    Args:
        seed: Chooses the points.
        scratch: An empty directory.
        again: How often a run that has died and goes on dies once more.
    """

    def __init__(self, seed: int, scratch: Path, again: float = AGAIN) -> None:
        self._random = random.Random(seed)
        self._scratch = scratch
        self._again = again
        self.result = Result()
        root = self._new_root("whole")
        code = fork(partial(_train_counted, root), root / "log.txt")
        assert code == 0, (root / "log.txt").read_text()
        counted = json.loads((root / "counted-0.json").read_text())
        self._stages: dict[Kind, list[str]] = {"call": counted["call"], "line": counted["line"]}
        self.expected = Left.by(root, 1)
        check_end(root, self.expected)
        start_s = time.monotonic()
        assert self._train(self._new_root("plain"), None) == 0
        self._seconds = time.monotonic() - start_s

    @property
    def stages(self) -> set[str]:
        """All stages at which a point can be."""
        return {stage for stages in self._stages.values() for stage in stages if stage}

    def run(self, num_points: int) -> Result:
        """Kill until so many processes have died."""
        while self.result.num_deaths < num_points:
            self._run_one(self._choose_among_stages())
        return self.result

    def _run_one(self, point: Point | None) -> None:
        """Let one run die, and die again, until it reaches its end."""
        root, story = self._new_root(f"run-{self.result.num_runs}"), list[str]()
        try:
            while point is not None:
                code = self._train(root, point)
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"it did not go on: exit code {code}"
                stage = (root / "said.txt").read_text()
                story.append(f"{stage} ({point.kind} {point.at:g})")
                self.result.stages[stage] += 1
                self.result.kinds[point.kind] += 1
                check_death(root, len(story))
                point = self._choose_any() if self._random.random() < self._again else None
            else:
                assert self._train(root, None) == 0, "it did not go on"
            check_end(root, self.expected)
        except Exception as error:
            where = " -> ".join(story) or "nothing"
            log = "\n".join((root / "log.txt").read_text().splitlines()[-12:])
            self.result.failures.append(f"{root.name}, died at {where}: {type(error).__name__}: {error}\n{log}")
        else:
            shutil.rmtree(root)
        self.result.num_runs += 1

    def _choose_among_stages(self) -> Point:
        """Choose a kind, then a stage that has come least often, then one of its points: so that none is missed."""
        kind = KINDS[self.result.num_runs % len(KINDS)]
        if kind == "moment":
            return self._choose_any(kind)
        stages = self._stages[kind]
        fewest = min(self.result.stages[s] for s in set(stages))
        stage = self._random.choice(sorted(s for s in set(stages) if self.result.stages[s] == fewest))
        return Point(kind, 1 + self._random.choice([i for i, s in enumerate(stages) if s == stage]))

    def _choose_any(self, kind: Kind | None = None) -> Point:
        kind = kind or self._random.choice(KINDS)
        if kind == "moment":
            return Point(kind, self._random.uniform(0, self._seconds))
        return Point(kind, self._random.randint(1, len(self._stages[kind])))

    def _train(self, root: Path, point: Point | None) -> int:
        def work() -> None:
            if point is None:
                train(root)
                return
            killer = Killer(point.kind, point.at, root, root / "said.txt")
            train(root)
            killer.end()

        return fork(work, root / "log.txt")

    def _new_root(self, name: str) -> Path:
        root = self._scratch / name
        root.mkdir()
        return root


def _train_counted(root: Path, num_ranks: int = 1) -> None:
    """Train to the end, and write down the stages of all calls and lines."""
    rank = os.environ.get("RANK", "0")
    calls, lines = (Killer(kind, 0, root, root) for kind in ("call", "line"))
    train(root, num_ranks=num_ranks)
    lines.end()
    calls.end()
    (root / f"counted-{rank}.json").write_text(json.dumps({"call": calls.stages, "line": lines.stages}))


class RankMatrix:
    """Runs of two gloo ranks, one of which dies or stops; the other has to end, too.

    Args:
        seed: Chooses ranks and points.
        scratch: An empty directory.
    """

    NUM_RANKS = 2

    def __init__(self, seed: int, scratch: Path) -> None:
        self._random = random.Random(seed)
        self._scratch = scratch
        self.result = Result()
        self.ends: Counter[str] = Counter()
        root = self._new_root("whole")
        codes = self._run(root, partial(_train_counted, root, self.NUM_RANKS))
        assert codes == [0, 0], (root / "log.txt").read_text()
        self._stages = [json.loads((root / f"counted-{rank}.json").read_text()) for rank in range(self.NUM_RANKS)]
        self.expected = Left.by(root, self.NUM_RANKS)
        check_end(root, self.expected)

    def run(self, num_points: int, num_stops: int = 0) -> Result:
        """Let one rank die at so many points, and stop at some more."""
        for number in range(num_points + num_stops):
            self._run_one(number, stops=number >= num_points)
        return self.result

    def _run_one(self, number: int, *, stops: bool) -> None:
        root, doomed = self._new_root(f"run-{number}"), number % self.NUM_RANKS
        kind = "line" if stops else self._random.choice(("call", "line"))
        stages = self._stages[doomed][kind]
        fewest = min(self.result.stages[s] for s in set(stages))
        stage = self._random.choice(sorted(s for s in set(stages) if self.result.stages[s] == fewest))
        at = 1 + self._random.choice([i for i, s in enumerate(stages) if s == stage])
        try:
            codes = self._run(root, partial(self._die, root, kind, at, doomed, stops))
            assert codes[doomed] in (0, -signal.SIGKILL), f"rank {doomed} did not go on: exit code {codes[doomed]}"
            if codes[doomed]:
                died_at = (root / "said.txt").read_text()
                self.result.stages[died_at] += 1
                self.result.kinds["stopped" if stops else kind] += 1
                other = codes[1 - doomed]
                self.ends["was done" if other == 0 else "ended with an error"] += 1
                check_death(root, 1)
            assert self._run(root, partial(train, root, num_ranks=self.NUM_RANKS)) == [0, 0], "it did not go on"
            check_end(root, self.expected)
        except Exception as error:
            log = "\n".join((root / "log.txt").read_text().splitlines()[-30:])
            where = f"rank {doomed} at {stage} ({kind} {at}{', stopped' if stops else ''})"
            self.result.failures.append(f"{root.name}, {where}: {type(error).__name__}: {error}\n{log}")
        else:
            shutil.rmtree(root)
        self.result.num_runs += 1

    def _die(self, root: Path, kind: Kind, at: int, doomed: int, stops: bool) -> None:
        if os.environ["RANK"] != str(doomed):
            train(root, num_ranks=self.NUM_RANKS)
            return
        killer = Killer(kind, at, root, root / "said.txt", signum=signal.SIGSTOP if stops else signal.SIGKILL)
        train(root, num_ranks=self.NUM_RANKS)
        killer.end()

    def _run(self, root: Path, work: Callable[[], Any]) -> list[int]:
        """Do something on all ranks, and return their exit codes."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]

        def on(rank: int) -> None:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": self.NUM_RANKS}
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **{k: str(n) for k, n in numbers.items()})
            # Lightning does so, too, and with the strategy's timeout.
            dist.init_process_group("gloo", rank=rank, world_size=self.NUM_RANKS, timeout=TIMEOUT)
            work()

        pids = [start(partial(on, rank), root / "log.txt") for rank in range(self.NUM_RANKS)]
        return _wait_for_all(pids)

    def _new_root(self, name: str) -> Path:
        root = self._scratch / name
        root.mkdir()
        return root


def _wait_for_all(pids: Sequence[int]) -> list[int]:
    """Return exit codes. A process that has stopped is killed once the others have ended."""
    codes: dict[int, int] = {}
    stopped: set[int] = set()
    deadline = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = set(pids) - codes.keys()
        hangs = time.monotonic() > deadline
        if left and (hangs or left <= stopped):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if hangs:
                raise AssertionError(f"a rank has not come to its end in {LIMIT_S:g} s")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty directory in memory, where there is such a place: a killed process loses nothing of either."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)
