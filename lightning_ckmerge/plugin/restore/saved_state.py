"""Find everything that can be reached from an object, and keep it as it is."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from queue import Queue
from types import BuiltinMethodType, FunctionType, MappingProxyType, MethodType, MethodWrapperType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_ckmerge.errors import explain
from lightning_ckmerge.plugin.restore.bits import checksum
from lightning_ckmerge.plugin.restore.iterators import CARRIERS, Copies, Position, described, is_iterator, look_at
from lightning_ckmerge.plugin.restore.kept import (
    Array,
    Attributes,
    Contents,
    Elements,
    Generator,
    Items,
    Kept,
    Raw,
    TensorHooks,
    TensorPlace,
    Watched,
    cell,
    class_of,
    components,
    is_plain,
    slot,
)
from lightning_ckmerge.plugin.restore.randomness import GENERATORS
from lightning_ckmerge.plugin.restore.reach import (
    MAX_CONTAINER_LENGTH,
    MAX_DEPTH,
    MAX_OBJECTS,
    OPAQUE_PACKAGES,
    attributes_of,
    has_workers,
    held_by_other_threads,
    is_atom,
    is_inert,
    is_looked_into,
    named_modules,
    package_of,
    slots_of,
)

CONTAINERS = (list, deque, dict, set)
BUILT_IN = (Tensor, np.ndarray, *CONTAINERS)
OF_THE_RUN = (nn.Module, nn.Parameter, Optimizer)
PLAIN_TYPES = {list, dict, set, deque, OrderedDict, defaultdict, Counter, np.ndarray}
MODULE_INTERNALS = vars(nn.Module()).keys()
SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Allowance:
    """How much memory may be copied; what is larger, or comes when all is spent, is summed up.

    Args:
        each: Bytes of one tensor or array.
        total: Bytes of all; ``None``: as many as of one.
        buffers: Of modules' own buffers; ``None``: they count as others do.
    """

    def __init__(self, each: int, total: int | None = None, buffers: Allowance | None = None) -> None:
        self._each, self._left = each, each if total is None else total
        self.buffers = buffers or self

    def grants(self, num_bytes: int) -> bool:
        """Whether so many bytes may be copied; they count as spent if so."""
        if num_bytes > min(self._each, self._left):
            return False
        self._left -= num_bytes
        return True


class SavedState:
    """Objects as they are now.

    Args:
        weights: Tensors whose contents the search itself changes and puts back.

    Attributes:
        kept: One thing after another.
        generators: Whatever draws random numbers, of the user's own.
        left_out: Places of what cannot be kept, and the reasons.
    """

    def __init__(self, weights: Collection[Tensor] = ()) -> None:
        self.kept: list[Kept] = []
        self.generators: list[Any] = []
        self.left_out: dict[str, str] = {}
        self._lent: dict[int, Any] = {}  # iterators, and what carries them
        self._weights = {id(w) for w in weights}
        self._seen: dict[int, Any] = {}
        # An empty tuple, say, is one object for everybody.
        self._shared = {id(held): held for held in held_by_other_threads() if not is_inert(held)}

    def take(self, value: Any, where: str, allowance: Allowance, depth: int = 0) -> None:
        """Remember ``value`` and what it holds, as far as it is state and not code, data or machinery."""
        cls = type(value)
        if is_atom(cls) or id(value) in self._seen or depth > MAX_DEPTH:
            return
        if len(self._seen) >= MAX_OBJECTS:
            self.left_out["..."] = f"more than {MAX_OBJECTS} objects"
            return
        self._seen[id(value)] = value
        if self._is_at_work(value, cls):
            self.left_out[where] = "another thread works on it"
            return
        self._attempt(where, partial(self._take, value, cls, where, allowance, depth))

    def put_back(self) -> dict[str, str]:
        """Put everything back as it was, each thing on its own; return the places of what failed, with the reasons."""
        faults = ((k.where, _fault(k)) for k in self.kept)
        return {where: fault for where, fault in faults if fault is not None}

    def release(self) -> None:
        """Let go of everything."""
        for held in (self.kept, self.generators, self._lent, self._seen, self._shared):
            held.clear()

    def lend(self) -> None:
        """Give whoever holds an iterator a copy of it, until all is put back."""
        if not self._lent:
            return
        copies = Copies()
        lent = {i: copies.get(value) for i, value in self._lent.items()}

        def copy_of(value: Any) -> Any:
            return lent.get(id(value), value)

        for kept in self.kept:
            kept.lend(copy_of)

    def forget_writes(self) -> None:
        """Let graphs that wait for their backward pass go on: all memory is as it was."""
        for kept in self.kept:
            if isinstance(kept, TensorPlace):
                kept.forget_writes()

    def changed(self) -> list[str]:
        """Return the places of what differs from what it was."""
        return [k.where for k in self.kept if _has_changed(k)]

    def _is_at_work(self, value: Any, cls: type) -> bool:
        """Whether another thread may change it at any time. Of modules and optimizers none is likely to."""
        if issubclass(cls, OF_THE_RUN):
            return False
        is_for_threads = issubclass(cls, Queue) and bool(self._shared)
        return is_for_threads or id(value) in self._shared or has_workers(value)

    def _attempt(self, where: str, take: Callable[[], None]) -> None:
        try:
            take()
        except Exception as error:  # somebody's own class may raise anything
            self.left_out[where] = explain(error)

    def _take(self, value: Any, cls: type, where: str, allowance: Allowance, depth: int) -> None:
        if issubclass(cls, nn.Module):
            for path, module in named_modules(value, where):
                self._seen[id(module)] = module
                self._attempt(path, partial(self._take_module, module, path, allowance))
            return
        if issubclass(cls, Tensor):
            self._take_tensor(value, where, allowance)
        elif issubclass(cls, np.ndarray):
            self._take_array(value, where, allowance)
        elif issubclass(cls, GENERATORS):
            self.generators.append(value)
            self.kept.append(Generator(where, value))
        elif issubclass(cls, (bytearray, array)):
            self._take_raw(value, where, allowance)
        elif issubclass(cls, (list, deque, dict, set)):
            self.kept.append(Items(where, value) if issubclass(cls, dict) else Elements(where, value))
        elif is_iterator(cls):
            self.kept.append(Position(where, value))
            self._lent[id(value)] = value
        elif (seen := look_at(value, where)) is not None:
            self.kept.append(seen)
        for name, part in _parts(value, cls):
            self.take(part, f"{where}{name}", allowance, depth + 1)
            if id(part) in self._lent and cls in CARRIERS:
                self._lent[id(value)] = value
        if issubclass(cls, defaultdict):
            self._take_slot(value, f"{where}.default_factory", vars(defaultdict)["default_factory"], allowance, depth)
        if issubclass(cls, FunctionType):
            self._take_closure(value, where, allowance, depth)
        elif is_looked_into(cls) or (issubclass(cls, BUILT_IN) and cls not in PLAIN_TYPES):
            self._take_attributes(value, cls, where, allowance, depth)

    def _take_module(self, module: nn.Module, where: str, allowance: Allowance) -> None:
        """Mode, hooks, parameters, buffers, submodules, and attributes of the user's own."""
        own = Attributes(where, vars(module), moving=self._moving(module, where))
        self.kept += [class_of(f"{where}.__class__", module), own]
        is_somebodys = not type(module).__module__.startswith("torch.")
        for name, value in own.saved.items():
            if name in ("_parameters", "_buffers"):
                self.kept.append(Items(where, value))
                for key, tensor in value.items():
                    self.take(tensor, f"{where}.{key}", allowance if name == "_parameters" else allowance.buffers, 1)
            elif name == "_modules":
                self.kept.append(Items(f"{where}, its submodules", value))
            elif is_somebodys or name in MODULE_INTERNALS:
                self.take(value, f"{where}.{name}", allowance, 1)

    def _moving(self, module: nn.Module, where: str) -> list[str]:
        """Names of a module's attributes that another thread may change."""
        if id(module) not in self._shared and not has_workers(module):
            return []
        own = {name: type(value) for name, value in vars(module).items() if name not in MODULE_INTERNALS}
        self.left_out[where] = "another thread may change its numbers, names and lists"
        return [name for name, cls in own.items() if is_atom(cls) or issubclass(cls, CONTAINERS)]

    def _take_attributes(self, value: Any, cls: type, where: str, allowance: Allowance, depth: int) -> None:
        own = attributes_of(value)
        if own is not None:
            self.kept.append(Attributes(where, own))
            for name, item in list(own.items()):
                self.take(item, f"{where}.{name}", allowance, depth + 1)
        for name, descriptor in slots_of(cls):
            self._take_slot(value, f"{where}.{name}", descriptor, allowance, depth)

    def _take_slot(self, value: Any, where: str, descriptor: Any, allowance: Allowance, depth: int) -> None:
        kept = slot(where, value, descriptor)
        self.kept.append(kept)
        self.take(kept.value, where, allowance, depth + 1)

    def _take_tensor(self, tensor: Tensor, where: str, allowance: Allowance) -> None:
        if is_lazy(tensor) or tensor.is_meta:  # no memory, until it is materialized as another class
            self.kept.append(class_of(where, tensor))
            return
        if tensor.is_leaf:
            for name in HOOKS:
                self.kept.append(TensorHooks(f"{where}.{name}", tensor, name))
                self.take(getattr(tensor, name), f"{where}.{name}", allowance, MAX_DEPTH - 2)
        is_weight = id(tensor) in self._weights
        if is_plain(tensor):
            place = TensorPlace(where, tensor)
            self.kept.append(place)
            self._take_memory(place.memory, where, allowance, copied=not is_weight)
            return
        if tensor.is_quantized:
            self.kept.append(Watched(where, lambda: checksum(tensor.int_repr())))
            return
        if tensor.layout in SPARSE:
            self.kept.append(TensorPlace(where, tensor))
        for component in components(tensor):
            if is_weight:
                self._weights.add(id(component))
            self.take(component, where, allowance, MAX_DEPTH)

    def _take_memory(self, memory: Any, where: str, allowance: Allowance, *, copied: bool = True) -> None:
        if not copied or not allowance.grants(memory.nbytes):
            self.kept.append(Watched(where, partial(checksum, memory)))
        else:
            self.kept.append(Contents(where, memory) if isinstance(memory, Tensor) else Array(where, memory))

    def _take_array(self, value: np.ndarray[Any, Any], where: str, allowance: Allowance) -> None:
        if not value.flags.writeable:
            return
        if value.dtype.hasobject:
            self.kept.append(Array(where, value))
        else:
            self._take_memory(value, where, allowance)

    def _take_raw(self, value: Any, where: str, allowance: Allowance) -> None:
        with memoryview(value) as view:
            num_bytes = view.nbytes
        if allowance.grants(num_bytes):
            self.kept.append(Raw(where, value))
        else:  # nothing may hold on to its memory, or it could not grow
            self.kept.append(Watched(where, lambda: checksum(np.frombuffer(value, np.uint8))))

    def _take_closure(self, function: FunctionType, where: str, allowance: Allowance, depth: int) -> None:
        if package_of(function) in OPAQUE_PACKAGES:
            return
        self.take(vars(function), where, allowance, depth)
        for name, holder in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            kept = cell(f"{where}.{name}", holder)
            self.kept.append(kept)
            self.take(kept.value, kept.where, allowance, depth + 1)


def _parts(value: Any, cls: type) -> Iterator[tuple[str, Any]]:
    """What an object of a built-in type holds, and how to name it."""
    items: Iterable[tuple[Any, Any]] = ()
    if issubclass(cls, dict):
        items = list(dict.items(value))
    elif issubclass(cls, MappingProxyType):
        items = list(value.items())
    elif base := next((b for b in (list, deque, set, tuple, frozenset) if issubclass(cls, b)), None):
        items = enumerate(list(base.__iter__(value)))
    elif issubclass(cls, np.ndarray) and value.dtype.hasobject:
        items = enumerate(np.asarray(value).ravel().tolist())
    elif issubclass(cls, partial):
        items = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif issubclass(cls, (MethodType, MethodWrapperType, BuiltinMethodType)):
        items = [("__self__", value.__self__)]
    elif issubclass(cls, FunctionType):
        items = [("defaults", value.__defaults__), ("defaults", value.__kwdefaults__)]
    elif is_iterator(cls):
        _, args, state = described(value)
        # In lists lies what has been gone over, or copies of what has not.
        items = enumerate(p for p in (*args, *(state if type(state) is tuple else ())) if type(p) is not list)
    items = list(itertools.islice(items, MAX_CONTAINER_LENGTH + 1))
    if len(items) <= MAX_CONTAINER_LENGTH:
        yield from ((f"[{k if type(k) in (int, str) else i}]", v) for i, (k, v) in enumerate(items) if not is_inert(v))


def _fault(kept: Kept) -> str | None:
    """Put one thing back, and return why that failed, if it did."""
    try:
        kept.put_back()
    except Exception as error:
        return explain(error)
    return None


def _has_changed(kept: Kept) -> bool:
    try:
        return kept.has_changed()
    except Exception:  # it cannot even be looked at any more
        return True
