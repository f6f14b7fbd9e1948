"""What ``SavedState`` finds, and puts back."""

from __future__ import annotations

import codecs
import configparser
import contextlib
import decimal
import hashlib
import io
import itertools
import multiprocessing
import os
import queue
import random
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.errors import FinalError
from lightning_ckmerge.plugin.restore import run_state, saved_state
from lightning_ckmerge.plugin.restore.kept import Setting
from lightning_ckmerge.plugin.restore.run_state import Gradients, run_weights
from lightning_ckmerge.plugin.restore.saved_state import Allowance, SavedState


@dataclass(slots=True)
class Slotted:
    value: Any


@dataclass(frozen=True)
class Frozen:
    items: list[int] = field(default_factory=list)


class Counting:
    """A bound method of it reaches its state."""

    def __init__(self) -> None:
        self.calls = 0
        self.rng = random.Random(1)

    def collate(self, samples: Any) -> Any:
        self.calls += 1
        return self.rng.random()


class Noisy(Dataset[int]):
    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> int:
        return int(self.rng.integers(1000))


class Heir(torch.distributions.Normal):
    """Holds state of its own beside that of a torch class."""

    seen: list[int]


class Number(float):
    """Has an attribute."""

    num: int


GLOBAL = np.random.default_rng(3)


class UsesGlobals:
    """Draws from a generator that is a global of its module."""

    def draw(self) -> float:
        return max([GLOBAL.random() for _ in range(2)])


class Speed(Enum):
    """Its members may have attributes."""

    FAST = "fast"
    num: int


FAST: Any = Speed.FAST


def count_up_record(record: Any) -> int:
    record["n"] += 1
    return int(record["n"])


def count_up_item(items: Any) -> int:
    items[1] += 1
    return int(items[1])


def counter() -> Callable[[], int]:
    state = {"calls": 0}

    def count() -> int:
        state["calls"] += 1
        return state["calls"]

    return count


def draw(generator: torch.Generator) -> Any:
    return torch.rand(3, generator=generator).tolist()


def state_of_loader(make: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    loader = make()
    return loader, lambda: [str(batch) for batch in loader]


def cases() -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Something that holds state, and a function that returns other values each time unless the state is put back."""
    generator, python = torch.Generator().manual_seed(1), random.Random(1)
    numpy, legacy = np.random.default_rng(1), np.random.RandomState(1)
    slotted, counting, count = Slotted(0), Counting(), counter()
    namespace, deep = SimpleNamespace(n=0), {"a": [({"b": deque([Slotted([0])])},)]}
    frozen, tensor, array = Frozen(), torch.zeros(2), np.zeros(2)
    order, tally = OrderedDict(a=1, b=2), Counter("a")

    def reorder() -> list[str]:
        before = list(order)
        order.move_to_end(before[0])
        return before

    def grow(items: Any, add: str = "append") -> int:
        getattr(items, add)(len(items))
        return len(items)

    def count_up(holder: Any, name: str) -> int:
        setattr(holder, name, getattr(holder, name) + 1)
        return int(getattr(holder, name))

    numbers: set[int] = set()
    linear, heir, value = nn.Linear(2, 2), Heir(0.0, 1.0), multiprocessing.Value("d", 0.0)
    linear.calls, heir.seen, FAST.num, number = [0], [0], 0, Number(1.0)  # type: ignore[assignment]
    number.num = 0
    sequence, spawning, bits = np.random.SeedSequence(4), np.random.default_rng(3), np.random.PCG64(9)
    stream, text, switched = io.BytesIO(b"abcdef"), io.StringIO("abcdef"), np.zeros(2)
    context: ContextVar[int] = ContextVar("context", default=0)
    weak = weakref.WeakKeyDictionary({linear: 0})
    rounding, decoder = decimal.Context(prec=9), codecs.getincrementaldecoder("utf-8")("replace")
    options, view = configparser.ConfigParser(), memoryview(bytearray(b"abc"))
    options["a"] = {"n": "0"}
    record = np.zeros(1, dtype=[("n", "i4")])[0]
    rows: list[Any] = [[i, [i], {"a": [i]}] for i in range(1000)]

    def switch() -> bool:
        switched.setflags(write=not switched.flags.writeable)
        return bool(switched.flags.writeable)

    def count_weakly() -> int:
        weak[linear] += 1
        return weak[linear]

    def count_in_options() -> int:
        options["a"]["n"] = str(options.getint("a", "n") + 1)
        return options.getint("a", "n")

    def append(stream: Any, more: Any) -> Any:
        stream.seek(0, 2)
        stream.write(more)
        return stream.getvalue()

    wrapped = ConcatDataset([Subset(Noisy(), [0, 1])])
    return {
        "torch.Generator": (generator, lambda: draw(generator)),
        "random.Random": ([python], python.random),
        "numpy Generator": ({"rng": numpy}, numpy.random),
        "numpy RandomState": ((legacy,), legacy.random_sample),
        "slots": (slotted, lambda: count_up(slotted, "value")),
        "namespace": (namespace, lambda: count_up(namespace, "n")),
        "frozen": (frozen, lambda: grow(frozen.items)),
        "deep": (deep, lambda: grow(deep["a"][0][0]["b"][0].value)),
        "attribute of a torch module": (linear, lambda: grow(getattr(linear, "calls"))),  # noqa: B009
        "heir of a torch class": ([heir], lambda: grow(heir.seen)),
        "heir of a number": ([number], lambda: count_up(number, "num")),
        "member of an Enum": ([FAST], lambda: count_up(FAST, "num")),
        "SeedSequence": ([sequence], lambda: sequence.spawn(1)[0].spawn_key),
        "spawning Generator": ([spawning], lambda: spawning.spawn(1)[0].random()),
        "BitGenerator": ([bits], bits.random_raw),
        "shared number": ([value], lambda: count_up(value, "value")),
        "shared array": ([shared := multiprocessing.RawArray("i", 2)], lambda: count_up_item(shared)),
        "place in a BytesIO": ([stream], lambda: stream.read(1)),
        "contents of a StringIO": ([text], lambda: append(text, "x")),
        "global generator": (UsesGlobals(), lambda: UsesGlobals().draw()),
        "context variable": ([context], lambda: context.set(context.get() + 1) and context.get()),
        "decimal context": ([rounding], lambda: count_up(rounding, "prec")),
        "codec": ([decoder], lambda: decoder.decode(b"\xe2")),
        "options": ([options], count_in_options),
        "memory view": ([view], lambda: count_up_item(view)),
        "structured number": ([record], lambda: count_up_record(record)),
        "flag of an array": ([switched], switch),
        "weak keys": ([weak], count_weakly),
        "list in a long list": (rows, lambda: grow(rows[700][1])),
        "dict in a long list": (rows, lambda: rows[700][2].update({len(rows[700][2]): 1}) or len(rows[700][2])),
        "row of a long list": (rows, lambda: grow(rows)),
        "set": (numbers, lambda: grow(numbers, "add")),
        "key order": (order, reorder),
        "Counter": (tally, lambda: tally.update("a") or tally["a"]),
        "tensor": (tensor, lambda: tensor.add_(1).tolist()),
        "array": (array, lambda: np.add(array, 1, out=array).tolist()),
        "bound method": (counting.collate, lambda: counting.collate(())),
        "partial": (partial(draw, generator), lambda: draw(generator)),
        "closure": (count, count),
        "wrapped dataset": state_of_loader(lambda: DataLoader(wrapped)),
        "collate": state_of_loader(lambda: DataLoader(range(3), collate_fn=Counting().collate)),
        "sampler": state_of_loader(
            lambda: DataLoader(range(9), shuffle=True, generator=torch.Generator().manual_seed(1))
        ),
    }


def remember(value: Any, *, each: int = 1 << 20, weights: Any = ()) -> SavedState:
    memory = SavedState(weights)
    memory.take(value, "it", Allowance(each, 1 << 24))
    memory.take_data({}, Allowance(each, 1 << 24))
    return memory


@pytest.mark.parametrize("name", cases())
def test_state_is_found_and_put_back(name: str) -> None:
    holder, advance = cases()[name]
    memory = remember(holder)
    memory.lend()
    first = advance()
    assert memory.changed()
    assert advance() != first
    for _ in range(2):
        assert not memory.put_back()
        assert not memory.changed()
        memory.lend()
        assert advance() == first


def moved(make: Callable[[], Any], num_steps: int) -> Any:
    """Something to call ``next`` on, after some steps."""
    made = make()
    for _ in range(num_steps):
        next(made)
    return made


ITERATORS: dict[str, Callable[[], Any]] = {
    "range": lambda: iter(range(9)),
    "list": lambda: iter([1, 2, 3, 4, 5, 6]),
    "reversed": lambda: reversed((1, 2, 3, 4, 5, 6)),
    "dict": lambda: iter(dict.fromkeys(range(9))),
    "deque": lambda: iter(deque(range(9))),
    "count": lambda: itertools.count(1.5, 2),
    "cycle": lambda: itertools.cycle("abc"),
    "chain": lambda: itertools.chain([1, 2], range(9)),
    "islice": lambda: itertools.islice(itertools.count(), 1, None, 2),
    "zip": lambda: zip(itertools.count(), itertools.cycle("abcd"), strict=False),
    "enumerate": lambda: enumerate(reversed(range(9))),
    "map": lambda: map(str, itertools.count()),
    "product": lambda: itertools.product("ab", repeat=5),
    "accumulate": lambda: itertools.accumulate(itertools.count(1)),
    "tee": lambda: itertools.tee(range(9))[1],
    "sentinel": lambda: iter(itertools.count().__next__, -1),
}
HOLDERS: dict[str, Callable[[Any], tuple[Any, Callable[[], Any]]]] = {
    "attribute": lambda it: (space := SimpleNamespace(it=it), lambda: next(space.it)),
    "list item": lambda it: (held := [it], lambda: next(held[0])),
    "dict value": lambda it: (held := {"a": it}, lambda: next(held["a"])),
    "tuple": lambda it: (held := [(1, it)], lambda: next(held[0][1])),
    "slot": lambda it: (held := Slotted(it), lambda: next(held.value)),
    "closure": lambda it: (function := lambda: next(it), function),
    "partial": lambda it: (held := [partial(next, it)], lambda: held[0]()),
    "method": lambda it: (held := [it.__next__], lambda: held[0]()),
    "two": lambda it: (held := [it, [it]], lambda: (next(held[0]), next(held[1][0]))),
    "default": lambda it: (held := defaultdict(it.__next__), lambda: [held[len(held)] for _ in range(2)]),
}


@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize("name", [*ITERATORS, *HOLDERS])
def test_an_iterator_is_where_it_was(name: str, num_steps: int) -> None:
    """Goes red if calling ``next`` in a search, once or past the end of a first round, moves the run's own iterator."""
    kind, holder = (name, "attribute") if name in ITERATORS else ("count", name)
    expected = [next(it) for it in [moved(ITERATORS[kind], num_steps)] for _ in range(2)]
    value, advance = HOLDERS[holder](moved(ITERATORS[kind], num_steps))
    memory = remember(value)
    for num_calls in (1, 2, 4):
        memory.lend()
        with contextlib.suppress(StopIteration):
            for _ in range(num_calls):
                advance()
        assert not memory.put_back()
        assert not memory.changed()
    assert advance() in (expected[0], tuple(expected), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (i for i in range(9)),
        lambda: map(str, (i for i in range(9))),
        lambda: iter(DataLoader(range(9))),
        lambda: itertools.cycle(DataLoader(range(9))),
    ],
)
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_what_cannot_be_moved_back_is_named(make: Callable[[], Any], num_steps: int) -> None:
    holder = SimpleNamespace(stream=moved(make, num_steps))
    memory = remember(holder)
    memory.lend()
    assert not memory.put_back()
    assert not memory.changed()
    memory.lend()
    next(holder.stream)
    memory.put_back()
    assert any(where.startswith("it.stream") for where in memory.changed())


def test_a_hash_that_has_been_updated_is_named() -> None:
    digest = hashlib.sha256()
    memory = remember([digest])
    digest.update(b"x")
    memory.put_back()
    assert memory.changed() == ["it[0]"]


def test_a_generator_of_the_operating_system_is_left_alone() -> None:
    memory = remember([random.SystemRandom()])
    assert not memory.put_back()
    assert not memory.changed()


@pytest.mark.parametrize("kind", [pl.Trainer, RichProgressBar, CheckpointMergeCallback])
def test_what_has_moved_on_for_good_reason_is_not_looked_into(kind: Any) -> None:
    """Goes red if a Trainer, what shows a search, or what searches is put back."""
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"} if kind is pl.Trainer else {}
    module = pl.LightningModule()
    module.friend = friend = type("Own", (kind,), {})(**options)
    memory = remember(module)
    friend.note = "new"
    memory.put_back()
    assert friend.note == "new"


def test_a_callback_is_looked_into() -> None:
    """The user's own, and Lightning's, but not those whose threads may change them."""
    own, threaded, stopping = type("Own", (pl.Callback,), {})(), pl.Callback(), EarlyStopping("val_loss")
    with ThreadPoolExecutor(1) as threaded.pool:
        memory = remember([own, threaded, stopping])
        own.note = threaded.note = "new"
        stopping.wait_count += 1
        stopping.best_score.mul_(2)
        assert not memory.put_back()
        assert (hasattr(own, "note"), threaded.note, stopping.wait_count) == (False, "new", 0)
        assert not memory.changed()
        assert "it[1]" in memory.left_out


class Prefetcher:
    """Has a thread that fills what the run reads from."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.queue: queue.Queue[int] = queue.Queue()
        self.end = threading.Event()

    def wait(self) -> None:
        self.end.wait()


@pytest.mark.parametrize("how", ["method", "argument", "closure", "partial", "subclass"])
def test_the_work_of_another_thread_is_not_taken_back(how: str) -> None:
    """Goes red if batches that a thread has fetched in a search are lost, or count as a trace of it."""
    held = Prefetcher()
    other = Prefetcher()  # in no thread's hands, but its queue is for threads
    module = nn.Module()
    module.seen, module.generator = [], torch.Generator()

    class Owner(threading.Thread):
        owned = held

        def run(self) -> None:
            held.end.wait()

    def close_over() -> None:
        held.end.wait()
        assert module is not None

    owner = Owner()
    vars(owner)["owned"] = held
    thread = {
        "method": threading.Thread(target=held.wait),
        "argument": threading.Thread(target=lambda it: it.end.wait(), args=(held,)),
        "closure": threading.Thread(target=close_over),
        "partial": threading.Thread(target=partial(Prefetcher.wait, held)),
        "subclass": owner,
    }[how]
    thread.start()
    try:
        memory = remember([held, other, module])
        held.items.append(1)
        held.queue.put(2)
        other.queue.put(3)
        other.items.append(4)
        if how == "closure":
            module.seen.append(5)
        torch.rand(1, generator=module.generator)
        assert memory.changed()  # what no thread works on
        assert not memory.put_back()
        assert not memory.changed()
        assert (held.items, held.queue.qsize(), other.queue.qsize(), other.items) == ([1], 1, 1, [])
        assert module.seen == ([5] if how == "closure" else [])
        assert "it[0]" in memory.left_out
    finally:
        held.end.set()
        thread.join()


def test_an_empty_tuple_is_in_no_threads_hands() -> None:
    """It is one object for everybody, threads without arguments included."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=())
    thread.start()
    try:
        holder = nn.Module()
        holder.held = ()
        assert remember([holder, SimpleNamespace(held=())]).left_out == {}
    finally:
        end.set()
        thread.join()


def test_a_datamodule_is_looked_into() -> None:
    datamodule = pl.LightningDataModule()
    memory = remember(datamodule)
    datamodule.note = "new"
    memory.put_back()
    assert not hasattr(datamodule, "note")


def test_parameters_are_left_to_the_search() -> None:
    """Goes red if a list of parameters undoes the merge that is about to be scored, or if a trace in them is missed."""
    module = nn.Module()
    module.layer = nn.Linear(2, 2)
    module.aliases = [list(module.layer.parameters())]
    memory = remember(module, weights=run_weights(module))
    with torch.no_grad():
        module.layer.weight.fill_(7)
    memory.put_back()
    assert (module.layer.weight == 7).all()
    assert memory.changed() == ["it.layer.weight"]


LIVING = Counting()


def misbehaving() -> dict[str, Any]:
    """Objects whose own methods must not be called, and tensors that not every operator takes."""

    def raising(*_: Any, **__: Any) -> Any:
        raise KeyError("of the user's own")

    names = ("__eq__", "__len__", "__iter__", "__getattr__", "__setattr__", "__deepcopy__", "__bool__", "__contains__")
    body = dict.fromkeys(names, raising) | {"__hash__": object.__hash__}

    class FrozenDict(dict[str, Any]):
        __setitem__ = __delitem__ = clear = update = raising

    class Proxy:
        __slots__ = ("target",)

        @property
        def __class__(self) -> Any:
            raise KeyError("not loaded")

        @property
        def __dict__(self) -> Any:
            raise KeyError("not loaded")

    odd = type("Odd", (), {**body, "size": property(raising), "__slots__": iter(("a", "__dict__"))})()
    return {
        "object": odd,
        "list": type("OddList", (list,), body)([1]),
        "dict": FrozenDict(a=1),
        "proxy": Proxy(),
        "weak proxy": weakref.proxy(LIVING),
        "sparse": torch.eye(3).to_sparse(),
        "compressed": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested, strided": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "read-only": np.broadcast_to(np.zeros(1), (3,)),
        "structured": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
        "lazy": nn.LazyLinear(2).weight,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", misbehaving())
def test_an_object_that_misbehaves_costs_nothing_else(name: str) -> None:
    """Goes red if it raises where it is looked at, counts as changed, or keeps others from being put back."""
    count = Counting()
    memory = remember({"before": [count], "odd": misbehaving()[name], "after": count.rng})
    first = count.collate(())
    assert not memory.put_back()
    assert not memory.changed()
    assert count.collate(()) == first


def test_a_module_of_odd_buffers_is_looked_into() -> None:
    """Goes red if one buffer whose bytes cannot be counted costs the whole module."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

    module = nn.Sequential(nn.Linear(2, 2), Owner())
    for name, odd in misbehaving().items():
        if issubclass(type(odd), torch.Tensor):
            module[1].register_buffer(f"odd_{name.replace(' ', '_')}", odd)
    memory = remember(module)
    assert "it" not in memory.left_out
    assert "it.1" not in memory.left_out
    module[1].seen.append(1)
    module[0].register_forward_hook(print)
    assert not memory.put_back()
    assert module[1].seen == []
    assert not module[0]._forward_hooks


def test_what_fails_to_be_put_back_keeps_nothing_else_from_it() -> None:
    """Goes red if the first failure ends the restoration."""
    raw, numbers = bytearray(2), [1]
    memory = remember([raw, numbers])
    raw += b"x"
    numbers.append(2)
    with memoryview(raw):  # it cannot shrink
        assert [*memory.put_back()] == ["it[0]"]
        assert memory.changed() == ["it[0]"]
    assert numbers == [1]


CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "other memory": (lambda: torch.zeros(3), lambda t: setattr(t, "data", torch.ones(5))),
    "resized": (lambda: torch.zeros(3), lambda t: t.resize_(9).fill_(1)),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda t: t.add_(torch.ones(3, 3).to_sparse())),
    "sparse, in place": (lambda: torch.eye(3).to_sparse().coalesce(), lambda t: t.values().mul_(2)),
    "not a number": (lambda: torch.tensor([float("nan"), -0.0]), lambda t: t.zero_()),
    "attribute": (lambda: nn.Parameter(torch.zeros(2)), lambda t: setattr(t, "mark", 1)),
    "bfloat16": (lambda: torch.zeros(3, dtype=torch.bfloat16), lambda t: t.add_(1)),
    "array resized": (lambda: np.zeros(3), lambda a: a.resize(9, refcheck=False)),
    "objects": (lambda: np.array([[1], None], dtype=object), lambda a: a[0].append(2)),
    "masked": (lambda: np.ma.masked_array([1.0, 2.0], [True, False]), lambda a: a.mask.fill(True)),
    "large": (lambda: torch.zeros(1 << 19), lambda t: t[7].fill_(1)),
    "large, permuted": (lambda: torch.arange(1 << 19), lambda t: t.copy_(t.flip(0))),
    "large array": (lambda: np.arange(1 << 19), lambda a: np.random.default_rng(1).shuffle(a)),
    "large bytes": (lambda: bytearray(1 << 21), lambda b: b.__setitem__(7, 1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_put_back_or_named(name: str) -> None:
    make, change = CHANGES[name]
    holder = make()
    memory = remember(holder)
    change(holder)
    assert memory.changed()
    assert not memory.put_back()
    assert bool(memory.changed()) == ("large" in name)


def test_a_bytearray_that_is_watched_can_still_grow() -> None:
    raw = bytearray(1 << 21)
    memory = remember(raw)
    raw += b"x"
    assert memory.changed()


class Scripted(nn.Module):
    """Holds state of every kind that TorchScript has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.lin = nn.Linear(2, 2)
        self.memory = torch.zeros(2)
        self.calls: list[int] = [1]
        self.num = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1.0)
        self.memory = self.memory + 1
        self.calls.append(len(self.calls))
        self.num += 1
        return self.lin(x) * self.count * self.memory.sum() * self.num * len(self.calls)


class Traced(nn.Module):
    """Counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x)
        return y


def script(kind: str) -> Any:
    return torch.jit.script(Scripted()) if kind == "scripted" else torch.jit.trace(Traced(), torch.eye(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_the_state_of_a_module_of_torchscript_is_put_back(kind: str) -> None:
    """Goes red if something of a dict is asked of its parameters and buffers, or if its own state is passed by."""
    owner = nn.Module()
    owner.inner = module = script(kind)
    memory = remember(owner, weights=run_weights(owner))
    assert not memory.left_out
    outputs, states = [], []
    for _ in range(2):
        outputs.append([module(torch.eye(2)).tolist() for _ in range(2)])
        module.extra = 1
        assert memory.changed()
        assert not memory.put_back()
        assert not memory.changed()
        states.append({name: t.tolist() for name, t in module.state_dict().items()})
    assert outputs[0] == outputs[1]
    assert states[0] == states[1]
    assert not hasattr(module, "extra")


def test_a_set_keeps_its_order_or_is_named() -> None:
    """Goes red if a set that is emptied and filled again goes over its elements in another order, unsaid."""
    few = {i * 8 for i in range(40)}
    for i in range(30):
        few.discard(i * 8)
    sparse = set(range(3000)) - set()
    for i in range(3000):
        if i % 333:
            sparse.discard(i)
    orders = list(few), list(sparse)
    memory = remember([few, sparse])
    for numbers in (few, sparse):
        numbers.add(7)
        numbers.discard(max(numbers))
    memory.put_back()
    assert (set(few), set(sparse)) == tuple(map(set, orders))
    assert list(few) == orders[0]
    assert (list(sparse) == orders[1]) == ("it[1]" not in memory.changed())


@pytest.mark.parametrize("name", ["attribute", "tuple", "closure", "method"])
def test_a_set_keeps_its_order_whatever_its_elements_hash_to(name: str) -> None:
    """Goes red if a search works on the set itself: filled again, most sets of words are in another order."""
    random_ = random.Random(1)
    for num in [1, 2, 3, 4, 5, 8, 13, 30] * 5:
        words = {str(random_.random()) for _ in range(num)}
        holder, add = {
            "attribute": lambda words: (space := SimpleNamespace(it=words), lambda word: space.it.add(word)),
            "tuple": lambda words: (held := [(1, words)], lambda word: held[0][1].add(word)),
            "closure": lambda words: (function := lambda word: words.add(word), function),
            "method": lambda words: (held := [words.add], lambda word: held[0](word)),
        }[name](words)
        order = list(words)
        memory = remember(holder)
        for _ in range(3):
            memory.lend()
            for _ in range(40):
                add(str(random_.random()))
            assert not memory.put_back()
            assert not memory.changed()
            assert list(words) == order


def deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_counted_from_the_nearest_place() -> None:
    """Goes red if what is met far away first is not looked into where it is near; and if a cut is not named."""
    near, far = SimpleNamespace(items=[0]), SimpleNamespace(items=[0])
    memory = remember(SimpleNamespace(a=deep(near, 11), b=near, c=deep(far, 13)))
    near.items[0] += 1
    assert memory.changed() == ["it.b.items"]
    assert not memory.put_back()
    assert near.items == [0]
    assert len(memory.left_out) == 1
    (cut,) = memory.left_out
    assert cut.startswith("it.c[0][0]")


def test_data_cannot_crowd_out_the_runs_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if data count against the number of objects that the run's own state may have, or if a cut is silent."""
    monkeypatch.setattr(saved_state, "MAX_OBJECTS", 100)
    allowance = Allowance(1 << 20)
    data, own = [Slotted([i]) for i in range(200)], [[i] for i in range(90)]
    memory = SavedState(data=[data])
    memory.take({"data": data, "own": own}, "it", allowance)
    memory.take_data({"data": data}, allowance)
    own[-1].append(1)
    data[0].value = []
    assert memory.changed() == ["it[own][89]", "data[0].value"]
    (reason,) = memory.left_out.values()
    assert "100 objects" in reason
    memory = SavedState()
    memory.take(data, "it", allowance)
    with pytest.raises(FinalError, match=r"no more than 100 objects .* such as it\["):
        memory.take_data({}, allowance)


def test_what_lies_in_a_long_list_costs_little() -> None:
    """Goes red if each of many small lists is looked at on its own: then there are as many things to compare."""
    memory = remember([[[i], [i], (i, [i])] for i in range(3000)])
    assert len(memory.kept) < 10


@pytest.mark.parametrize("is_module", [True, False])
def test_a_number_beside_workers_is_watched(is_module: bool) -> None:
    """Goes red if a curriculum's level on a dataset that holds a pool changes in a search, and nobody hears of it."""
    holder = nn.Module() if is_module else Noisy()
    vars(holder)["level"] = 1.0
    with ThreadPoolExecutor(1) as pool:
        vars(holder)["pool"] = pool
        memory = remember(holder)
        assert not memory.changed()
        vars(holder)["level"] = 1.1
        memory.put_back()
        assert memory.changed() == ["it.level"]


def test_gradients_of_all_that_is_trained_are_laid_aside() -> None:
    """Goes red if a tensor of an optimizer that no module has registered keeps a validation's gradient."""
    module, prompt, critic = nn.Linear(1, 1), torch.ones(1, requires_grad=True), [nn.Linear(1, 1)]
    optimizer = torch.optim.SGD([*module.parameters(), prompt, *critic[0].parameters()], lr=0.1)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for p in trained:
        p.grad = torch.ones_like(p)
    own = [p.grad for p in trained]
    gradients = Gradients(module, [optimizer])
    assert all(p.grad is None for p in trained)
    (module(prompt) * critic[0](prompt)).sum().backward()
    gradients.put_back()
    assert [id(p.grad) for p in trained] == [id(g) for g in own]
    assert all(bool((g == 1).all()) for g in own if g is not None)


SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Any]] = {
    "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    "mkldnn": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "anomaly": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, True),
    "decimal": (lambda: decimal.getcontext().prec, lambda n: setattr(decimal.getcontext(), "prec", n), 7),
    "environment": (
        lambda: os.environ.get("CKMERGE_LEVEL"),
        lambda level: os.environ.update(CKMERGE_LEVEL=level) if level else os.environ.pop("CKMERGE_LEVEL", None),
        "1",
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_of_the_process_is_put_back(name: str) -> None:
    read, write, other = SWITCHES[name]
    before = read()
    settings = [Setting(where, *functions) for where, functions in run_state.SWITCHES.items()]
    try:
        write(other)
        assert len([s for s in settings if s.has_changed()]) == 1
        for setting in settings:
            setting.put_back()
        assert read() == before
    finally:
        write(before)


def test_what_every_thread_has_is_nobodys() -> None:
    """Goes red if an empty tuple, of which a process has one, counts as a thread's: it is its `_args`."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert remember(SimpleNamespace(args=(), numbers=(1, 2))).left_out == {}
    finally:
        end.set()
        thread.join()
