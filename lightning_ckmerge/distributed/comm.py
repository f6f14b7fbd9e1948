"""How ranks talk, so that a fault on one becomes the same decision on all.

Between two collectives of tensors, ranks talk through ``exchange`` alone. Every message carries the sender's error, if
any. A rank that fails sends its error as its next message and leaves; its peers receive it and leave too, all at the
same message. So no rank waits for one that is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from lightning_ckmerge.errors import PeerError

T = TypeVar("T")
# In the dictionary of an error that the others know.
TOLD = "_ckmerge_told"


class Comm(Protocol):
    """The ranks of a run, as far as plain Python values are concerned."""

    rank: int
    world_size: int

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, by rank. Raises ``PeerError`` if one of them has failed."""

    def give_up(self, error: BaseException) -> None:
        """Tell the others, in place of the next ``exchange``, that this rank has failed.

        Nothing is sent of an error that they know, or that followed from one: they have left, and would take a second
        message for one of a later conversation.
        """

    def close(self) -> None:
        """End the conversation."""


def connect() -> Comm:
    """Return the ranks of the default process group, or a process alone. A collective."""
    return Ranks() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Alone()


def on_rank_zero(comm: Comm, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0, and return its result on every rank."""
    return comm.exchange(function() if comm.rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def together(comm: Comm) -> Iterator[None]:
    """Do something on every rank, each on its own; a fault on one ends it on all."""
    try:
        yield
    except Exception as error:
        comm.give_up(error)
        raise
    comm.exchange(None)


class Alone:
    """A single process agrees with itself."""

    rank = 0
    world_size = 1

    def exchange(self, value: T) -> list[T]:
        """Return ``[value]``."""
        return [value]

    def give_up(self, error: BaseException) -> None:
        """Do nothing: no rank waits."""

    def close(self) -> None:
        """Nothing was opened."""


class Ranks:
    """All ranks of the default process group.

    Messages go over a gloo group of their own where there is one, so that they need no accelerator and cannot be taken
    for the run's own collectives. Building it is a collective: all ranks do it in the same order.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_timeout()) if dist.is_gloo_available() else None

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, by rank. Values are pickled between the ranks of one run."""
        messages = self._gather(_Message(value=value))
        for rank, message in enumerate(messages):
            if message.error is not None:
                raise PeerError(f"rank {rank} failed: {message.error.rstrip('.')}. See rank {rank}'s log.")
        return [message.value for message in messages]

    def give_up(self, error: BaseException) -> None:
        """Send the error in place of the next value, once."""
        if _is_known(error):
            return
        vars(error)[TOLD] = True
        self._gather(_Message(error=f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _gather(self, message: _Message) -> list[_Message]:
        messages: list[Any] = [None] * self.world_size
        dist.all_gather_object(messages, message, group=self._group)
        return messages


def _timeout() -> timedelta | None:
    """How long the run's own collectives wait for a rank that hangs: a new group would wait half an hour."""
    group: Any = dist.group.WORLD
    with contextlib.suppress(Exception):  # torch's own default, where it does not tell
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
        return timeout
    return None


def _is_known(error: BaseException | None) -> bool:
    """Whether the others have left already: they know this error, or one that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, PeerError) or TOLD in vars(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True, kw_only=True)
class _Message:
    value: Any = None
    error: str | None = None
