"""Gloo ranks for tests: started once, used by many tests, and never waited for without end."""

from __future__ import annotations

import faulthandler
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240


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
        answers = []
        for rank, outbox in enumerate(self._outboxes):
            try:
                answers.append(outbox.get(timeout=timeout_s + 20))
            except Empty:
                self.stop()
                raise RankError(f"rank {rank} hung or died; its stacks are on stderr") from None
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.stop()  # a collective may be half done
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

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
