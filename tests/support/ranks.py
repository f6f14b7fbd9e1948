"""Gloo ranks for tests: started once, used by many tests, and never waited for without end."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 600
# What the others may take to fail in their turn.
GRACE_S = 120


def forkserver() -> Any:
    """Return a context whose processes are forked from one that has imported all this and done nothing with it."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning_ckmerge.plugin.callback", "torch.distributed.fsdp", "optuna"])
    return context


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


class RankPool:
    """Processes that form one gloo group and call what they are given."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call ``function(*args)`` on every rank at once, and return the results by rank.

        The function must be importable: a top-level one of a test module.
        """
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args, timeout_s))
        answers = self._collect(timeout_s)
        failures = [f"rank {rank}:\n{answer[1]}" for rank, answer in answers.items() if not answer[0]]
        silent = sorted(set(range(self.world_size)) - answers.keys())
        failures += [f"rank {rank} hung or died; its stacks are on stderr" for rank in silent]
        if failures:
            self.stop()  # a collective may be half done
            raise RankError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _collect(self, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """Return the ranks' answers; once one has failed, the others may never answer."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s + 20
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank, outbox in enumerate(self._outboxes):
                if rank not in answers:
                    with contextlib.suppress(Empty):
                        answers[rank] = outbox.get(timeout=0.02)
                        if not answers[rank][0]:
                            deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def stop(self) -> None:
        """End the processes; the next ``run`` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        context = forkserver()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self._inboxes = [context.Queue() for _ in range(self.world_size)]
        self._outboxes = [context.Queue() for _ in range(self.world_size)]
        for rank in range(self.world_size):
            args = (rank, self.world_size, port, self._inboxes[rank], self._outboxes[rank])
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._processes.append(process)


def _serve(rank: int, world_size: int, port: int, inbox: Any, outbox: Any) -> None:
    # Lightning takes these for processes that a launcher has started.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    while True:
        function, args, timeout_s = inbox.get()
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        try:
            outbox.put((True, function(*args)))
        except BaseException:
            outbox.put((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
