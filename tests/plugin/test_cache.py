"""Batches that a search keeps: fetched once, and no value changes."""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ckmerge import EvaluationConfig
from lightning_ckmerge.plugin.evaluate.batch_cache import BatchCache
from lightning_ckmerge.plugin.restore.randomness import is_same_state, random_state, set_random_state
from tests.plugin.test_bitwise import LOADERS, val
from tests.support.bitwise import Case, fit, merges_dir
from tests.support.models import NUM_VAL, Classifier, Points, points_loader
from tests.support.trainers import make_merge, manifests

LARGE = 1 << 30
ONCE = {"every_n_train_steps": 5}


class Mutating(Classifier):
    """Changes its batches in place, and draws random numbers in between."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        x.mul_(1 + torch.rand(()))
        super().validation_step((x, y), batch_idx, dataloader_idx)
        x.zero_()
        y.zero_()
        batch.clear()


class Hooked(Mutating):
    """So does its hook, before batches move to the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].add_(0.5)
        return batch


CASES: dict[str, dict[str, Any]] = {
    **{n: LOADERS[n] for n in ("workers, random", "random", "own random", "iterable", "iterable, workers", "several")},
    **{n: LOADERS[n] for n in ("shuffled, global generator", "several in one batch", "random collate object")},
    "changed in place": {"model": Mutating, "val": val(shuffle=True)},
    "changed by a hook, several": {
        "model": Hooked,
        "val": lambda: [points_loader(train=False, shuffle=True), points_loader(train=False, num_workers=1)],
        "merge": {"monitor": "val_loss/dataloader_idx_1"},
    },
    "no mean over batches": {"val": val(), "merge": {"monitor": "val_hard"}},
}


def searched(case: Case, root: Path, **evaluation: Any) -> list[Any]:
    """What a run's searches measured."""
    config = EvaluationConfig(staged=False, **evaluation)
    run = fit(case, root, [make_merge(**{**case.merge, **ONCE}, evaluation=config)])
    keys = ("anchors", "trials", "coefficients", "verdict", "evaluation")
    return [{k: m[k] for k in keys} for m in manifests(merges_dir(run))]


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_batches_fetched_anew(name: str, tmp_path: Path) -> None:
    """Goes red if batches are handed out themselves, or if random numbers that fetching draws are left out."""
    case = Case(**{**CASES[name], "trainer": {**CASES[name].get("trainer", {}), "max_epochs": 1}})
    kept = searched(case, tmp_path / "kept")
    assert kept == searched(case, tmp_path / "anew", cache_batches=0)
    assert kept


class Counted(Points):
    """Counts on the class, which the guard around a search does not put back."""

    num_reads = 0

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        Counted.num_reads += 1
        return super().__getitem__(i)


def num_reads(root: Path, train: bool = False, **evaluation: Any) -> int:
    """How many samples one search reads."""
    Counted.num_reads = 0
    loaders: dict[bool, Callable[[], DataLoader[Any]]] = {
        is_train: lambda is_train=is_train: DataLoader(  # type: ignore[misc]
            (Counted if is_train == train else Points)(NUM_VAL, 1), batch_size=4
        )
        for is_train in (True, False)
    }
    options = {"max_steps": 6, "max_epochs": -1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 9}
    assert len(searched(Case(train=loaders[True], val=loaders[False], trainer=options), root, **evaluation)) == 1
    return Counted.num_reads


def test_each_half_is_fetched_once(tmp_path: Path) -> None:
    assert num_reads(tmp_path / "kept") == NUM_VAL
    assert num_reads(tmp_path / "anew", cache_batches=0) > 3 * NUM_VAL


def test_beyond_the_budget_none_are_kept(tmp_path: Path) -> None:
    small = num_reads(tmp_path / "small", cache_batches="300B")
    assert small == num_reads(tmp_path / "anew", cache_batches=0)


def test_training_batches_for_statistics_are_kept_as_well(tmp_path: Path) -> None:
    """4 batches of 4, beside the training steps' own."""
    trained = num_reads(tmp_path / "none", train=True)
    assert num_reads(tmp_path / "kept", train=True, recalibrate_batches=4) == trained + 16
    assert num_reads(tmp_path / "anew", train=True, recalibrate_batches=4, cache_batches=0) > trained + 4 * 16


class Process:
    """The random state of this process."""

    random_state = staticmethod(random_state)
    set_random_state = staticmethod(set_random_state)


class Loader:
    """Batches of any kind, counted when they are begun."""

    def __init__(self, *batches: Any, draw: Callable[[], object] = lambda: None) -> None:
        self.batches = batches
        self.draw = draw
        self.num_begun = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_begun += 1
        torch.rand(())  # as a DataLoader does
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        for batch in self.batches:
            self.draw()
            yield batch


def passes(loader: Loader, num: int = 3, max_bytes: int = LARGE, between: Callable[[], object] = lambda: None) -> Any:
    """Read a loader several times, each time from the same random state."""
    cache = BatchCache(max_bytes, Process())
    start = random_state()
    results = []
    for _ in range(num):
        set_random_state(start)
        between()
        (part,) = cache.wrap("search", [loader])
        results.append((list(part), random_state()))
    return results


Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: Tensor
    name: str = "a"


ONE = torch.arange(4.0)
BATCHES = {
    "tensor": ONE,
    "pair": (ONE, torch.tensor(1)),
    "named": Pair(ONE, [ONE, "text", None, 3]),
    "dict": {"x": ONE, "y": OrderedDict(z=np.arange(3))},
    "mapping object": UserDict(input_ids=ONE),
    "dataclass": Record(ONE),
}


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (UserDict, Record)):
        return tensors_of(vars(value))
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in tensors_of(item)]


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_usual_kind_are_copied(kind: str) -> None:
    loader = Loader(BATCHES[kind], BATCHES[kind])
    (first, state), (second, state_2), (third, _) = passes(loader)
    assert loader.num_begun == 1
    assert is_same_state(state, state_2)
    for batch, other in zip(second, third, strict=True):
        assert type(batch) is type(other) is type(first[0])
        for a, b in zip(tensors_of(batch), tensors_of(other), strict=True):
            assert torch.equal(a, ONE) or a.dim() == 0
            assert a.data_ptr() != b.data_ptr()


def test_what_is_one_tensor_stays_one() -> None:
    shared = torch.zeros(2)
    _, ([(x, y)], _), _ = passes(Loader((shared, shared)))
    assert x is y
    assert x is not shared


@pytest.mark.parametrize(
    "odd", [threading.Lock(), object(), torch.eye(2).to_sparse(), iter([1])], ids=lambda o: type(o).__name__
)
def test_what_may_be_more_than_its_values_is_fetched_anew(odd: Any) -> None:
    loader = Loader({"x": ONE, "odd": odd})
    assert [batches[0]["odd"] for batches, _ in passes(loader)] == [odd] * 3
    assert loader.num_begun == 3


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), np.random.rand, __import__("random").random])
def test_batches_that_draw_random_numbers_here_are_fetched_anew(draw: Callable[[], object]) -> None:
    loader = Loader(ONE, ONE, draw=draw)
    (_, state), *others = passes(loader)
    assert loader.num_begun == 3
    assert all(is_same_state(state, other) for _, other in others)


def test_an_evaluation_that_begins_in_another_state_gets_its_own_batches() -> None:
    """It may be another order, where one is shuffled; afterwards nothing is kept."""
    loader = Loader(ONE)
    passes(loader, between=lambda: torch.rand(loader.num_begun + 1))
    assert loader.num_begun == 3


def test_a_loader_that_is_not_read_to_its_end_is_not_kept() -> None:
    cache, loader = BatchCache(LARGE, Process()), Loader(ONE, 2 * ONE)
    start = random_state()
    next(iter(cache.wrap("search", [loader])[0]))
    set_random_state(start)
    assert len(list(cache.wrap("search", [loader])[0])) == 2
    assert loader.num_begun == 2


@pytest.mark.parametrize(("max_bytes", "num_begun"), [(LARGE, 1), (15, 3), (0, 3)])
def test_the_budget_is_kept(max_bytes: int, num_begun: int) -> None:
    loader = Loader(ONE)
    assert all(torch.equal(batches[0], ONE) for batches, _ in passes(loader, max_bytes=max_bytes))
    assert loader.num_begun == num_begun


DATA = torch.arange(24.0)
SHARING: dict[str, Callable[[Tensor], list[Any]]] = {
    "views of one memory": lambda d: [(d[:4].view(2, 2), d[2:6]), {"x": d[8:12], "y": d[8:12].numpy()[::-1]}],
    "expanded, transposed": lambda d: [d[:3].expand(2, 3), (d[:6].view(2, 3).t(), d[5:7])],
    "windows that overlap": lambda d: [d[i : i + 4] for i in range(4)],
    "another type": lambda d: [(d[:4], d[:4].view(torch.int32)), (d.numpy()[2:6], d[2:6], d[:0])],
    "containers": lambda d: [Record(d[:4]), Pair(d[2:6], [d[4:8], UserDict(z=d[6:9])])],
}


def change(batch: Any) -> list[Any]:
    """Double what a batch holds, one tensor or array after the other, and return all of it."""
    leaves = leaves_of(batch)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or 0 not in leaf.stride():
            leaf *= 2
    return [leaf.tolist() for leaf in leaves]


def leaves_of(value: Any) -> list[Any]:
    if isinstance(value, (Tensor, np.ndarray)):
        return [value]
    if isinstance(value, (UserDict, Record)):
        return leaves_of(vars(value))
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for item in items for leaf in leaves_of(item)]


@pytest.mark.parametrize("max_bytes", [LARGE, 0], ids=["kept", "anew"])
@pytest.mark.parametrize("kind", SHARING)
def test_what_shares_memory_does_so_in_every_pass_and_leaves_the_data_alone(kind: str, max_bytes: int) -> None:
    """Red if tensors are copied one by one (the second pass differs), or batches handed out themselves."""
    data = DATA.clone()
    cache, loader, start = BatchCache(max_bytes, Process()), Loader(*SHARING[kind](data)), random_state()
    seen = []
    for _ in range(3):
        set_random_state(start)
        seen.append([change(batch) for batch in cache.wrap("search", [loader])[0]])
    fresh = [change(SHARING[kind](DATA.clone())[i]) for i in range(len(loader.batches))]
    assert seen == [fresh] * 3
    assert torch.equal(data, DATA)
