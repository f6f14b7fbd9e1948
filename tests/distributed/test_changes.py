"""A model that changes, or a buffer that fails, on one rank or on all: ranks decide alike, and training never hears."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.buffer.segment_mean import SegmentMean
from lightning_ckmerge.distributed.comm import Ranks, together
from lightning_ckmerge.errors import CkmergeError, PeerError
from tests.distributed.test_faults import BoomError, Fault
from tests.support.rank_runs import fit, fit_plain, make_rank_merge, published, same_trail
from tests.support.ranks import RankPool

CHANGED_AT = 5  # in the middle of a segment
TOLD = ["buffer", "the same tensors on all ranks", "boom"]


def steps(root: Path) -> list[int]:
    return [int(name.split("=")[1]) for name in published(root)]


def replace(module: Any) -> None:
    """DDP keeps the parameters' objects, so that these stay."""
    norm = nn.BatchNorm1d(8)
    norm.weight, norm.bias = module.norm.weight, module.norm.bias
    module.norm = norm


def add_buffer(module: Any) -> None:
    module.register_buffer("average", torch.zeros(3))


def add_layer(module: Any) -> None:
    module.extra = nn.Linear(2, 2)


class Change(pl.Callback):
    """Does something to the module once, on some ranks."""

    def __init__(self, change: Callable[[Any], object], on_ranks: tuple[int, ...]) -> None:
        self.change, self.on_ranks = change, on_ranks

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == CHANGED_AT and trainer.global_rank in self.on_ranks:
            self.change(pl_module)


def changed(change: Callable[[Any], object], on_ranks: tuple[int, ...], on_error: str, root: str) -> Any:
    others = [Change(change, on_ranks)]
    baseline = fit("ddp", root, None, others=others)
    try:
        found = fit(
            "ddp", root, make_rank_merge(root, every_n_train_steps=4, on_error=on_error), others=others, expected=TOLD
        )
    except CkmergeError as error:
        return str(error)
    return same_trail(found, baseline)


@pytest.mark.parametrize("on_ranks", [(0, 1), (1,)])
def test_a_change_starts_the_buffer_anew_on_all_ranks(
    ranks: RankPool, tmp_path: Path, on_ranks: tuple[int, ...]
) -> None:
    """Also where one rank alone has it: a layer put in the place of its like."""
    assert ranks.run(changed, replace, on_ranks, "raise", str(tmp_path)) == [True, True]
    assert steps(tmp_path) == [4, 8, 12]
    last = read_manifest(tmp_path / "merges" / published(tmp_path)[-1])
    assert all(s["first_step"] > CHANGED_AT for s in last["snapshots"])
    assert len(last["snapshots"]) > 2


@pytest.mark.parametrize("change", [add_buffer, add_layer])
def test_ranks_whose_models_differ_are_searched_no_more(
    ranks: RankPool, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    """Goes red as a hang if each rank takes its own list of tensors for everybody's."""
    assert ranks.run(changed, change, (1,), "warn", str(tmp_path)) == [True, True]
    assert steps(tmp_path) == [4]
    if change is add_buffer:
        messages = ranks.run(changed, change, (1,), "raise", str(tmp_path / "raise"))
        assert all("the same tensors on all ranks" in message for message in messages)


class Samples(pl.Callback):
    """Runs a forward pass after each step, as callbacks do that show samples."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.net(torch.ones(2, 8))


class Reshards(pl.Callback):
    """Brings the shards into place for the module's own hook, which copies them."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def sampled(root: str) -> bool:
    found = fit("fsdp2", root, None, others=[Samples(), make_rank_merge(root), Reshards()])
    return same_trail(found, fit("fsdp2", root, None, others=[Samples(), Reshards()]))


def test_a_forward_pass_before_the_buffer_reads_the_shards(ranks: RankPool, tmp_path: Path) -> None:
    """After one without gradients FSDP2's root is still gathered."""
    assert ranks.run(sampled, str(tmp_path)) == [True, True]
    assert steps(tmp_path) == [6, 12]


def failing(on_error: str, root: str) -> Any:
    baseline = fit_plain("ddp", root)
    with Fault(1, (SegmentMean, "take", 5)) as fault:
        try:
            merge = make_rank_merge(root, on_error=on_error, every_n_train_steps=4)
            found = fit("ddp", root, merge, expected=TOLD)
        except (CkmergeError, BoomError) as error:
            return type(error).__name__
    return same_trail(found, baseline), fault.happened


def test_a_fault_of_the_buffer_is_every_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Either training goes on without, after what has been published, or all raise; and nobody waits."""
    assert ranks.run(failing, "warn", str(tmp_path)) == [(True, False), (True, True)]
    assert steps(tmp_path) == [4]
    assert ranks.run(failing, "raise", str(tmp_path / "raise")) == ["PeerError", "BoomError"]


def told(kind: str) -> list[Any]:
    """Rank 1 fails where ranks act together, and its caller gives up once more; then they talk of something else."""
    comm = Ranks()
    try:
        try:
            with together(comm):
                try:
                    with together(comm):
                        if comm.rank == 1:
                            raise BoomError("boom")
                except Exception as error:
                    if kind == "caused":
                        raise ValueError("another") from error
                    if kind == "in its place" and comm.rank == 0:
                        1 / 0  # noqa: B018
                    raise
        except Exception as error:
            comm.give_up(error)
        first = comm.exchange("well")
        try:  # a later error is another one
            with together(comm):
                if comm.rank == 0:
                    math.sqrt(-1)
        except (PeerError, ValueError) as error:
            comm.give_up(error)
            return [*first, type(error).__name__, *comm.exchange("again")]
        return first
    finally:
        comm.close()


@pytest.mark.parametrize("kind", ["itself", "caused", "in its place"])
def test_an_error_is_told_once(ranks: RankPool, kind: str) -> None:
    """Goes red if one is sent again: its peers have left, and take it for a message of what they do next."""
    first, second = ranks.run(told, kind)
    assert first == ["well", "well", "ValueError", "again", "again"]
    assert second == ["well", "well", "PeerError", "again", "again"]
