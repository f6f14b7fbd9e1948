"""Find everything that can be reached from an object, and keep it as it is."""

from __future__ import annotations

import ctypes
import decimal
import hashlib
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from io import BytesIO, StringIO
from itertools import chain
from queue import Queue
from types import BuiltinMethodType, FunctionType, MappingProxyType, MethodType, MethodWrapperType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ckmerge.core.holders import buffers_of, is_script, parameters_of
from lightning_ckmerge.errors import FinalError, explain
from lightning_ckmerge.plugin.restore.bits import checksum
from lightning_ckmerge.plugin.restore.iterators import (
    CARRIERS,
    Copies,
    Position,
    described,
    is_iterator,
    is_lent,
    look_at,
)
from lightning_ckmerge.plugin.restore.kept import (
    Array,
    Attributes,
    Contents,
    Elements,
    Generator,
    Items,
    Kept,
    Nest,
    Raw,
    ScriptAttribute,
    Setting,
    Stream,
    TensorHooks,
    TensorPlace,
    Watched,
    cell,
    class_of,
    components,
    decimal_settings,
    is_plain,
    set_decimal_settings,
    slot,
)
from lightning_ckmerge.plugin.restore.randomness import GENERATORS
from lightning_ckmerge.plugin.restore.reach import (
    MAX_CONTAINER_LENGTH,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_OBJECTS,
    NUM_FEW,
    OPAQUE_PACKAGES,
    attributes_of,
    has_workers,
    held_by_other_threads,
    is_atom,
    is_inert,
    is_looked_into,
    named_globals,
    named_modules,
    package_of,
    script_attributes,
    slots_of,
)

CONTAINERS = (list, deque, dict, set)
BUILT_IN = (Tensor, np.ndarray, *CONTAINERS)
# Whatever may hold state, by its own type.
STATE = (*BUILT_IN, *GENERATORS, bytearray, array, nn.Module, FunctionType, MethodType, partial)
# Of ctypes, as in a value that processes share.
CTYPES = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
HASHES = (type(hashlib.sha256()), type(hashlib.blake2b()), type(hashlib.blake2s()))
# These are looked at last.
DATA = (Dataset, DataLoader, Sampler)
NUMBERS = (bool, int, float, str)
OF_THE_RUN = (nn.Module, nn.Parameter, Optimizer)
PLAIN_TYPES = {list, dict, set, deque, OrderedDict, defaultdict, Counter, np.ndarray}
MODULE_INTERNALS = vars(nn.Module()).keys()
SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
HOOKS_OF_MODULES = sorted(name for name in MODULE_INTERNALS if name.endswith("_hooks"))
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


class Visit(NamedTuple):
    """Something to be looked at."""

    value: Any
    where: str
    allowance: Allowance
    depth: int


class SavedState:
    """Objects as they are now.

    What is near is looked at before what is far, so that a depth at which to stop is an object's least; and the run's
    own state before its data, each with a number of objects of its own.

    Args:
        weights: Tensors whose contents the search itself changes and puts back.
        data: Objects that are left to ``take_data``, as are datasets, loaders and samplers.

    Attributes:
        kept: One thing after another.
        generators: Whatever draws random numbers, of the user's own.
        left_out: Places of what cannot be kept, and the reasons.
    """

    def __init__(self, weights: Collection[Tensor] = (), data: Collection[Any] = ()) -> None:
        self.kept: list[Kept] = []
        self.generators: list[Any] = []
        self.left_out: dict[str, str] = {}
        self._lent: dict[int, Any] = {}  # iterators and sets, and what carries them
        self._weights = {id(w) for w in weights}
        self._seen: dict[int, Any] = {}
        self._shared = {id(held): held for held in held_by_other_threads() if not is_inert(held)}
        self._carriers: list[tuple[Any, list[Any]]] = []  # what may hold one of these, and its parts
        self._queue: deque[Visit] = deque()
        self._is_going = False
        self._classes: set[type] = set()
        self._data = {id(held): held for held in data if not is_inert(held)}
        self._later: list[Visit] | None = []
        self._too_deep: dict[int, tuple[Any, str]] = {}
        self._num_objects = self._num_items = 0
        self._end = ""  # where the objects were too many

    def take(self, value: Any, where: str, allowance: Allowance, depth: int = 0) -> None:
        """Remember ``value`` and what it holds, as far as it is state and not code or machinery."""
        self._queue.append(Visit(value, where, allowance, depth))
        if self._is_going:
            return
        self._is_going = True
        try:
            while self._queue:
                self._visit(self._queue.popleft())
        finally:
            self._is_going = False

    def take_data(self, data: Mapping[str, Any], allowance: Allowance) -> None:
        """Remember data, by their names, and whatever has been left to this.

        Raises:
            FinalError: The run's own state, which was looked at before, is of too many objects.
        """
        if self._end:
            raise FinalError(
                f"a run must hold no more than {MAX_OBJECTS:,} objects beside its data for a search to restore it, got "
                f"more, such as {self._end}. Hold large data in arrays, tensors or a dataset."
            )
        later, self._later = self._later or [], None
        self._num_objects = self._num_items = 0
        for name, value in data.items():
            self.take(value, name, allowance)
        for visit in later:
            self.take(visit.value, visit.where, allowance)
        if self._end:
            self.left_out[self._end] = f"it is beyond {MAX_OBJECTS:,} objects, or {MAX_ITEMS:,} items of long lists"
        for value, where in self._too_deep.values():
            if id(value) not in self._seen:
                self.left_out[where] = f"it lies more than {MAX_DEPTH} objects deep"

    def _visit(self, visit: Visit) -> None:
        value, where, _, depth = visit
        cls = type(value)
        if is_atom(cls) or id(value) in self._seen:
            return
        if self._later is not None and (id(value) in self._data or issubclass(cls, DATA)):
            self._later.append(visit)
            return
        if depth > MAX_DEPTH:
            if issubclass(cls, STATE) or is_looked_into(cls):
                self._too_deep.setdefault(id(value), (value, where))
            return
        if self._num_objects >= MAX_OBJECTS:
            self._end = self._end or where
            return
        self._num_objects += 1
        self._seen[id(value)] = value
        if self._is_at_work(value, cls):
            self._watch_numbers(value, where)
            self.left_out[where] = "another thread works on it"
            return
        self._attempt(where, partial(self._take, value, cls, *visit[1:]))

    def put_back(self) -> dict[str, str]:
        """Put everything back as it was, each thing on its own; return the places of what failed, with the reasons."""
        faults = ((k.where, _fault(k)) for k in self.kept)
        return {where: fault for where, fault in faults if fault is not None}

    def release(self) -> None:
        """Let go of everything."""
        for held in (self.kept, self.generators, self._lent, self._seen, self._shared, self._carriers):
            held.clear()
        for mapping in (self._data, self._too_deep):
            mapping.clear()

    def lend(self) -> None:
        """Give whoever holds an iterator or a set a copy of it, until all is put back."""
        if not self._lent:
            return
        while carrying := [v for v, parts in self._carriers if self._carries(v, parts)]:
            self._lent.update((id(value), value) for value in carrying)
        copies = Copies()
        lent = {i: copies.get(value) for i, value in self._lent.items()}

        def copy_of(value: Any) -> Any:
            return lent.get(id(value), value)

        for kept in self.kept:
            kept.lend(copy_of)

    def _carries(self, value: Any, parts: list[Any]) -> bool:
        return id(value) not in self._lent and any(id(part) in self._lent for part in parts)

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

    def _watch_numbers(self, value: Any, where: str) -> None:
        """What a thread of its own may change cannot be put back; that it has changed in a search can be told.

        Not where a thread works on the object itself, as one that fetches batches ahead.
        """
        own = attributes_of(value)
        if own is None or id(value) in self._shared or issubclass(type(value), Queue):
            return
        for name in [name for name, item in own.items() if type(item) in NUMBERS]:
            self.kept.append(Watched(f"{where}.{name}", partial(own.get, name)))

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
        elif issubclass(cls, (bytearray, array, *CTYPES)):
            self._take_raw(value, where, allowance)
        elif issubclass(cls, (BytesIO, StringIO)):
            self.kept.append(Stream(where, value))
        elif issubclass(cls, (list, deque, dict, set)):
            self.kept.append(Items(where, value) if issubclass(cls, dict) else Elements(where, value))
        elif issubclass(cls, ContextVar):
            kept = Setting(where, value.get, value.set)
            self.kept.append(kept)
            self.take(kept.value, where, allowance, depth + 1)
        elif issubclass(cls, decimal.Context):
            read, write = partial(decimal_settings, value), partial(set_decimal_settings, value)
            self.kept.append(Setting(where, read, write))
        elif issubclass(cls, HASHES):
            self.kept.append(Watched(where, value.digest))
        elif is_iterator(cls):
            self.kept.append(Position(where, value))
        elif (seen := look_at(value, where)) is not None:
            self.kept.append(seen)
        if is_lent(value):
            self._lent[id(value)] = value
        parts = _parts(value, cls)
        if len(parts) > NUM_FEW:
            self._take_many([part for _, part in parts], where, allowance, depth + 1)
        else:
            parts = [(key, part) for key, part in parts if not is_inert(part)]
            for key, part in parts:
                self.take(part, f"{where}[{key}]", allowance, depth + 1)
            if cls in CARRIERS and parts:
                self._carriers.append((value, [part for _, part in parts]))
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
        self._take_globals(type(module), allowance)
        if is_script(module):
            self._take_script(module, where, allowance)
            return
        is_flat = issubclass(type(module), FullyShardedDataParallel)  # these go on changing
        for name, value in own.saved.items():
            if name in ("_parameters", "_buffers"):
                self.kept.append(Items(where, value))
                for key, tensor in value.items():
                    self.take(tensor, f"{where}.{key}", allowance if name == "_parameters" else allowance.buffers, 1)
            elif name == "_modules":
                self.kept.append(Items(f"{where}, its submodules", value))
            elif not is_flat or name in MODULE_INTERNALS:
                self.take(value, f"{where}.{name}", allowance, 1)

    def _take_script(self, module: Any, where: str, allowance: Allowance) -> None:
        """What TorchScript holds in place of a module's attributes; its lists and dicts are copies at each look."""
        parameters = parameters_of(module)
        names = {*parameters, *buffers_of(module), *script_attributes(module)}
        for name in sorted(names):
            kept = ScriptAttribute(f"{where}.{name}", module, name)
            self.kept.append(kept)
            self.take(kept.value, kept.where, allowance if name in parameters else allowance.buffers, 1)
        for name in HOOKS_OF_MODULES:
            if (hooks := vars(module).get(name)) is not None:
                self.take(hooks, f"{where}.{name}", allowance, 1)

    def _take_globals(self, cls: type, allowance: Allowance) -> None:
        """Generators of random numbers among the globals that a class's functions name; others are out of reach."""
        if cls in self._classes:
            return
        self._classes.add(cls)
        for name, value in named_globals(cls):
            if issubclass(type(value), GENERATORS):
                self.take(value, name, allowance, 1)

    def _moving(self, module: nn.Module, where: str) -> list[str]:
        """Names of a module's attributes that another thread may change."""
        if id(module) not in self._shared and not has_workers(module):
            return []
        own = {name: type(value) for name, value in vars(module).items() if name not in MODULE_INTERNALS}
        self.left_out[where] = "another thread may change its numbers, names and lists"
        self._watch_numbers(module, where)
        return [name for name, cls in own.items() if is_atom(cls) or issubclass(cls, CONTAINERS)]

    def _take_attributes(self, value: Any, cls: type, where: str, allowance: Allowance, depth: int) -> None:
        self._take_globals(cls, allowance)
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
        if tensor.is_leaf and tensor.requires_grad:
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
        self.kept.append(
            Setting(where, lambda: value.flags.writeable, lambda can_write: value.setflags(write=can_write))
        )
        if not value.flags.writeable:
            return
        if value.dtype.hasobject:
            self.kept.append(Array(where, value))
        else:
            self._take_memory(value, where, allowance)

    def _take_many(self, values: list[Any], where: str, allowance: Allowance, depth: int) -> None:
        """What a long container holds: plain lists and dicts of one depth together, all else one by one."""
        is_first = True
        while values and depth <= MAX_DEPTH:
            atoms = {cls for cls in set(map(type, values)) if is_atom(cls)}
            seen, shared = self._seen, self._shared
            new = {
                i: (at, v)
                for at, v in enumerate(values)
                if type(v) not in atoms and (i := id(v)) not in seen and i not in shared
            }
            if self._num_items + len(new) > MAX_ITEMS:
                self._end = self._end or f"{where}[...]"
                return
            self._num_items += len(new)
            others = [(i, v) for i, v in new.values() if type(v) not in (list, dict, tuple)]
            if len(others) > MAX_CONTAINER_LENGTH:
                self.left_out[f"{where}[...]"] = f"it is one of more than {MAX_CONTAINER_LENGTH:,} items"
                others = []
            for i, other in others:
                self.take(other, f"{where}[{i if is_first else '...'}]", allowance, depth)
            values = []
            for kind in (list, dict, tuple):
                alike: list[Any] = [v for _, v in new.values() if type(v) is kind]
                if alike:
                    self._seen.update((id(v), v) for v in alike)
                    self.kept += [] if kind is tuple else [Nest(where, alike)]
                    held: Iterable[Any] = (v.values() for v in alike) if kind is dict else alike
                    values += chain.from_iterable(held)
            depth, is_first = depth + 1, False

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


def _parts(value: Any, cls: type) -> list[tuple[Any, Any]]:
    """What an object of a built-in type holds, and how to name it."""
    items: Iterable[tuple[Any, Any]] = ()
    if issubclass(cls, dict):
        items = [(k if type(k) in (int, str) else i, v) for i, (k, v) in enumerate(list(dict.items(value)))]
    elif issubclass(cls, MappingProxyType):
        items = list(value.items())
    elif base := next((b for b in (list, deque, set, tuple, frozenset) if issubclass(cls, b)), None):
        items = enumerate(list(base.__iter__(value)))
    elif issubclass(cls, np.ndarray) and value.dtype.hasobject:
        items = enumerate(np.asarray(value).ravel().tolist())
    elif issubclass(cls, partial):
        items = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif issubclass(cls, memoryview):
        items = [("obj", value.obj)]
    elif issubclass(cls, np.void):  # of a structured array
        items = [("base", value.base)]
    elif issubclass(cls, (MethodType, MethodWrapperType, BuiltinMethodType)):
        items = [("__self__", value.__self__)]
    elif issubclass(cls, FunctionType):
        items = [("defaults", value.__defaults__), ("defaults", value.__kwdefaults__)]
    elif is_iterator(cls):
        _, args, state = described(value)
        # In lists lies what has been gone over, or copies of what has not.
        items = enumerate(p for p in (*args, *(state if type(state) is tuple else ())) if type(p) is not list)
    return list(items)


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
