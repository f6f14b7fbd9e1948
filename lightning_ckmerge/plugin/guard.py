"""Remember everything that an evaluation can change, and put it back, bit for bit and object for object.

Weights are not among it: the search keeps them as its latest snapshot. Random state is; buffers, modes, attributes of
the user's own objects, metric states, and what loaders, datasets and collate functions hold in this process are.

Out of reach, because nobody can take it back or nobody can find it:

- what the user's code writes itself: files, sockets, a tracker's own client;
- globals, class attributes, memory of C extensions, iterators and open files, and objects nested ``MAX_DEPTH`` deep;
- the state of other callbacks, where the module's own hooks change it (the callbacks' hooks are muted);
- wall time: ``Trainer(max_time=...)`` and other limits by the clock count a search, since an allocation does so too.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ckmerge.plugin.randomness import (
    GENERATORS,
    generator_state,
    random_state,
    set_generator_state,
    set_random_state,
)

# A clone of more than this would cost more than it protects: larger tensors outside the weights are data, not state.
MAX_CLONED_BYTES = 64 << 20
# In a dataset nearly all tensors are data.
MAX_CLONED_DATA_BYTES = 4 << 10
MAX_CONTAINER_LENGTH = 10_000
MAX_DEPTH = 12
# Objects of these packages are not looked into: they hold threads, files, or the run itself.
OPAQUE_PACKAGES = {"torch", "lightning", "pytorch_lightning", "lightning_ckmerge", "optuna", "numpy"}
OPAQUE_PACKAGES |= {"aim", "clearml", "comet_ml", "mlflow", "neptune", "tensorboard", "tensorboardX", "wandb"}
# What torch and Lightning keep in a module's ``__dict__``; weights, buffers and submodules are treated by name.
MODULE_INTERNALS = set(vars(nn.Module())) - {"training"}


class Memory:
    """Objects as they are now. ``restore`` may be called any number of times.

    Args:
        max_bytes: Larger tensors and arrays are data, which nobody changes in place.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}
        self.generators: list[Any] = []

    def restore(self) -> None:
        """Put every remembered object back as it was, keeping its identity."""
        for undo in self._undo:
            undo()

    def take(self, value: Any, depth: int = 0) -> None:
        """Remember ``value`` and what it holds, as far as it is state and not code, data or machinery."""
        if id(value) in self._seen or depth > MAX_DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Parameter):
            return
        if isinstance(value, Tensor):
            self._take_tensor(value)
        elif isinstance(value, np.ndarray):
            self._take_array(value)
        elif isinstance(value, GENERATORS):
            self._take_generator(value)
        elif isinstance(value, (list, deque, dict, set)):
            self._take_container(value, depth)
        elif isinstance(value, nn.Module):
            for submodule in value.modules():
                if submodule is value or id(submodule) not in self._seen:
                    self._seen[id(submodule)] = submodule
                    self._take_module(submodule)
        elif _is_plain_object(value):
            if hasattr(value, "__dict__"):
                self.take(vars(value), depth)
            self._take_slots(value, depth)
        else:
            for part in _parts(value):
                self.take(part, depth + 1)

    def _take_module(self, module: nn.Module) -> None:
        """Mode, buffers and own attributes. Parameters and gradients are left out: no evaluation changes them."""
        for buffer in module._buffers.values():
            if buffer is not None:
                self._take_tensor(buffer, always=True)
        buffers = dict(module._buffers)
        self._undo.append(partial(_reset_dict, module._buffers, buffers))
        own = vars(module)
        saved = {k: v for k, v in own.items() if k not in MODULE_INTERNALS}
        self._undo.append(partial(_reset_dict, own, saved, MODULE_INTERNALS))
        if not type(module).__module__.startswith("torch."):
            for value in saved.values():
                self.take(value, 1)

    def _take_tensor(self, tensor: Tensor, *, always: bool = False) -> None:
        if not tensor.requires_grad:
            self._undo.append(partial(_forget_graph, tensor))
        if always or tensor.numel() * tensor.element_size() <= self._max_bytes:
            saved = tensor.detach().clone()

            def undo() -> None:
                # A resize in place cannot be undone. Equal tensors are left alone: autograd counts every write.
                if tensor.shape == saved.shape and not torch.equal(tensor, saved):
                    tensor.detach().copy_(saved)

            self._undo.append(undo)

    def _take_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.nbytes <= self._max_bytes and array.flags.writeable:
            self._undo.append(partial(np.copyto, array, array.copy()))

    def _take_generator(self, value: Any) -> None:
        self.generators.append(value)
        self._undo.append(partial(set_generator_state, value, generator_state(value)))

    def _take_container(self, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._undo.append(partial(_reset_dict, value, dict(value)))
        else:
            self._undo.append(partial(_refill, value, list(value)))
        items = value.values() if isinstance(value, dict) else list(value)
        if len(value) <= MAX_CONTAINER_LENGTH:
            for item in items:
                self.take(item, depth + 1)

    def _take_slots(self, value: Any, depth: int) -> None:
        names = [n for cls in type(value).__mro__ for n in _slots(cls) if hasattr(value, n)]
        for name in names:
            item = getattr(value, name)
            # Past a frozen class's own `__setattr__`.
            self._undo.append(partial(object.__setattr__, value, name, item))
            self.take(item, depth + 1)


class Guard:
    """The state around the weights, as it was when the search began.

    Args:
        module: The LightningModule.
        wrapper: What the strategy trains: the module itself, or DDP around it.
        others: Loaders with their datasets, and the datamodule.
    """

    def __init__(self, module: nn.Module, wrapper: nn.Module, others: Iterable[Any] = ()) -> None:
        self._metrics = [m for m in module.modules() if isinstance(m, torchmetrics.Metric)]
        self._random = random_state()
        self._memory = Memory(MAX_CLONED_BYTES)
        self._memory.take(module)
        self._data = Memory(MAX_CLONED_DATA_BYTES)
        self.watch(others)
        self._requires_grad = [(p, p.requires_grad) for p in module.parameters()]
        # A forward pass without gradients tells DDP to skip the next broadcast of buffers.
        flags = ("require_forward_param_sync", "require_backward_grad_sync")
        self._ddp = {f: getattr(wrapper, f) for f in flags} if isinstance(wrapper, DistributedDataParallel) else {}
        self._wrapper = wrapper

    def watch(self, others: Iterable[Any]) -> None:
        """Remember more objects, as they are now."""
        for other in others:
            self._data.take(other)

    def random_state(self) -> Any:
        """Return the state of all that draws random numbers, as it is now."""
        return random_state(self._generators)

    def set_random_state(self, state: Any) -> None:
        """Put such a state back."""
        set_random_state(state, self._generators)

    @property
    def _generators(self) -> list[Any]:
        return [*self._memory.generators, *self._data.generators]

    def begin(self) -> None:
        """Start an evaluation where every other one starts, so that its value depends on the weights alone."""
        self.restore()
        for metric in self._metrics:
            metric.reset()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self._memory.restore()
        self._data.restore()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        for flag, value in self._ddp.items():
            setattr(self._wrapper, flag, value)
        set_random_state(self._random)


def _parts(value: Any) -> Iterable[Any]:
    """What state an object of torch or Python hands out in this process; nothing for most."""
    if isinstance(value, DataLoader):
        return [vars(value)]
    if isinstance(value, (tuple, frozenset)):
        return value
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        return list(_closed_over(value))
    return ()


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield cell.cell_contents


def _is_plain_object(value: Any) -> bool:
    """An instance of somebody's own class, or a dataset or sampler: no code, and of no package that is opaque to us."""
    if isinstance(value, (Dataset, Sampler, SimpleNamespace)):
        return True
    cls = type(value)
    if isinstance(value, type) or inspect.isroutine(value) or _package(cls) in sys.stdlib_module_names - {"__main__"}:
        return False
    if not hasattr(value, "__dict__") and not any(map(_slots, cls.__mro__)):
        return False
    # A Trainer or callback of the user's own is the run itself; a datamodule, which hands out loaders, is not.
    return hasattr(value, "val_dataloader") or not any(_package(base) in OPAQUE_PACKAGES for base in cls.__mro__)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))


def _reset_dict(target: dict[Any, Any], saved: dict[Any, Any], keep: Iterable[Any] = ()) -> None:
    keep = {*keep}
    if [k for k in target if k not in keep] != list(saved):  # the order counts as well
        for key in target.keys() - keep:
            del target[key]
    for key, value in saved.items():  # `Counter.update` would add
        target[key] = value


def _forget_graph(tensor: Tensor) -> None:
    """Validation steps that are written for `no_grad` may have updated it in place while gradients were wanted."""
    if tensor.requires_grad:
        tensor.detach_()


def _refill(target: list[Any] | deque[Any] | set[Any], saved: list[Any]) -> None:
    if isinstance(target, set):
        if target != set(saved):
            target.clear()
            target.update(saved)
    else:
        target.clear()
        target.extend(saved)
