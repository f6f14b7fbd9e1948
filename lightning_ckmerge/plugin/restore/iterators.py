"""Iterators: their places in what they go over, which ``next`` moves on and nothing moves back; and sets.

In a search, whoever holds a built-in iterator is lent a copy, and given its own back afterwards. So is whoever holds a
set: emptied and filled again, it would go over its elements in another order. Iterators that have no copy, such as
generators and those of loaders, are looked at from outside.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import AsyncGeneratorType, BuiltinMethodType, CoroutineType, GeneratorType, MethodWrapperType
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_ckmerge.plugin.restore.kept import Kept, Watched

# Of the iterators of these, `__reduce__` tells all, moves nothing, and runs nobody else's code.
PACKAGES = {"builtins", "itertools", "collections", "_collections"}
RUNNING = (GeneratorType, CoroutineType, AsyncGeneratorType)
METHODS = (MethodWrapperType, BuiltinMethodType)
# What may hold an iterator or a set and cannot be changed itself: a copy of it holds the copy.
CARRIERS = (tuple, partial, *METHODS)
# A larger set is not copied for each evaluation.
MAX_SET_LENGTH = 10_000
NUMBERS = (int, float, complex, str, range)


class Position(Kept):
    """The place of an iterator that a search works on a copy of."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._target, self._seen = target, described(target)

    def put_back(self) -> None:
        """Leave it as it is: it has been moved past its copy."""

    def _differs(self) -> bool:
        return not _is_same(described(self._target), self._seen)


class Frame(Kept):
    """The place of a generator or coroutine: where it waits, and what its names refer to."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._target = target
        self._lasti, self._locals = self._now()

    def put_back(self) -> None:
        """Leave it as it is: nothing moves it back."""

    def _differs(self) -> bool:
        lasti, names = self._now()
        is_other = lasti != self._lasti or names.keys() != self._locals.keys()
        return is_other or not all(map(operator.is_, names.values(), self._locals.values()))

    def _now(self) -> tuple[int | None, dict[str, Any]]:
        prefix = {GeneratorType: "gi", CoroutineType: "cr"}.get(type(self._target), "ag")
        frame = getattr(self._target, f"{prefix}_frame")
        return (None, {}) if frame is None else (frame.f_lasti, dict(frame.f_locals))


class Copies:
    """Copies of iterators and sets, each of one state of them all: those that share another one share its copy."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}

    def get(self, value: Any) -> Any:
        """Return a value's copy, or the value where it neither is an iterator or a set nor carries one."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        copy = self._make(value)
        self._made[id(value)] = (value, copy)
        return copy

    def _make(self, value: Any) -> Any:
        cls = type(value)
        if is_iterator(cls):
            try:
                return self._copy(value)
            except TypeError:
                return value
        if cls is set:
            return set(value)
        if cls in METHODS:
            own = self.get(value.__self__)
            return value if own is value.__self__ else getattr(own, value.__name__)
        if cls is partial:
            parts = (value.func, *value.args, *value.keywords.values())
            func, *args = map(self.get, parts)
            if all(map(operator.is_, parts, (func, *args))):
                return value
            num_args = len(value.args)
            return partial(func, *args[:num_args], **dict(zip(value.keywords, args[num_args:], strict=True)))
        if cls is tuple:
            items = tuple(map(self.get, value))
            return value if all(map(operator.is_, items, value)) else items
        return value

    def _copy(self, iterator: Any) -> Any:
        make, args, state = described(iterator)
        with _unwarned(type(iterator)):
            copy = make(*map(self.get, args))
            if state is not None:
                copy.__setstate__(self._own(state))
        return copy

    def _own(self, state: Any) -> Any:
        """Return a state for a copy's own use: ``cycle`` writes to a list in its."""
        if type(state) is tuple:
            return tuple(map(self._own, state))
        return list(state) if type(state) is list else self.get(state)


def is_lent(value: Any) -> bool:
    """Whether a search works on a copy of a value."""
    return is_iterator(type(value)) or (type(value) is set and len(value) <= MAX_SET_LENGTH)


def is_iterator(cls: type) -> bool:
    """Whether instances of a class are built-in iterators, of which there may be copies."""
    return cls.__module__ in PACKAGES and hasattr(cls, "__next__") and not issubclass(cls, RUNNING)


def look_at(value: Any, where: str) -> Kept | None:
    """Return what tells whether something without a copy, that is moved by running it, has been moved."""
    if issubclass(type(value), RUNNING):
        return Frame(where, value)
    # A loader keeps one of its own, which it winds back itself.
    if issubclass(type(value), _BaseDataLoaderIter) and not where.endswith("._iterator"):
        return Watched(where, lambda: value._num_yielded)
    return None


def described(iterator: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """Return what makes an iterator, from what, and its state then.

    Raises:
        TypeError: It does not say, as ``pairwise``.
    """
    with _unwarned(type(iterator)):
        make, args, *state = iterator.__reduce__()
    return make, args, state[0] if state else None


def _is_same(a: Any, b: Any) -> bool:
    """Whether two descriptions are of one place. Some of their lists and iterators are made anew each time."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in (tuple, list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if is_iterator(type(a)):
        return _is_same(described(a), described(b))
    return type(a) in NUMBERS and bool(a == b)


@contextlib.contextmanager
def _unwarned(cls: type) -> Iterator[None]:
    """Python 3.12 warns of copies of what is in ``itertools``."""
    if cls.__module__ != "itertools":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
