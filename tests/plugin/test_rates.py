"""Searches where the learning rate leaves something to find."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge import SearchConfig
from lightning_ckmerge.config import TAIL_TRIALS
from lightning_ckmerge.plugin.triggers import LearningRates, rates_of
from tests.support.bitwise import Case, fit, merges_dir
from tests.support.models import TinyGPT, TwoOptimizers, tokens_loader
from tests.support.trainers import NUM_TRIALS, make_merge, manifests

NUM_STEPS = 30  # five epochs of six batches


def recorded(rates: Sequence[float], *others: float) -> LearningRates:
    """Return what is known after steps of these rates, beside groups of constant ones."""
    history = LearningRates()
    for step, rate in enumerate(rates, start=1):
        history.record(step, [rate, *others])
    return history


def cosine(num_steps: int, peak: float = 1e-3) -> list[float]:
    return [peak * 0.5 * (1 + math.cos(math.pi * step / num_steps)) for step in range(1, num_steps + 1)]


@given(rate=st.floats(1e-12, 1e3), num=st.integers(1, 50))
def test_a_constant_rate_is_no_objection(rate: float, num: int) -> None:
    assert recorded([rate] * num).objection(1) is None


def test_rates_that_nobody_sees_are_no_objection() -> None:
    assert LearningRates().objection(1) is None
    for rates in ([], [0.0]):
        history = LearningRates()
        for step in range(1, 5):
            history.record(step, rates)
            assert history.objection(1) is None


@given(peak=st.floats(1e-9, 10), num=st.integers(20, 3000))
def test_a_decay_is_an_objection_once_a_tenth_is_left(peak: float, num: int) -> None:
    history, rates = LearningRates(), cosine(num, peak)
    for step, rate in enumerate(rates, start=1):
        history.record(step, [rate])
        share = rate / rates[0]
        if abs(share - 0.1) > 0.002:  # levels are kept to 1 %
            assert (history.objection(1) is not None) == (share < 0.1)
    assert len(json.dumps(history.state_dict())) < 100_000


def test_the_peak_is_that_of_the_buffers_window() -> None:
    """A low rate that has been constant over all snapshots leaves its noise to average."""
    history = recorded([1.0] * 50 + [0.01] * 50)
    assert "decayed to 1 % of its peak" in (history.objection(1) or "")
    assert "decayed to 1 % of its peak" in (history.objection(50) or "")
    assert history.objection(51) is None


def test_a_restart_of_the_schedule_lifts_the_objection() -> None:
    rates = cosine(50)
    assert recorded(rates).objection(1) is not None
    assert recorded([*rates, rates[0]]).objection(1) is None


@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_a_rising_rate_is_an_objection_until_it_rises_no_more(start: float) -> None:
    history = LearningRates()
    warmup = [start + (1e-3 - start) * step / 200 for step in range(201)]
    said = []
    for step, rate in enumerate([*warmup, 1e-3], start=1):
        history.record(step, [rate])
        said.append(history.objection(1))
    assert all("still warming up" in (text or "") for text in said[2:-1])
    assert said[-1] is None


def test_looking_twice_at_a_step_changes_nothing() -> None:
    history = recorded([0.1, 0.2, 0.3])
    history.record(3, [0.3])
    assert "still warming up" in (history.objection(1) or "")


def test_one_constant_group_keeps_a_run_high() -> None:
    assert recorded(cosine(50), 1e-4).objection(1) is None
    assert recorded([1e-5 * n for n in range(1, 50)], 1e-4).objection(1) is None
    assert recorded(cosine(50), 0.0).objection(1) is not None  # frozen


@given(split=st.integers(1, 99))
def test_it_goes_on_after_a_restart(split: int) -> None:
    rates = [1e-5 * n for n in range(1, 20)] + cosine(80)
    resumed = LearningRates()
    resumed.load_state_dict(json.loads(json.dumps(recorded(rates[:split]).state_dict())))
    for step, rate in list(enumerate(rates, start=1))[split:]:
        resumed.record(step, [rate])
    assert resumed.state_dict() == recorded(rates).state_dict()
    assert resumed.objection(1) == recorded(rates).objection(1)


def test_rates_are_read_from_groups_of_any_kind() -> None:
    weights = torch.nn.Parameter(torch.zeros(2))
    fused = torch.optim.Adam([weights], lr=torch.tensor(0.5), capturable=True)
    plain = torch.optim.SGD([{"params": [weights], "lr": 2}], lr=1)
    assert rates_of([fused, plain, object()]) == [0.5, 2.0]


def scheduled(factor: Callable[[float], float]) -> pl.LightningModule:
    """A GPT whose learning rate follows ``factor``, from share of the run to share of the rate."""
    module = TinyGPT()
    make = module.configure_optimizers

    def configure_optimizers() -> Any:
        optimizer = make()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / NUM_STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module.configure_optimizers = configure_optimizers
    return module


def run_of(factor: Callable[[float], float]) -> Case:
    train, val = (partial(tokens_loader, train=train) for train in (True, False))
    return Case(model=partial(scheduled, factor), train=train, val=val, trainer={"max_epochs": NUM_STEPS // 6})


def decay(progress: float) -> float:
    """The way of a plain cosine run."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warm_up(progress: float) -> float:
    return min(1.0, 3 * progress)


def test_the_search_after_a_decay_is_skipped_and_what_is_applied_beats_the_final_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The merge that was accepted before the decay is applied only since it is better on the same batches."""
    caplog.set_level(logging.INFO)
    # The loss falls, so that, searching for a high one, merges of older weights are better.
    options: dict[str, Any] = {"mode": "max", "check_mode": False, "apply": "on_train_end"}
    options["every_n_train_steps"] = NUM_STEPS // 2
    plain = fit(run_of(decay), tmp_path / "plain")
    skipping = SearchConfig(n_trials=NUM_TRIALS, max_fraction_of_training=None, at_low_lr="skip")
    merge = make_merge(**options, search=skipping, search_on_train_end=True)
    merged = fit(run_of(decay), tmp_path / "merged", [merge])
    assert [(m["step"], m["verdict"]["status"]) for m in manifests(merges_dir(merged))] == [
        (NUM_STEPS // 2, "accepted")
    ]
    assert merged.recorder.records == plain.recorder.records
    assert merge.best_artifact is not None
    best, held = merge.best_artifact.tensors(), merged.module.state_dict()
    assert all(torch.equal(best[name], held[name]) for name in best)
    (line,) = [m for m in caplog.messages if m.startswith("No merge search")]
    assert line == (
        f"No merge search at step {NUM_STEPS}: the learning rate has decayed to 0 % of its peak over the buffered "
        "steps, so merging would gain little. Set `search.at_low_lr: search` to search anyway."
    )


def test_it_searches_after_a_decay_where_that_is_asked_for(tmp_path: Path) -> None:
    """By the argument, or by the user's own call; the verdict says what to expect."""
    search = SearchConfig(n_trials=NUM_TRIALS, max_fraction_of_training=None, at_low_lr="search")

    class AtLastStep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == NUM_STEPS:
                by_call.search_now()

    by_argument = make_merge(search=search, every_n_train_steps=NUM_STEPS, dirpath=tmp_path / "a")
    by_call = make_merge(every_n_train_steps=1000, dirpath=tmp_path / "b")
    fit(run_of(decay), tmp_path, [by_argument, by_call, AtLastStep()])
    for name in "ab":
        (manifest,) = manifests(tmp_path / name)
        assert manifest["step"] == NUM_STEPS
        assert manifest["verdict"]["warnings"][0].startswith("The learning rate has decayed to 0 % of its peak")


def test_after_a_decay_a_search_is_short_and_near_the_latest_weights(tmp_path: Path) -> None:
    """Whatever space, anchors and refinement the ordinary search has; and so it is for the user's own call."""
    search = SearchConfig(n_trials=NUM_TRIALS + TAIL_TRIALS, max_fraction_of_training=None, refine="gradient")

    class AtLastStep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == NUM_STEPS:
                by_call.search_now()

    options: dict[str, Any] = {"search": search}
    by_schedule = make_merge(**options, every_n_train_steps=NUM_STEPS // 2, dirpath=tmp_path / "a")
    by_call = make_merge(**options, every_n_train_steps=1000, dirpath=tmp_path / "b")
    fit(run_of(decay), tmp_path, [by_schedule, by_call, AtLastStep()])
    ordinary, *tails = [*manifests(tmp_path / "a"), *manifests(tmp_path / "b")]
    assert (ordinary["space"], len(tails)) == ("grouped", 2)
    for manifest in tails:
        assert (manifest["step"], manifest["space"]) == (NUM_STEPS, "tail")
        assert len(manifest["trials"]) <= TAIL_TRIALS
        assert [a["name"] for a in manifest["anchors"]] == ["latest", "initial-0"]


def test_searches_begin_after_the_warm_up(tmp_path: Path) -> None:
    run = fit(run_of(warm_up), tmp_path, [make_merge()])
    assert [m["step"] for m in manifests(merges_dir(run))] == [15, 20, 25, 30]


def test_steps_by_hand_at_constant_rates_are_searched(tmp_path: Path) -> None:
    run = fit(Case(model=TwoOptimizers), tmp_path, [make_merge()])
    assert len(manifests(merges_dir(run))) >= 2
