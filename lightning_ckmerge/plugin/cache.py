"""Validation batches that many evaluations read, fetched once.

Every evaluation starts from the same random state, so it gets the same batches each time. They are kept as copies, and
handed out as copies: an evaluation may change its batches in place. What changes a value is not kept:

- Where fetching a batch draws random numbers in this process, the numbers that ``validation_step`` draws depend on it.
- Where an iterator is begun in another random state than the kept one was, it may choose other batches.
- A batch that holds anything but tensors, arrays, plain values and containers of them may be more than its values.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from types import FunctionType, NoneType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_ckmerge.plugin.loaders import has_length, length_of
from lightning_ckmerge.plugin.restore.randomness import is_same_state

PLAIN = (NoneType, int, float, complex, str, bytes, range, Enum, PurePath, np.generic, torch.dtype, torch.device)
logger = logging.getLogger(__name__)


class Randomness(Protocol):
    """The random state of this process."""

    def random_state(self) -> Any:
        """Return it."""

    def set_random_state(self, state: Any) -> None:
        """Put it back."""


@dataclass
class _Kept:
    """What one pass through a loader's batches gave, and the random state before and after it was begun."""

    before: Any
    after: Any
    batches: list[Any] = field(default_factory=list)
    complete: bool = False


class BatchCache:
    """Batches of a search, by the evaluation and the loader that they are for.

    All of them are kept, or none: loaders may share state that reading one of them moves on.

    Args:
        max_bytes: Of host memory, on this rank. Once batches need more, none are kept; 0: none from the start.
        randomness: Of everything that the run may draw from.
    """

    def __init__(self, max_bytes: int, randomness: Randomness) -> None:
        self._left = max_bytes
        self._randomness = randomness
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._gave_up = max_bytes == 0

    def wrap(self, evaluation: str, parts: Sequence[Iterable[Any]]) -> list[Iterable[Any]]:
        """Return what stands in for the loaders of one evaluation: batches that are fetched the first time only.

        Args:
            evaluation: Names what is evaluated on; it must have the same batches whenever it is named.
            parts: Batches of each loader.
        """
        if self._gave_up:
            return list(parts)
        return [
            (_SizedPart if has_length(part) else _Part)(part, lambda p, i=i: self._iterate((evaluation, i), p))  # type: ignore[misc]
            for i, part in enumerate(parts)
        ]

    def _iterate(self, key: tuple[str, int], part: Iterable[Any]) -> Iterator[Any]:
        """Begin at once, as a loader does; a generator would begin when its first batch is asked for."""
        if self._gave_up:
            return iter(part)
        before = self._randomness.random_state()
        kept = self._kept.get(key)
        if kept is not None and kept.complete and is_same_state(before, kept.before):
            self._randomness.set_random_state(kept.after)
            return map(_copied, kept.batches)
        if kept is not None:
            self._give_up("an evaluation was stopped, or began in another random state")
            return iter(part)
        iterator = iter(part)
        self._kept[key] = _Kept(before, self._randomness.random_state())
        # Lightning does not ask whether there are more batches than the loader's length.
        return self._fetch(iterator, self._kept[key], length_of(part))

    def _fetch(self, iterator: Iterator[Any], kept: _Kept, length: float) -> Iterator[Any]:
        while True:
            before = None if self._gave_up else self._randomness.random_state()
            try:
                batch = next(iterator)
            except StopIteration:
                kept.complete = True
                return
            finally:
                if not self._gave_up and not is_same_state(before, self._randomness.random_state()):
                    self._give_up("fetching them draws random numbers in this process")
            if not self._gave_up:
                self._keep(batch, kept)
                kept.complete = len(kept.batches) == length
            yield batch

    def _keep(self, batch: Any, kept: _Kept) -> None:
        copier = _Copier()
        try:
            kept.batches.append(copier.copy(batch))
        except TypeError as error:
            self._give_up(str(error))
            return
        self._left -= copier.num_bytes
        if self._left < 0:
            self._give_up("they need more memory than `evaluation.cache_batches` grants")

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        for kept in self._kept.values():
            kept.batches.clear()
        self._kept.clear()
        logger.debug("Batches of a search are fetched for each trial anew: %s.", reason)


class _Part:
    """Batches of one loader; begun when it is iterated."""

    def __init__(self, batches: Iterable[Any], begin: Callable[[Iterable[Any]], Iterator[Any]]) -> None:
        self._batches = batches
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin(self._batches)


class _SizedPart(_Part):
    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


class _Copier:
    """Copies of values that share no memory with them, and how many bytes they take.

    What occurs twice in a batch does so in its copy.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._copies: dict[int, Any] = {}

    def copy(self, value: Any) -> Any:
        """Return a copy.

        Raises:
            TypeError: The value holds something that cannot be copied for certain.
        """
        if id(value) not in self._copies:
            self._copies[id(value)] = self._copy(value)
        return self._copies[id(value)]

    def _copy(self, value: Any) -> Any:
        if type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu":
            self.num_bytes += value.numel() * value.element_size()
            return value.detach().clone().requires_grad_(value.requires_grad)
        if type(value) is np.ndarray and not value.dtype.hasobject:
            self.num_bytes += value.nbytes
            return value.copy()
        self.num_bytes += sys.getsizeof(value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, tuple):
            items = [self.copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) is list:
            return [self.copy(item) for item in value]
        if isinstance(value, dict):
            filled = copy.copy(value)
            filled.update({key: self.copy(item) for key, item in value.items()})
            return filled
        has_slots = any(vars(cls).get("__slots__") for cls in type(value).__mro__)
        if hasattr(value, "__dict__") and not has_slots and not isinstance(value, (type, FunctionType, Tensor)):
            twin = copy.copy(value)
            vars(twin).update({name: self.copy(item) for name, item in vars(value).items()})
            return twin
        raise TypeError(f"a batch holds a {type(value).__name__}")


def _copied(batch: Any) -> Any:
    return _Copier().copy(batch)
