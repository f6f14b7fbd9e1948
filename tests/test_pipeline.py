"""One search over real tensors, from the buffer's snapshots to the verdict; no Trainer."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from torch import Tensor, nn

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import MemoryStorage
from lightning_ckmerge.config import AnchorName, BufferConfig, Constraint, EvaluationConfig, MergeSettings, SearchConfig
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, Pairwise, make_space
from lightning_ckmerge.distributed.comm import Alone
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.pipeline import SearchJob, run_search
from lightning_ckmerge.search.problem import Half, KeepGoing
from lightning_ckmerge.search.stopping import MIN_TRIALS


class Module(nn.Module):
    """Tied weights, a counter, a mask, and a layer that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.layer.weight
        self.frozen = nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    @torch.no_grad()
    def loss(self, shift: float) -> float:
        """Return the squared distance from weights of 1, and of ``shift`` for the bias."""
        bias = self.layer.bias - shift
        return float((self.layer.weight - 1).square().sum() + bias.square().sum())


class Run:
    """Noisy steps towards the optimum at a constant learning rate, watched by a buffer."""

    def __init__(self, snapshot: str = "mean", num_steps: int = 60) -> None:
        torch.manual_seed(0)
        self.module = Module()
        self.ownership = Ownership(self.module, Alone())
        self.layout = TensorLayout(self.ownership.owned())
        self.buffer = RollingBuffer(
            BufferConfig(snapshot=snapshot, capacity=6),
            self.layout,
            MemoryStorage(),
            device="cpu",
            run_id="0123abcd",
            segment_steps=5,
            double_segments=False,
        )
        self.step = 0
        for _ in range(num_steps):
            self.train()

    @torch.no_grad()
    def train(self) -> None:
        self.step += 1
        for parameter, goal in ((self.module.layer.weight, 1.0), (self.module.layer.bias, 0.0)):
            parameter.sub_(0.1 * (parameter - goal) + 0.2 * torch.randn_like(parameter))
        self.module.count += 1
        self.buffer.update(self.live, self.step)

    @property
    def live(self) -> list[Tensor]:
        return self.layout.order(self.ownership.owned())

    def merger(self) -> Merger:
        latest = [tensor.detach().clone() for tensor in self.live]
        return Merger(self.layout, lambda: self.live, self.buffer.snapshots(), latest, self.step)


class Validation:
    """Scores a module on batches that pull its bias to and fro."""

    def __init__(self, module: Module, batches: tuple[int, int] = (12, 12)) -> None:
        self.module = module
        self.batches: dict[Half, int] = {"search": batches[0], "confirm": batches[1]}
        self.halves: list[Half] = []

    def run(self, half: Half, keep_going: KeepGoing | None = None) -> Score:
        self.halves.append(half)
        shifts = random.Random(half)
        values_B: list[float] = []
        while len(values_B) < self.batches[half]:
            values_B.append(self.module.loss(shifts.gauss(0, 0.05)))
            if keep_going is not None and not keep_going(values_B, [8.0] * len(values_B)):
                break
        value = sum(values_B) / len(values_B)
        return Score(
            value=value,
            metrics={"val_loss": value},
            values_B=tuple(values_B),
            sizes_B=(8.0,) * len(values_B),
            num_batches=len(values_B),
            complete=len(values_B) == self.batches[half],
        )

    def num_batches(self, half: Half) -> tuple[int, ...]:
        return (self.batches[half],)

    def can_confirm(self) -> bool:
        return self.batches["confirm"] > 0


class ToyScorer:
    """Merges into a module without a Trainer."""

    def __init__(self, merger: Merger, validation: Validation) -> None:
        self.merger = merger
        self.validation = validation
        self.load = merger.merge
        self.num_batches = validation.num_batches
        self.can_confirm = validation.can_confirm

    def score(self, c: Any, half: Half, keep_going: KeepGoing | None = None) -> Score:
        self.load(c)
        return self.validation.run(half, keep_going)

    def gradient(self, c: Any) -> Any:
        raise NotImplementedError

    def check(self, scored: Any, read: Any) -> None:
        read()

    def notes(self) -> Sequence[str]:
        return ()


def make_job(
    run: Run, path: Path, config: SearchConfig | None = None, *, staged: bool = True, **options: Any
) -> SearchJob:
    scorer = ToyScorer(run.merger(), options.pop("validation", Validation(run.module)))
    config = config or SearchConfig(n_trials=6)
    defaults: dict[str, Any] = {
        "name": "0123abcd-step=60",
        "step": run.step,
        "settings": MergeSettings(
            objectives=(Objective("val_loss", "min"),),
            buffer=BufferConfig(snapshot=make_space(config.space).snapshot or "mean"),
            search=config,
            evaluation=EvaluationConfig(staged=staged),
        ),
        "space": make_space(config.space),
        "scorer": scorer,
        "allowed_s": None,
        "allowed_by": "",
        "searched_s": 1.0,
        "training_s": 100.0,
        "previous": None,
        "validated": [],
        "searched": [],
        "notes": [],
        "journal": path / "merges" / "study.journal",
        "on_scored": lambda trial, total: None,
        "agree": lambda function: function(),
    }
    return SearchJob(**{**defaults, **options})


def spans(merger: Merger) -> list[tuple[str, int, int, bool]]:
    return [(s.kind, s.first_step, s.last_step, s.covered) for s in merger.segments_K]


def test_a_search_gives_a_whole_account(tmp_path: Path) -> None:
    run = Run()
    job = make_job(run, tmp_path)
    outcome = run_search(job)
    assert (outcome.step, outcome.monitor, outcome.mode, outcome.space) == (60, "val_loss", "min", "grouped")
    assert len(outcome.trials) == 6
    assert outcome.anchors[0].candidate.name == "latest"
    assert len({len(t.candidate.coefficients_K) for t in (*outcome.anchors, *outcome.trials)}) == 1
    assert len(outcome.snapshots_K) == len(outcome.winner.candidate.coefficients_K)
    assert (outcome.snapshots_K[-1].kind, outcome.snapshots_K[-1].last_step) == ("point", 60)
    assert outcome.winner.confirm is not None
    assert outcome.verdict.status == "accepted"
    assert outcome.verdict.best_anchor in [t.candidate.name for t in outcome.anchors]
    assert (outcome.evaluation.search_batches, outcome.evaluation.confirm_batches) == ((12,), (12,))
    assert (outcome.evaluation.search_samples, outcome.evaluation.confirm_samples) == (96, 96)
    assert outcome.cost.seconds.keys() == {"anchors", "trials", "confirm", "other"}
    assert outcome.cost.share_of_training == pytest.approx((1 + sum(outcome.cost.seconds.values())) / 100, rel=0.01)
    assert outcome.cost.stopped_early is None
    run.buffer.close()


def test_a_gain_is_told_in_steps_of_the_runs_validations_or_else_of_its_searches(tmp_path: Path) -> None:
    run = Run()
    before = copy.deepcopy(run.module.state_dict())
    plain = run_search(make_job(run, tmp_path / "plain"))
    latest = plain.anchors[0].confirm
    assert latest is not None
    assert plain.verdict.equivalent_steps is None
    curve = [(60 - age, latest.value + age * plain.verdict.gain / 10) for age in (15, 10, 5)]
    told = []
    for name, factor in (("searched", 1), ("validated", 2)):
        run.module.load_state_dict(before)
        job = make_job(run, tmp_path / name, **{name: [(s, factor * v) for s, v in curve]})
        told.append(run_search(job).verdict.equivalent_steps)
    assert told == [10, 5]
    run.buffer.close()


def test_the_anchors_of_the_config_are_scored(tmp_path: Path) -> None:
    run = Run()
    outcome = run_search(make_job(run, tmp_path, SearchConfig(n_trials=1, anchors=["wsm-minus-sqrt"])))
    assert [t.candidate.name for t in outcome.anchors] == ["latest", "initial-0", "wsm-minus-sqrt"]
    run.buffer.close()


def test_the_verdicts_gain_is_that_of_the_merged_weights(tmp_path: Path) -> None:
    """The winner, merged again, has the confirmed value; what is not averaged has not moved."""
    run = Run()
    before = copy.deepcopy(run.module.state_dict())
    job = make_job(run, tmp_path)
    outcome = run_search(job)
    latest, merged = outcome.anchors[0].confirm, outcome.winner.confirm
    assert latest is not None
    assert merged is not None
    assert outcome.verdict.gain == pytest.approx(latest.value - merged.value)
    job.scorer.merger.merge(outcome.winner.candidate.coefficients_K)
    assert Validation(run.module).run("confirm").value == merged.value
    after = run.module.state_dict()
    assert not torch.equal(after["layer.weight"], before["layer.weight"])
    assert run.module.tied.weight is run.module.layer.weight
    for name in ("frozen.weight", "frozen.bias", "count", "mask"):
        assert torch.equal(after[name], before[name])
    run.buffer.close()


def test_merging_the_latest_weights_alone_puts_them_back(tmp_path: Path) -> None:
    run = Run()
    before = copy.deepcopy(run.module.state_dict())
    merger = run.merger()
    num_snapshots = len(merger.segments_K)
    merger.merge([1 / num_snapshots] * num_snapshots)
    merger.merge([0.0] * (num_snapshots - 1) + [1.0])
    after = run.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    run.buffer.close()


def test_optuna_opens_the_journal(tmp_path: Path) -> None:
    run = Run()
    job = make_job(run, tmp_path, staged=False)
    outcome = run_search(job)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(job.journal)))
    study = optuna.load_study(study_name=job.name, storage=storage)
    told = {t.user_attrs["name"]: (t.params, t.value) for t in study.trials}
    for trial in (*outcome.anchors, *outcome.trials):
        if trial.candidate.coordinates is not None:
            assert told.pop(trial.candidate.name) == (trial.candidate.coordinates, trial.search.value)
    assert told == {}
    run.buffer.close()


def test_the_same_search_goes_on_in_its_study(tmp_path: Path) -> None:
    """What it has told is not scored again."""
    run = Run()
    job = make_job(run, tmp_path, SearchConfig(n_trials=2), staged=False)
    first = run_search(job)
    job.scorer.merger.merge(first.anchors[0].candidate.coefficients_K)
    validation = Validation(run.module)
    settings = dataclasses.replace(job.settings, search=SearchConfig(n_trials=3))
    second = run_search(dataclasses.replace(job, settings=settings, scorer=ToyScorer(job.scorer.merger, validation)))
    assert [(t.candidate, t.search) for t in second.trials[:2]] == [(t.candidate, t.search) for t in first.trials]
    known = [t for t in (*first.anchors, *first.trials) if t.candidate.coordinates]
    assert validation.halves.count("search") == len(second.anchors) + len(second.trials) - len(known)
    run.buffer.close()


@pytest.mark.parametrize("kind", ["snapshot", "weights", "space", "adapters"])
def test_a_search_of_something_else_does_not_go_on_in_the_same_study(tmp_path: Path, kind: str) -> None:
    run = Run()
    config = SearchConfig(n_trials=1, sampler=RandomSampler(seed=0))
    job = make_job(run, tmp_path, config, space=Decay())
    latest = run_search(job).anchors[0].candidate
    job.scorer.merger.merge(latest.coefficients_K)
    if kind == "snapshot":
        run.train()
    elif kind == "weights":
        run.module.layer.bias.data.add_(0.5)
    space = Decay(max_extrapolation=1.0) if kind == "space" else Decay()
    adapters = "products" if kind == "adapters" else None
    run_search(make_job(run, tmp_path, config, space=space, adapters=adapters))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(job.journal)))
    assert sorted(optuna.get_all_study_names(storage)) == [job.name, f"{job.name}-v1"]
    run.buffer.close()


@pytest.mark.parametrize(
    ("num_steps", "latest"),
    [(60, ("point", 60, 60, True)), (63, ("point", 63, 63, True))],
    ids=["a segment has just ended", "a segment is open"],
)
def test_means_cover_the_latest_weights(num_steps: int, latest: tuple[str, int, int, bool]) -> None:
    """No step counts twice."""
    run = Run(num_steps=num_steps)
    merger = run.merger()
    assert spans(merger)[-1] == latest
    assert spans(merger)[-2][2] == num_steps
    first = merger.segments_K[0].first_step
    assert sum(s.num_steps for s in merger.segments_K) == num_steps - first + 1
    run.buffer.close()


def test_a_point_taken_at_this_step_is_the_latest_weights() -> None:
    run = Run("point", num_steps=60)
    assert spans(run.merger())[-2:] == [("point", 51, 55, False), ("point", 56, 60, False)]
    run.train()
    assert spans(run.merger())[-2:] == [("point", 56, 60, False), ("point", 61, 61, False)]
    run.buffer.close()


def test_steps_after_the_newest_mean_are_the_latest_weights() -> None:
    """Where the buffer has not seen the last steps."""
    run = Run(num_steps=60)
    run.step += 7
    assert spans(run.merger())[-1] == ("point", 61, 67, False)
    run.buffer.close()


def test_a_pair_is_searched_over_points(tmp_path: Path) -> None:
    run = Run("point")
    config = SearchConfig(space="pairwise", n_trials=4)
    outcome = run_search(make_job(run, tmp_path, config, space=Pairwise()))
    assert outcome.space == "pairwise"
    assert [s.last_step for s in outcome.snapshots_K[-2:]] == [55, 60]
    assert {s.kind for s in outcome.snapshots_K} == {"point"}
    assert outcome.anchors[0].candidate.coordinates == {"lam": 1.0}
    run.buffer.close()


def test_an_optimum_on_a_bound_is_a_warning(tmp_path: Path) -> None:
    """Early in a run weights still travel: the newest are best."""
    run = Run("point", num_steps=11)
    run.module.layer.weight.data.fill_(1.0)
    run.module.layer.bias.data.zero_()
    outcome = run_search(make_job(run, tmp_path, SearchConfig(n_trials=2), space=Pairwise()))
    assert outcome.winner is outcome.anchors[0]
    assert outcome.verdict.status == "rejected"
    assert any("latest weights beat every pair" in w for w in outcome.verdict.warnings)
    run.buffer.close()


def test_without_a_confirmation_half_nothing_is_accepted(tmp_path: Path) -> None:
    run = Run()
    validation = Validation(run.module, (12, 0))
    outcome = run_search(make_job(run, tmp_path, validation=validation))
    assert set(validation.halves) == {"search"}
    assert outcome.verdict.status == "unconfirmed"
    assert outcome.evaluation.confirm_samples is None
    assert any("nothing could be confirmed" in w for w in outcome.verdict.warnings)
    run.buffer.close()


def test_nothing_to_merge_is_an_error(tmp_path: Path) -> None:
    run = Run(num_steps=0)
    with pytest.raises(SearchError, match=r"got none\. Shorten `buffer\.every_n_train_steps`"):
        run_search(make_job(run, tmp_path))
    run.buffer.close()


def test_a_budget_for_nothing_is_an_error_that_names_the_argument(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(SearchError, match=r"Raise `search\.timeout_s`, or search less often\.$"):
        run_search(make_job(run, tmp_path, allowed_s=1e-9, allowed_by="search.timeout_s"))
    run.buffer.close()


@pytest.mark.parametrize("anchors", [["uniform"], []])
def test_a_spent_budget_is_reported(tmp_path: Path, anchors: list[AnchorName]) -> None:
    """The latest weights and one candidate at least have been scored by then."""
    run = Run()
    config = SearchConfig(n_trials=1000, anchors=anchors, min_gain_left=0.0)
    outcome = run_search(make_job(run, tmp_path, config, allowed_s=1.0, allowed_by="search.timeout_s"))
    assert outcome.cost.stopped_early is not None
    assert "but `search.timeout_s` allows 1 s" in outcome.cost.stopped_early
    assert f"The search stopped {outcome.cost.stopped_early}." in outcome.verdict.warnings
    assert len(outcome.trials) < 1000
    assert outcome.winner.confirm is not None
    run.buffer.close()


@pytest.mark.parametrize(
    ("search", "job", "stops"),
    [
        ({}, {}, True),
        ({}, {"shared": True}, False),
        ({"constraints": [Constraint(monitor="val_loss")]}, {}, False),
        ({"min_gain_left": 0.0}, {}, False),
    ],
    ids=["one metric", "shared", "constraints", "never"],
)
def test_it_stops_for_good_where_one_process_searches_by_one_metric(
    search: dict[str, Any], job: dict[str, Any], stops: bool, tmp_path: Path
) -> None:
    """That enough was found is no shortage, and no warning."""
    run = Run()
    config = SearchConfig(**{"n_trials": 8, "min_gain_left": 0.5, **search})
    outcome = run_search(make_job(run, tmp_path, config, **job))
    assert len(outcome.trials) == (MIN_TRIALS if stops else 8)
    assert ("search.min_gain_left" in (outcome.cost.stopped_early or "")) == stops
    assert not any("stopped" in w for w in outcome.verdict.warnings)
    run.buffer.close()


def test_a_snapshot_is_what_the_manifest_names() -> None:
    segment = Segment(kind="mean", first_step=1, last_step=5, num_updates=3)
    run = Run(num_steps=0)
    snapshot = Snapshot(segment=segment, sha256="ab" * 32, tensors=[t.clone() for t in run.live])
    record, last = Merger(run.layout, lambda: run.live, [snapshot], run.live, 8).records()
    assert (record.kind, record.first_step, record.last_step, record.num_updates) == ("mean", 1, 5, 3)
    assert (record.sha256, last.sha256) == ("ab" * 32, None)
    assert (last.kind, last.first_step, last.last_step) == ("point", 6, 8)
    run.buffer.close()


def test_three_candidates_are_confirmed_once_all_have_been_searched(tmp_path: Path) -> None:
    """The winner, the latest weights and the best anchor."""
    run = Run()
    validation = Validation(run.module)
    run_search(make_job(run, tmp_path, validation=validation))
    assert validation.halves.count("confirm") == 3
    assert validation.halves[:-3] == ["search"] * (len(validation.halves) - 3)
    run.buffer.close()


@pytest.mark.parametrize("at_low_lr", ["tail", "search"])
def test_after_a_decay_a_search_is_near_the_latest_weights_wherever_the_last_optimum_was(
    tmp_path: Path, at_low_lr: Any
) -> None:
    """Goes red if a follower's search takes the last optimum of another space along, which the run itself forgets."""
    config = SearchConfig(space="decay", at_low_lr=at_low_lr)
    job = make_job(Run(), tmp_path, config, previous={"tau": 40.0, "beta": 0.5})
    assert job.at_low_rate(None, is_decayed=False) == job
    decayed = job.at_low_rate("the learning rate has fallen", is_decayed=True)
    assert decayed.notes == ["The learning rate has fallen."]
    is_near = at_low_lr == "tail"
    assert (type(decayed.space).__name__, decayed.previous is None) == ("Tail" if is_near else "Decay", is_near)
    assert decayed.settings.search.n_trials == (6 if is_near else 16)
