"""Validation batches that many evaluations read, fetched once.

Every evaluation starts from the same random state, so it gets the same batches each time. They are kept as copies, and
handed out as copies: an evaluation may change its batches in place, and they may be views of the user's own data, or of
each other. What changes a value is not kept:

- Where fetching a batch draws random numbers in this process, the numbers that ``validation_step`` draws depend on it.
- Where an iterator is begun in another random state than the kept one was, it may choose other batches.
- A batch that holds anything but tensors, arrays, plain values and containers of them may be more than its values.
"""

from __future__ import annotations

import bisect
import copy
import ctypes
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import FunctionType, NoneType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_ckmerge.plugin.evaluate.halves import Batches, known_length, length_of
from lightning_ckmerge.plugin.restore.randomness import is_same_state

# Of memory, in bytes: as torch allocates it.
ALIGNMENT = 64
PLAIN = (NoneType, int, float, complex, str, bytes, range, Enum, PurePath, np.generic, torch.dtype, torch.device)
_Span = tuple[int, int]
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
        return [
            Batches(partial(self._iterate, (evaluation, i), part), known_length(part)) for i, part in enumerate(parts)
        ]

    def _iterate(self, key: tuple[str, int], part: Iterable[Any]) -> Iterator[Any]:
        """Begin at once, as a loader does; a generator would begin when its first batch is asked for."""
        if self._gave_up:
            return map(copied_if_possible, iter(part))
        before = self._randomness.random_state()
        kept = self._kept.get(key)
        if kept is not None and kept.complete and is_same_state(before, kept.before):
            self._randomness.set_random_state(kept.after)
            return map(copied_if_possible, kept.batches)
        if kept is not None:
            self._give_up("an evaluation was stopped, or began in another random state")
            return map(copied_if_possible, iter(part))
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
            yield copied_if_possible(batch)

    def _keep(self, batch: Any, kept: _Kept) -> None:
        try:
            own, num_bytes = copied(batch)
        except TypeError as error:
            self._give_up(str(error))
            return
        kept.batches.append(own)
        self._left -= num_bytes
        if self._left < 0:
            self._give_up("they need more memory than `evaluation.cache_batches` grants")

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        for kept in self._kept.values():
            kept.batches.clear()
        self._kept.clear()
        logger.debug("Batches of a search are fetched for each trial anew: %s.", reason)


def copied_if_possible(batch: Any) -> Any:
    """Return a copy of a batch, or the batch itself if it holds something that cannot be copied for certain."""
    try:
        return copied(batch)[0]
    except TypeError:
        return batch


def copied(batch: Any) -> tuple[Any, int]:
    """Return a copy of a batch that shares no memory with it, and how many bytes it takes.

    What is one object in the batch, or one memory, is so in the copy.

    Raises:
        TypeError: The batch holds something that cannot be copied for certain.
    """
    spans: list[_Span] = []
    _Copier(lambda leaf: spans.append(_span(leaf))).copy(batch)
    blocks = [_Block(low, high) for low, high in _joined(spans)]
    copier = _Copier(lambda leaf: _block_of(leaf, blocks).view(leaf))
    own = copier.copy(batch)
    return own, copier.num_bytes + sum(b.high - b.low for b in blocks)


class _Copier:
    """Copies values, but for tensors and arrays, of which ``copy_leaf`` makes what it wants."""

    def __init__(self, copy_leaf: Callable[[Any], Any]) -> None:
        self.num_bytes = 0
        self._copy_leaf = copy_leaf
        # With the original, whose `id` another object would get if it were gone.
        self._copies: dict[int, tuple[Any, Any]] = {}

    def copy(self, value: Any) -> Any:
        """Return a copy."""
        if id(value) not in self._copies:
            self._copies[id(value)] = value, self._copy(value)
        return self._copies[id(value)][1]

    def _copy(self, value: Any) -> Any:
        self.num_bytes += sys.getsizeof(value)
        if _is_leaf(value):
            return self._copy_leaf(value)
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
        if _is_object(value):
            twin = copy.copy(value)
            vars(twin).update({name: self.copy(item) for name, item in vars(value).items()})
            return twin
        raise TypeError(f"a batch holds a {type(value).__name__}")


def _is_leaf(value: Any) -> bool:
    if type(value) is Tensor:
        is_plain = value.layout == torch.strided and not (value.is_quantized or value.is_conj() or value.is_neg())
        return is_plain and value.device.type == "cpu"
    return type(value) is np.ndarray and not value.dtype.hasobject


def _is_object(value: Any) -> bool:
    """Whether ``vars`` holds all that there is of it."""
    has_slots = any(vars(cls).get("__slots__") for cls in type(value).__mro__)
    # Subclasses of these hold more.
    more = (type, FunctionType, Tensor, np.ndarray, list, set, frozenset, deque, bytearray)
    return hasattr(value, "__dict__") and not has_slots and not isinstance(value, more)


class _Block:
    """A copy of the memory between two addresses."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        # Kernels may compute in another order where memory lies otherwise.
        self._pad = low % ALIGNMENT
        memory = np.empty(self._pad + high - low + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self._memory = memory[start : start + self._pad + high - low]
        if high > low:
            ctypes.memmove(self._memory.ctypes.data + self._pad, low, high - low)

    def view(self, leaf: Any) -> Any:
        """Return the tensor or array here that ``leaf`` is there."""
        offset = self._pad + _address(leaf) - self.low
        if not isinstance(leaf, Tensor):
            return np.ndarray(leaf.shape, leaf.dtype, self._memory, offset, leaf.strides)
        storage = torch.from_numpy(self._memory).untyped_storage()
        place = offset // leaf.itemsize
        twin = torch.empty(0, dtype=leaf.dtype).set_(storage, place, leaf.shape, leaf.stride())
        return twin.requires_grad_(leaf.requires_grad)


def _span(leaf: Any) -> _Span:
    """Return the addresses of a tensor's or array's first byte and behind its last one.

    Raises:
        TypeError: Its elements do not lie at multiples of their size.
    """
    start, itemsize = _address(leaf), leaf.itemsize
    strides = [n * itemsize for n in leaf.stride()] if isinstance(leaf, Tensor) else leaf.strides
    if start % itemsize and isinstance(leaf, Tensor):
        raise TypeError("a batch holds a tensor in memory that is not aligned")
    if 0 in leaf.shape:
        return start, start
    steps = [(size - 1) * stride for size, stride in zip(leaf.shape, strides, strict=True)]
    return start + sum(n for n in steps if n < 0), start + itemsize + sum(n for n in steps if n > 0)


def _address(leaf: Any) -> int:
    return leaf.data_ptr() if isinstance(leaf, Tensor) else leaf.__array_interface__["data"][0]


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """Return what spans cover, those that overlap as one."""
    found: list[_Span] = []
    for low, high in sorted(spans):
        if found and low < found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def _block_of(leaf: Any, blocks: Sequence[_Block]) -> _Block:
    low, high = _span(leaf)
    after = bisect.bisect_right(blocks, low, key=lambda b: b.low)
    # Of an empty tensor, which may lie where another ends.
    return next(b for b in reversed(blocks[:after]) if high <= b.high)
