"""A buffer's state in a checkpoint: plain data, no tensors."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_ckmerge.buffer.storage import Stored
from lightning_ckmerge.config import SnapshotKind
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import SnapshotError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A kept snapshot. A pooled point's segment reaches further back than its name says."""

    segment: Segment
    stored: Stored


@dataclass(kw_only=True)
class Progress:
    """How far the segment in progress has come.

    Args:
        first_step: Its first optimizer step; ``None`` before the first update of a run.
        last_step: Optimizer steps taken so far.
        last_update: The step at which weights were last taken in.
        num_updates: Weight states taken in.
    """

    first_step: int | None = None
    last_step: int = 0
    last_update: int = 0
    num_updates: int = 0

    @classmethod
    def after(cls, step: int) -> Progress:
        """Return the start of a segment that follows ``step``."""
        return cls(first_step=step + 1, last_step=step, last_update=step)

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return 0 if self.first_step is None else self.last_step - self.first_step + 1

    def segment(self, kind: SnapshotKind) -> Segment:
        """Return the steps so far, of which there must be one, as a segment."""
        first_step = self.last_step - self.num_steps + 1
        return Segment(kind=kind, first_step=first_step, last_step=self.last_step, num_updates=self.num_updates)


@dataclass(frozen=True, kw_only=True)
class BufferState:
    """A buffer between two steps.

    Args:
        run_id: Marks its files.
        snapshot: Kind of its snapshots.
        durable: Whether they are on disk; otherwise ``entries`` is empty.
        segment_steps: Length of the finest segment.
        entries: The kept snapshots, oldest first.
        progress: The segment in progress.
        saved: Whether resuming continues that segment; otherwise it starts again.
        file: The mean of that segment, where there is one and it could be saved.
    """

    run_id: str
    snapshot: SnapshotKind
    durable: bool
    segment_steps: int
    entries: tuple[Entry, ...]
    progress: Progress
    saved: bool
    file: Stored | None

    @property
    def names(self) -> frozenset[str]:
        """The files that it needs."""
        return frozenset(self.names_in_order)

    @property
    def names_in_order(self) -> list[str]:
        """The same: the kept snapshots, oldest first, and the segment in progress."""
        return [e.stored.name for e in self.entries] + ([self.file.name] if self.file else [])

    def renamed(self, run_id: str) -> BufferState:
        """Return the state of a buffer with the same files under names of its own."""
        entries = [replace(e, stored=e.stored.renamed(self.run_id, run_id)) for e in self.entries]
        file = self.file.renamed(self.run_id, run_id) if self.file else None
        return replace(self, run_id=run_id, entries=tuple(entries), file=file)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, strings and numbers."""
        return {**asdict(self), "entries": [asdict(e) for e in self.entries]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> BufferState:
        """Return the state that ``to_dict`` was called on.

        Raises:
            SnapshotError: This is not the state of a buffer.
        """
        try:
            entries = tuple(
                Entry(segment=_made(Segment, e["segment"]), stored=_made(Stored, e["stored"])) for e in state["entries"]
            )
            file = _made(Stored, state["file"]) if state["file"] else None
            progress = _made(Progress, state["progress"])
            result = _made(cls, {**state, "entries": entries, "progress": progress, "file": file})
            if not re.fullmatch("[0-9a-f]{8}", result.run_id):
                raise ValueError(f"run_id {result.run_id!r}")
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RecursionError) as error:
            raise SnapshotError(
                f"a buffer's state must come from `state_dict`, got {type(error).__name__}: {str(error)[:200]}. "
                "Resume from a checkpoint that this version of the package wrote."
            ) from error
        return result


M = TypeVar("M")


def _made(kind: type[M], fields: Mapping[str, Any]) -> M:
    """Return an object whose fields are as annotated: a checkpoint may hold anything in their place."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        options = get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        if not any(_is_a(value, option) for option in options):
            raise TypeError(f"{kind.__name__}.{name} is a {type(value).__name__}")
    return kind(**fields)


def _is_a(value: object, option: Any) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    # A bool is an int to Python alone.
    return (
        type(value) is int and abs(value) < 1 << 63
        if option is int
        else isinstance(value, get_origin(option) or option)
    )
