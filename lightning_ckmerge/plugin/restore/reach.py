"""What a search looks into, and what it leaves alone.

In reach are instances of anybody's own classes, by their ``__dict__`` and ``__slots__``, never through their methods;
containers, functions by what they close over, modules, tensors, arrays and generators of random numbers; and of torch
and Lightning what a run changes as it goes: optimizers, schedulers, loaders, datasets, samplers and callbacks.

Out of reach is what nobody can take back or nobody can find: files and sockets, globals and class attributes, the
memory of C extensions, the Trainer's loggers, whatever lies more than ``MAX_DEPTH`` objects deep, and what changes for
good reason: the callbacks of this package, progress bars, and what another thread works on.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from enum import Enum
from functools import partial
from multiprocessing.pool import Pool
from multiprocessing.sharedctypes import SynchronizedBase
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ckmerge.core.holders import is_script

MAX_DEPTH = 12
MAX_OBJECTS = 300_000
# Containers of more items are looked at as a whole, as far as these are plain lists, dicts and tuples themselves.
NUM_FEW = 256
MAX_ITEMS = 3_000_000
# Of one such container, beside plain ones.
MAX_CONTAINER_LENGTH = 50_000
LIGHTNING = {"lightning", "pytorch_lightning"}
# Objects of these packages are not looked into: they hold threads, files, or the run itself.
OPAQUE_PACKAGES = {"torch", *LIGHTNING, "lightning_ckmerge", "optuna", "numpy"}
OPAQUE_PACKAGES |= {"aim", "clearml", "comet_ml", "mlflow", "neptune", "tensorboard", "tensorboardX", "wandb"}
# These show a search as it goes.
OPAQUE_PACKAGES |= {"rich", "tqdm"}
STATEFUL: tuple[Any, ...] = (
    Dataset,
    Sampler,
    DataLoader,
    Optimizer,
    LRScheduler,
    torch.amp.GradScaler,
    SimpleNamespace,
)
STATEFUL += (Distribution, SynchronizedBase)
# A class of one's own may build on theirs, and hold state of its own.
OPEN_TO_HEIRS = {"torch", "numpy"}
# Of the standard library, whatever holds data, and neither files nor threads nor connections.
OPEN_STDLIB = {"__main__", "_weakrefset", "argparse", "codecs", "collections", "configparser", "contextlib"}
OPEN_STDLIB |= {"difflib", "email", "encodings", "graphlib", "html", "queue", "sched", "string", "textwrap", "types"}
OPEN_STDLIB |= {"weakref"}
ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, type, Enum)
ATOMS += (torch.dtype, torch.device, torch.Size, torch.layout, ModuleType)


def is_atom(cls: type) -> bool:
    """Whether instances of a class cannot change, or hold none of the run's state."""
    # Instances of a class of one's own may have attributes, and so may members of an Enum.
    return issubclass(cls, ATOMS) and (issubclass(cls, type) or not cls.__dictoffset__ or not _is_somebodys(cls))


def _is_somebodys(cls: type) -> bool:
    package = package_of(cls)
    return package not in OPAQUE_PACKAGES and (package == "__main__" or package not in sys.stdlib_module_names)


def is_inert(value: Any) -> bool:
    """Whether a value is plain data that cannot change."""
    cls = type(value)
    return is_atom(cls) or (cls in (tuple, frozenset) and all(is_atom(type(item)) for item in value))


def is_looked_into(cls: type) -> bool:
    """Whether the attributes of a class's instances are state."""
    if issubclass(cls, STATEFUL):
        return True
    if package_of(cls) in sys.stdlib_module_names - OPEN_STDLIB:
        return False
    # Of Lightning, these are state: records of progress, settings and optimizers, and whatever hands out loaders.
    if package_of(cls) in LIGHTNING and dataclasses.is_dataclass(cls):
        return True
    if hasattr(cls, "val_dataloader"):
        return True
    packages = {package_of(base) for base in cls.__mro__}
    of_lightning = {base.__name__ for base in cls.__mro__ if package_of(base) in LIGHTNING}
    if "Callback" in of_lightning:
        return "ProgressBar" not in of_lightning and "lightning_ckmerge" not in packages
    return package_of(cls) not in OPAQUE_PACKAGES and packages.isdisjoint(OPAQUE_PACKAGES - OPEN_TO_HEIRS)


def has_workers(value: Any) -> bool:
    """Whether an object holds threads, or others that work for it, and may change it at any time."""
    held = (attributes_of(value) or {}).values()
    return any(
        issubclass(type(item), (Executor, Pool)) or (issubclass(type(item), threading.Thread) and item.is_alive())
        for item in held
    )


def held_by_other_threads() -> list[Any]:
    """Return what threads beside this one work on: themselves, what they call, its arguments and what it closes over.

    The main thread is left out: where it is another one, it waits for this one.
    """
    held: list[Any] = []
    for thread in {*threading.enumerate()} - {threading.main_thread(), threading.current_thread()}:
        own = vars(thread)
        target = own.get("_target")
        held += [thread, *own.values(), *(own.get("_args") or ()), *(own.get("_kwargs") or {}).values()]
        while type(target) is partial:
            held += [*target.args, *target.keywords.values()]
            target = target.func
        if type(target) is MethodType:
            held.append(target.__self__)
            target = target.__func__
        if type(target) is FunctionType:
            held += [c.cell_contents for c in target.__closure__ or () if c != CellType()]
    return held


def package_of(thing: Any) -> str:
    """Return the name of the package that a class or function is from."""
    return str(thing.__module__).partition(".")[0]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return an object's own ``__dict__``, past its ``__getattr__``; ``None`` if it has none."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except Exception:  # a property of the user's own stands in its place
        return None
    return own if type(own) is dict else None


def slots_of(cls: type) -> Iterator[tuple[str, MemberDescriptorType]]:
    """Return the slots of a class's instances, whatever its ``__slots__`` says."""
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            yield from ((n, d) for n, d in vars(base).items() if type(d) is MemberDescriptorType)


def named_globals(cls: type) -> Iterator[tuple[str, Any]]:
    """Return the globals that the functions of a class, and of its own bases, name."""
    for base in cls.__mro__:
        for function in vars(base).values() if _is_somebodys(base) else ():
            function = getattr(function, "__func__", getattr(function, "fget", function))
            if type(function) is not FunctionType:
                continue
            codes = [function.__code__]
            for code in codes:  # which grows
                codes += [c for c in code.co_consts if type(c) is CodeType]
                found = function.__globals__
                yield from ((f"{function.__module__}.{n}", found[n]) for n in code.co_names if n in found)


def script_attributes(module: Any) -> list[str]:
    """Return the names of what a scripted module holds beside parameters and submodules; a traced one has none."""
    concrete = getattr(module, "_concrete_type", None)
    return [] if concrete is None else list(concrete.get_attributes())


def named_modules(module: nn.Module, where: str) -> Iterator[tuple[str, nn.Module]]:
    """Return a module and all below it, each once, past methods of their own."""
    seen: set[int] = set()
    stack = [(where, module)]
    while stack:
        path, current = stack.pop()
        if id(current) in seen or not issubclass(type(current), nn.Module):
            continue
        seen.add(id(current))
        yield path, current
        own = attributes_of(current) or {}
        children: Any = current._modules if is_script(current) else own.get("_modules") or {}
        if "_actual_script_module" in own:  # a traced module's, which takes attributes in its place
            stack.append((path, own["_actual_script_module"]))
        stack += [(f"{path}.{name}", child) for name, child in children.items()]
