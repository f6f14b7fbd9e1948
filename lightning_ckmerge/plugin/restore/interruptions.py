"""What comes from outside in the middle of a search and has to wait until the run's own weights are back.

- **Signals** with a Python handler, such as SLURM's SIGUSR1, whose handler saves a checkpoint at once. The search ends
  at the next batch, on all ranks, and the handlers are called after it. Ctrl-C needs no deferral: ``KeyboardInterrupt``
  restores everything on its way. Signals that tell of child processes, of the terminal or of a profiler pass. Those
  that come again and again, such as a heartbeat's SIGALRM, wait until the search has ended by itself, and are
  delivered once.
- **Checkpoints** saved by another thread: it waits, and the search ends at the next batch. Those that the module's own
  validation hooks would save are left out: without a search there would be none.
- ``trainer.should_stop`` set by another thread: it stays set, while what validation hooks set is put back.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.errors import SearchError, SkipError
from lightning_ckmerge.plugin.progress import say

T = TypeVar("T")
Handler = Callable[[int, Any], Any]

PASSING = {getattr(signal, name) for name in ("SIGCHLD", "SIGWINCH", "SIGPROF", "SIGVTALRM") if hasattr(signal, name)}
# These may come again and again, as a heartbeat does: they wait, and end nothing.
RECURRING = {getattr(signal, name) for name in ("SIGALRM", "SIGIO", "SIGCONT", "SIGURG") if hasattr(signal, name)}
# A scheduler signals all ranks, but not at one instant. Handlers that save a checkpoint need all ranks at once.
GRACE_S = 2.0
POLL_S = 0.01
# A thread that the search itself waits for would otherwise wait for ever.
MAX_WAIT_S = 300.0


class Interruptions:
    """Defers what comes from outside while a search of one ``fit`` is under way.

    Args:
        trainer: The Trainer.
        comm: The ranks.
    """

    def __init__(self, trainer: Trainer, comm: Comm) -> None:
        self._trainer: Any = trainer
        self._comm = comm
        self._received: deque[tuple[int, Handler]] = deque()
        self._is_deferring = False
        self._may_end_search = False
        self._own_weights = threading.Lock()  # who holds it may count on the run's own weights, or on a candidate's
        self._waiting: set[int] = set()  # threads
        self._thread = 0
        self._threads: set[int | None] = set()
        self._stops: list[bool] = []
        self._has_warned = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer what comes within; afterwards it takes its course, also where the search failed."""
        self._stops, self._may_end_search = [], True
        self._thread = threading.get_ident()
        self._threads = {thread.ident for thread in threading.enumerate()}
        self._own_weights.acquire()  # a thread that waited for an earlier search may still be saving
        had_sigterm, is_everywhere = self._trainer.received_sigterm, False
        try:
            with self._watched_trainer(), self._deferred_signals():
                yield
                is_everywhere = self._await_others()
        finally:
            self._own_weights.release()
            self._deliver()
        if is_everywhere and self._trainer.received_sigterm and not had_sigterm:
            # As Lightning's own evaluation loop does at its next batch.
            package = lightning_package(self._trainer)
            raise importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException

    def reason(self) -> str | None:
        """Why the search must end now; ``None`` if it may go on."""
        if not self._may_end_search:
            return None
        if ending := [signum for signum, _ in self._received if signum not in RECURRING]:
            name = signal.Signals(ending[0]).name
            return f"{name} arrived; its handler runs once the run's weights are restored"
        return "another thread is saving a checkpoint and waits for the run's weights" if self._waiting else None

    def let_finish(self) -> None:
        """Defer on, but no longer end the search: it has reached its verdict."""
        self._may_end_search = False

    @contextlib.contextmanager
    def _deferred_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python's handlers run in the main thread alone
            yield
            return
        found = {s: signal.getsignal(s) for s in signal.valid_signals() - PASSING}
        handlers = {s: h for s, h in found.items() if callable(h) and h is not signal.default_int_handler}
        deferring = {s: partial(self._take, h) for s, h in handlers.items()}
        self._is_deferring = True
        try:
            for signum, take in deferring.items():
                signal.signal(signum, take)
            yield
        finally:
            self._is_deferring = False
            for signum, take in deferring.items():
                if signal.getsignal(signum) is take:  # else somebody has set another one, which stays
                    signal.signal(signum, handlers[signum])

    def _take(self, handler: Handler, signum: int, frame: Any) -> None:
        """Handle a signal. Whoever has wrapped this meanwhile may call it after the search, too."""
        if self._is_deferring:
            if signum not in RECURRING or signum not in dict(self._received):
                self._received.append((signum, handler))
        else:
            handler(signum, frame)

    def _await_others(self) -> bool:
        """Give the other ranks time to receive the same signals, and return whether they have."""
        start = time.monotonic()
        while True:
            expired = time.monotonic() - start > GRACE_S
            answers = self._comm.exchange((self._ending(), expired))
            are_alike = all(received == answers[0][0] for received, _ in answers)
            if are_alike or any(expired for _, expired in answers):
                return are_alike
            time.sleep(POLL_S)

    def _ending(self) -> list[int]:
        """The signals that end a search, which ranks must have alike."""
        return sorted(signum for signum, _ in self._received if signum not in RECURRING)

    def _deliver(self) -> None:
        """Call the handlers in the order of their signals; one that raises does not keep the next from its own."""
        while self._received:
            signum, handler = self._received.popleft()
            try:
                handler(signum, inspect.currentframe())
            finally:
                self._deliver()

    @contextlib.contextmanager
    def _watched_trainer(self) -> Iterator[None]:
        """Shadow what saves a checkpoint, on the instances, and tell who sets ``should_stop``."""
        trainer = self._trainer
        own_class = type(trainer)
        shadows = [(vars(trainer), trainer.save_checkpoint), (vars(trainer.strategy), trainer.strategy.save_checkpoint)]
        hidden = [own.get("save_checkpoint") for own, _ in shadows]
        try:
            for own, save in shadows:
                own["save_checkpoint"] = self._deferring(save)
            trainer.__class__ = self._watching_stops(own_class)
            yield
        finally:
            trainer.__class__ = own_class
            for (own, _), before in zip(shadows, hidden, strict=True):
                if before is None:
                    own.pop("save_checkpoint", None)
                else:
                    own["save_checkpoint"] = before
            if self._stops:
                trainer.should_stop = self._stops[-1]

    def _deferring(self, save: Callable[..., None]) -> Callable[..., None]:
        def deferred(*args: Any, **kwargs: Any) -> None:
            if not self._is_outside():
                self._warn_once()
                return
            self._waiting.add(threading.get_ident())
            has_own_weights = self._own_weights.acquire(timeout=MAX_WAIT_S)
            self._waiting.discard(threading.get_ident())
            if not has_own_weights:
                raise SearchError(
                    "a checkpoint must hold the run's own weights, got a merge search that has not ended after "
                    f"{MAX_WAIT_S:g} s. Save it again later."
                )
            try:
                save(*args, **kwargs)
            finally:
                self._own_weights.release()

        return deferred

    def _is_outside(self) -> bool:
        """Whether this thread is none of the search's: neither its own, nor one that began within it."""
        return threading.get_ident() in self._threads - {self._thread}

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            told = (
                "A validation hook saves checkpoints. During a search it would save a candidate, so those saves are "
                "skipped; saves in the run's own validation are unaffected."
            )
            say(self._trainer, told, rank_zero_warn)

    def _watching_stops(self, trainer_class: type) -> type:
        def set_should_stop(trainer: Any, value: bool) -> None:
            vars(trainer)["should_stop"] = value
            if self._is_outside():
                self._stops.append(value)

        watched = property(lambda trainer: vars(trainer)["should_stop"], set_should_stop)
        return type(trainer_class.__name__, (trainer_class,), {"should_stop": watched})


class InterruptibleComm:
    """A conversation that all ranks leave together once one of them has to.

    Args:
        comm: The ranks.
        reason: Why this rank has to; ``None`` while it does not.
    """

    def __init__(self, comm: Comm, reason: Callable[[], str | None]) -> None:
        self.rank = comm.rank
        self.world_size = comm.world_size
        self._comm = comm
        self._reason = reason

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, by rank. Raises ``SkipError`` on all ranks if one of them has to leave."""
        answers = self._comm.exchange((value, self._reason()))
        for _, reason in answers:
            if reason is not None:
                raise SkipError(f"{reason}. The next search begins anew.")
        return [value for value, _ in answers]

    def give_up(self, error: BaseException) -> None:
        """Tell the others, in place of the next ``exchange``, that this rank has failed."""
        self._comm.give_up(error)

    def close(self) -> None:
        """End the conversation."""
        self._comm.close()


def lightning_package(trainer: Trainer) -> str:
    """Return the package of the Trainer's own classes: ``lightning.pytorch`` or ``pytorch_lightning``."""
    roots = ("lightning.pytorch", "pytorch_lightning")
    modules = [cls.__module__ for cls in type(trainer).__mro__]
    return next(root for module in modules for root in roots if module.startswith(f"{root}."))
