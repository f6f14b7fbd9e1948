"""``search_now`` from any hook, also in the middle of a step."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.bitwise import Case, assert_same_run, compare_runs, fit, fit_plain, merges_dir
from tests.support.models import Classifier, Points, TwoOptimizers
from tests.support.trainers import SearchNow, make_merge, search_now

HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_search_in_any_hook_changes_nothing(hook: str, tmp_path: Path) -> None:
    """Goes red if autograd is told that weights, or tensors of the module's own, were written to."""
    searching = partial(SearchNow, hook, steps=(5, 9))
    case = Case(model=Waiting, searching=lambda: [searching()], merge={"every_n_train_steps": 100})
    assert_same_run(case, tmp_path, min_searches=2)


class Waiting(Classifier):
    """Its graph waits for tensors that validation changes in place: a buffer, and one that is no buffer."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) * (1 + self.drift.square()) * self.scale


class InStep(Waiting):
    """Searches between its forward and backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_step in (5, 9):
            search_now(self.trainer)
        return loss


class InManualStep(TwoOptimizers):
    """Searches within a step that it takes itself: between forward and backward, and between backward and step."""

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        search_now(self.trainer)
        super().manual_backward(loss, *args, **kwargs)
        search_now(self.trainer)


STEPS: dict[str, Case] = {
    "automatic": Case(model=InStep),
    "manual": Case(model=InManualStep, trainer={"max_epochs": 1, "limit_train_batches": 3}),
    "closures": Case(model=partial(InStep, optimizer="lbfgs"), trainer={"max_epochs": 1}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_search_inside_a_step_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fit_plain(STEPS[name], tmp_path / "plain")
    merged = fit(STEPS[name], tmp_path / "merged", [make_merge(every_n_train_steps=100)])
    compare_runs(plain, merged)
    assert any(r["status"] != "skipped" for r in read_timeline(merges_dir(merged)))


def test_where_autocast_keeps_copies_of_the_weights_a_search_is_skipped(tmp_path: Path) -> None:
    case = Case(model=InStep, trainer={"precision": "bf16-mixed"})
    plain = fit_plain(case, tmp_path / "plain")
    merged = fit(case, tmp_path / "merged", [make_merge(every_n_train_steps=100)])
    compare_runs(plain, merged)
    assert {r["reason"].partition(",")[0] for r in read_timeline(merges_dir(merged))} == {"autocast is on"}
    assert not torch.is_autocast_enabled("cpu")


class Iterations(_MultiProcessingDataLoaderIter):
    """Tells its loader when its workers end: twice where nothing else holds it, the second time as it dies."""

    def __init__(self, loader: Tells) -> None:
        super().__init__(loader)
        self.loader = loader

    def _shutdown_workers(self) -> None:
        self.loader.num_ends += 1
        super()._shutdown_workers()


class Tells(DataLoader[Any]):
    """Counts what it hears of its workers' end."""

    num_ends = 0

    def _get_iterator(self) -> Any:
        return Iterations(self)


def test_a_run_ends_its_persistent_workers_as_without_us(tmp_path: Path) -> None:
    """Goes red if anything that is left of a search holds the run's loaders."""
    options: dict[str, Any] = {"batch_size": 8, "num_workers": 1, "persistent_workers": True}
    gc.disable()
    try:
        loaders = Tells(Points(24, 1), **options), Tells(Points(38, 2), **options)
        merge = make_merge(every_n_train_steps=3, search_on_train_end=True)
        fit(Case(train=lambda: loaders[0], val=lambda: loaders[1]), tmp_path, [merge])
        assert [loader.num_ends for loader in loaders] == [2, 2]
    finally:
        gc.enable()
