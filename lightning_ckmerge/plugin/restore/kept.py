"""One thing as it was: whether it has changed since, and how it is put back. A class for each kind of thing.

Contents are compared by identity and memory by its bits, and methods of the built-in types are called in place of those
of somebody's own class: neither ``__eq__`` nor ``__setattr__`` nor ``__iter__`` of the user's runs here.
"""

from __future__ import annotations

import decimal
import operator
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from types import CellType, MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_ckmerge.plugin.restore.bits import array_bytes, same_bits
from lightning_ckmerge.plugin.restore.randomness import generator_state, is_same_state, set_generator_state

MISSING = object()


class Kept:
    """One thing as it is now.

    Args:
        where: Its place, as people would look for it.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def has_changed(self) -> bool:
        """Whether it differs from what it was."""
        return self._differs()

    def put_back(self) -> None:
        """Make it what it was, if it differs; nothing else is written."""
        if self._differs():
            self._write()

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """Put copies in the place of what it holds, where ``copy_of`` has one; ``put_back`` takes them away."""

    def _differs(self) -> bool:
        raise NotImplementedError

    def _write(self) -> None:
        raise NotImplementedError


class Items(Kept):
    """What a dict maps to what, in which order."""

    def __init__(self, where: str, target: dict[Any, Any]) -> None:
        super().__init__(where)
        self._dict: Any = OrderedDict if issubclass(type(target), OrderedDict) else dict
        self._target = target
        self._keys, self._values = list(self._dict.keys(target)), list(self._dict.values(target))

    def _differs(self) -> bool:
        if not self._keys and not dict.__len__(self._target):
            return False  # as most dicts of hooks
        return self._has_other_keys() or not _all_same(self._dict.values(self._target), self._values)

    def _write(self) -> None:
        if self._has_other_keys():
            self._dict.clear(self._target)
        for key, value in zip(self._keys, self._values, strict=True):  # `Counter.update` would add
            if self._dict.get(self._target, key, MISSING) is not value:
                self._dict.__setitem__(self._target, key, value)

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """Lend a copy of each value that has one."""
        for key, value in zip(self._keys, self._values, strict=True):
            if (copy := copy_of(value)) is not value:
                self._dict.__setitem__(self._target, key, copy)

    def _has_other_keys(self) -> bool:
        return not _all_same(self._dict.keys(self._target), self._keys)


class Attributes(Kept):
    """What an object's attributes refer to. Their order does not count, and no attribute is ever missing for a moment.

    Args:
        where: The object's place.
        target: The object's ``__dict__``.
        moving: Names of attributes that go on changing.
    """

    def __init__(self, where: str, target: dict[str, Any], moving: Collection[str] = ()) -> None:
        super().__init__(where)
        self._target, self._moving = target, moving
        self.saved = self._now()

    def _differs(self) -> bool:
        now = self._now()
        return now.keys() != self.saved.keys() or not _all_same(map(now.get, self.saved), self.saved.values())

    def _write(self) -> None:
        for name in self._now().keys() - self.saved.keys():
            del self._target[name]
        for name, value in self.saved.items():
            if self._target.get(name, MISSING) is not value:
                self._target[name] = value

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """Lend a copy of each value that has one."""
        for name, value in self.saved.items():
            if (copy := copy_of(value)) is not value:
                self._target[name] = copy

    def _now(self) -> dict[str, Any]:
        return {name: value for name, value in self._target.items() if name not in self._moving}


class Elements(Kept):
    """The elements of a list, a deque or a set."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._type: Any = next(base for base in (list, deque, set) if issubclass(type(target), base))
        self._target = target
        self._elements = self._now()

    def _differs(self) -> bool:
        return not _all_same(self._now(), self._elements)

    def _write(self) -> None:
        if self._type is set:
            self._write_set()
        if self._differs():
            self._type.clear(self._target)
            (self._type.update if self._type is set else self._type.extend)(self._target, self._elements)

    def _write_set(self) -> None:
        """Move as little as may be: the order of a set tells in which one its elements came and went."""
        saved, now = ({id(e): e for e in elements} for elements in (self._elements, self._now()))
        for element in (e for i, e in now.items() if i not in saved):
            set.discard(self._target, element)
        for element in (e for i, e in saved.items() if i not in now):
            set.add(self._target, element)

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """Lend a copy of each element that has one. A set would not know them again."""
        for i, element in enumerate(self._elements if self._type is not set else ()):
            if (copy := copy_of(element)) is not element:
                self._type.__setitem__(self._target, i, copy)

    def _now(self) -> list[Any]:
        return list(self._type.__iter__(self._target))


class Nest(Kept):
    """The contents of many lists, or of many dicts, of the built-in types, looked at together as data in plenty."""

    def __init__(self, where: str, targets: list[Any]) -> None:
        super().__init__(f"{where}[...]")
        self._targets, self._is_of_dicts = targets, type(targets[0]) is dict
        self._lengths, self._items, self._values = self._now()

    def _differs(self) -> bool:
        lengths, items, values = self._now()
        return lengths != self._lengths or not (_all_same(items, self._items) and _all_same(values, self._values))

    def _write(self) -> None:
        start = 0
        for target, length in zip(self._targets, self._lengths, strict=True):
            part = slice(start, start + length)
            start += length
            items, values = self._items[part], self._values[part]
            if self._is_of_dicts and not (_all_same(target, items) and _all_same(target.values(), values)):
                target.clear()
                target.update(zip(items, values, strict=True))
            elif not self._is_of_dicts and not _all_same(target, items):
                target[:] = items

    def _now(self) -> tuple[list[int], list[Any], list[Any]]:
        values = chain.from_iterable(map(dict.values, self._targets)) if self._is_of_dicts else ()
        return list(map(len, self._targets)), list(chain.from_iterable(self._targets)), list(values)


class Raw(Kept):
    """The bytes of a ``bytearray``, an ``array.array``, or an object of ``ctypes``."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._type: Any = next((base for base in (bytearray, array) if issubclass(type(target), base)), None)
        self._target = target
        self._saved: Any = self._now() if self._type is None else self._type.__getitem__(target, slice(None))

    def _differs(self) -> bool:
        return self._now() != memoryview(self._saved).tobytes()

    def _write(self) -> None:
        if self._type is None:
            memoryview(self._target).cast("B")[:] = self._saved
        else:
            self._type.__setitem__(self._target, slice(None), self._saved)

    def _now(self) -> bytes:
        return memoryview(self._target).tobytes()


class Stream(Kept):
    """The place in an ``io.BytesIO`` or ``io.StringIO``, and its contents, which are copied only once written to."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._target = target
        self._saved = self._now()

    def _differs(self) -> bool:
        return self._now() != self._saved

    def _write(self) -> None:
        if self._saved is None or self._target.closed:
            raise ValueError("it has been closed or opened")
        content, place = self._saved
        if self._target.getvalue() != content:
            self._target.seek(0)
            self._target.truncate()
            self._target.write(content)
        self._target.seek(place)

    def _now(self) -> tuple[Any, int] | None:
        return None if self._target.closed else (self._target.getvalue(), self._target.tell())


class Array(Kept):
    """A NumPy array's shape and contents."""

    def __init__(self, where: str, target: np.ndarray[Any, Any]) -> None:
        super().__init__(where)
        self._target = target
        self._saved = np.array(target, subok=False, copy=True, order="K")

    def _differs(self) -> bool:
        now = self._target.view(np.ndarray)
        if (now.dtype, now.shape) != (self._saved.dtype, self._saved.shape):
            return True
        if now.dtype.hasobject:
            return not _all_same(now.ravel().tolist(), self._saved.ravel().tolist())
        return not np.array_equal(array_bytes(now), array_bytes(self._saved))

    def _write(self) -> None:
        if self._target.shape != self._saved.shape:
            self._target.resize(self._saved.shape, refcheck=False)
        np.copyto(self._target.view(np.ndarray), self._saved)


class TensorPlace(Kept):
    """Where a tensor's memory lies, how it is read, and whether it takes part in a graph."""

    def __init__(self, where: str, target: Tensor) -> None:
        super().__init__(where)
        self._target = target
        # Shares the memory, and stays where it is when the tensor is given other memory, or another shape.
        self.memory = target.detach()
        self._requires_grad = target.requires_grad
        # Of its writes, which autograd counts.
        self._count = None if target.is_inference() else _unsafe_preserve_version_counter(target)

    def forget_writes(self) -> None:
        """Let a graph that waits for its backward pass go on with the memory, which is as it was."""
        if self._count is not None:
            self._count.__exit__()

    def _differs(self) -> bool:
        return self._has_moved() or self._target.requires_grad != self._requires_grad

    def _write(self) -> None:
        if self._has_moved():
            self._target.data = self.memory
        if self._target.requires_grad == self._requires_grad:
            return
        if self._target.is_leaf:
            self._target.requires_grad_(self._requires_grad)
        else:  # a step that is written for `no_grad` has updated it in place while gradients were wanted
            self._target.detach_()

    def _has_moved(self) -> bool:
        a, b = self._target, self.memory
        if a.layout != torch.strided:
            return [c.data_ptr() for c in components(a)] != [c.data_ptr() for c in components(b)]
        return (a.data_ptr(), a.shape, a.stride(), a.dtype) != (b.data_ptr(), b.shape, b.stride(), b.dtype)


class Contents(Kept):
    """A copy of a tensor's memory.

    Args:
        where: The tensor's place.
        memory: Shares the memory.
    """

    def __init__(self, where: str, memory: Tensor) -> None:
        super().__init__(where)
        self._memory, self._saved = memory, memory.clone()

    def _differs(self) -> bool:
        return not same_bits(self._memory, self._saved)

    def _write(self) -> None:
        self._memory.copy_(self._saved)


class TensorHooks(Kept):
    """The hooks of a tensor under one attribute: a dict, or none before the first one.

    Their dict is emptied, never taken away: autograd would go on calling them.
    """

    def __init__(self, where: str, target: Tensor, name: str) -> None:
        super().__init__(where)
        self._target, self._name = target, name
        self._holder = getattr(target, name)
        self._hooks = self._now()

    def _differs(self) -> bool:
        now = self._now()
        return now.keys() != self._hooks.keys() or not _all_same(now.values(), self._hooks.values())

    def _write(self) -> None:
        holder = getattr(self._target, self._name)
        if holder is None:
            setattr(self._target, self._name, holder := self._holder)
        holder.clear()
        holder.update(self._hooks)

    def _now(self) -> dict[Any, Any]:
        return dict(getattr(self._target, self._name) or {})


class Watched(Kept):
    """What can be seen of something that is too large to be copied, or cannot be put back."""

    def __init__(self, where: str, look: Callable[[], Any]) -> None:
        super().__init__(where)
        self._look = look
        self._seen = look()

    def put_back(self) -> None:
        """Leave it as it is: nothing is left of it as it was."""

    def _differs(self) -> bool:
        return not is_same_state(self._look(), self._seen)


class Generator(Kept):
    """A random number generator's state."""

    def __init__(self, where: str, target: Any) -> None:
        super().__init__(where)
        self._target, self._state = target, generator_state(target)

    def _differs(self) -> bool:
        return not is_same_state(generator_state(self._target), self._state)

    def _write(self) -> None:
        set_generator_state(self._target, self._state)


class Setting(Kept):
    """One value that is read by one function and written by another.

    Args:
        where: Its name.
        read: Returns the value, or raises ``AttributeError``, ``ValueError`` or ``LookupError`` if there is none.
        write: Sets a value.
        erase: Takes it away.
    """

    def __init__(
        self,
        where: str,
        read: Callable[[], Any],
        write: Callable[[Any], object],
        erase: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(where)
        self._read, self._assign, self._erase = read, write, erase
        self.value = self._now()

    def _differs(self) -> bool:
        now = self._now()
        # Numbers and names are made anew each time that they are asked for.
        return now is not self.value and not (type(now) in (int, float, str, bool, dict) and now == self.value)

    def _write(self) -> None:
        self._erase() if self.value is MISSING else self._assign(self.value)

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """Lend a copy of the value, if it has one."""
        if (copy := copy_of(self.value)) is not self.value:
            self._assign(copy)

    def _now(self) -> Any:
        try:
            return self._read()
        except (AttributeError, ValueError, LookupError):
            return MISSING


class ScriptAttribute(Setting):
    """What a scripted or traced module holds under one name. Its lists and dicts are made anew at each look."""

    def __init__(self, where: str, target: Any, name: str) -> None:
        super().__init__(where, lambda: getattr(target, name), lambda value: setattr(target, name, value))

    def _differs(self) -> bool:
        return not _is_alike(self._now(), self.value)

    def lend(self, copy_of: Callable[[Any], Any]) -> None:
        """TorchScript holds no iterators."""


def slot(where: str, holder: Any, descriptor: MemberDescriptorType) -> Setting:
    """Keep an attribute of an object without a ``__dict__``, past its class's own ``__setattr__``."""
    return Setting(
        where,
        lambda: descriptor.__get__(holder),
        lambda value: descriptor.__set__(holder, value),
        lambda: descriptor.__delete__(holder),
    )


def cell(where: str, target: CellType) -> Setting:
    """Keep what a function's closure holds under one name."""

    def write(value: Any) -> None:
        target.cell_contents = value

    def erase() -> None:
        del target.cell_contents

    return Setting(where, lambda: target.cell_contents, write, erase)


def class_of(where: str, target: Any) -> Setting:
    """Keep an object's class, which a parametrization replaces."""
    return Setting(where, lambda: type(target), lambda cls: object.__setattr__(target, "__class__", cls))


def attribute(where: str, target: Any, name: str) -> Setting:
    """Keep what an attribute refers to."""
    return Setting(where, lambda: getattr(target, name), lambda value: setattr(target, name, value))


def decimal_settings(context: decimal.Context) -> dict[str, Any]:
    """Return a decimal context's settings, with the signals that it has met and those that it traps."""
    settings = {name: getattr(context, name) for name in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")}
    return {**settings, "flags": dict(context.flags), "traps": dict(context.traps)}


def set_decimal_settings(context: decimal.Context, saved: dict[str, Any]) -> None:
    """Give a decimal context the settings that it had."""
    for name, value in saved.items():
        setattr(context, name, value)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one piece of memory and no more. Operators on the bytes of others may well crash."""
    is_other = tensor.is_nested or tensor.is_quantized or hasattr(type(tensor), "__tensor_flatten__")
    return tensor.layout == torch.strided and not is_other


def components(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor of another layout or class consists of.

    Raises:
        TypeError: They are not known.
    """
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return [getattr(tensor, name) for name in names]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    raise TypeError(f"a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}")


def _is_alike(a: Any, b: Any) -> bool:
    """Whether two values of TorchScript, which copies containers but not tensors, are one."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_is_alike, a, b))
    if type(a) is dict:
        return _is_alike(list(a), list(b)) and _is_alike(list(a.values()), list(b.values()))
    return type(a) in (int, float, str, bool, complex) and bool(a == b)


def _all_same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(operator.is_, a, b))
