"""A signal in the middle of a search of several ranks, on all of them or on one alone."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.rank_runs import Classifier, fit, make_rank_merge, same_trail
from tests.support.ranks import RankPool


class Signalled(Classifier):
    """Some ranks receive a signal in the second batch of the first search."""

    trainer_of: ClassVar[Any] = None
    calls: ClassVar[list[bool]] = []
    is_armed: ClassVar[bool] = False

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        if Signalled.is_armed and self.global_rank in self.ranks and batch_idx == 1:
            Signalled.is_armed = False
            Signalled.trainer_of = self.trainer
            signal.raise_signal(signal.SIGUSR1)
        return loss


def interrupted(ranks: tuple[int, ...], saves: bool, root: str) -> tuple[bool, int]:
    def handler(*_: Any) -> None:
        Signalled.calls.append(True)
        if saves:
            Signalled.trainer_of.save_checkpoint(f"{root}/hpc.ckpt")

    model = partial(Signalled, ranks)
    options: dict[str, Any] = {"model": model, "limit_val_batches": 8, "val_check_interval": 1.0}
    options["num_sanity_val_steps"] = 0
    Signalled.calls.clear()
    Signalled.is_armed = False
    baseline = fit("ddp", root, None, **options)
    Signalled.is_armed = True
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        found = fit("ddp", root, make_rank_merge(root), **options)
    finally:
        signal.signal(signal.SIGUSR1, before)
    if saves and found.trainer.is_global_zero:  # whose BatchNorm statistics a checkpoint holds
        saved = torch.load(f"{root}/hpc.ckpt", weights_only=True)["state_dict"]
        live = torch.cat([saved[n].reshape(-1).double() for n in (*names(found.module),)])
        assert torch.equal(live, found.module.trail[5])
    return same_trail(found, baseline), len(Signalled.calls)


def names(module: torch.nn.Module) -> list[str]:
    return [n for n, _ in (*module.named_parameters(), *module.named_buffers())]


def test_all_ranks_save_the_runs_own_weights_once_the_search_has_ended(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(interrupted, (0, 1), True, str(tmp_path)) == [(True, 1), (True, 1)]
    records = read_timeline(tmp_path / "merges")
    assert [(r["step"], r["status"] == "skipped") for r in records] == [(6, True), (12, False)]
    assert "SIGUSR1 arrived" in records[0]["reason"]


def test_a_signal_to_one_rank_ends_the_search_on_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(interrupted, (1,), False, str(tmp_path)) == [(True, 0), (True, 1)]
    assert [r["status"] == "skipped" for r in read_timeline(tmp_path / "merges")] == [True, False]
