"""The evidence's statistics as properties, and each of its parts once, on a GPT of 8,000 parameters and 100 steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evidence import measure, protocol, referees, report, tasks, verdicts
from benchmarks.evidence.protocol import ARCHITECTURES, PARTS, Run
from benchmarks.evidence.regimes import REGIMES, SPIKE_RATE
from benchmarks.evidence.statistics import mean_interval, proportion_interval, trend
from benchmarks.evidence.train import NUM_SEGMENTS, Trained, Training, train
from benchmarks.quality.methods import DEFAULT
from tests.support.warnings import only_expected

NUM_STEPS = 100
NUM_BATCHES = {"search": 6, "confirm": 12, "test": 6}
COMMITTED = report.RESULTS  # which a fixture replaces


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs and results of its own, little text, and few batches."""
    folder = tmp_path_factory.mktemp("evidence")
    texts = {split: (Path(torch.nn.__file__).parent / "functional.py").read_bytes()[:200_000] for split in tasks.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "RUNS", folder / "runs")
        for module in (measure, verdicts, report):
            patch.setattr(module, "RESULTS", folder / "results")
        for module in (tasks, verdicts):
            patch.setattr(module, "NUM_EVAL_BATCHES", NUM_BATCHES)
        patch.setattr(tasks, "read_torch", lambda: texts)
        tasks.windows.cache_clear()
        yield folder
        tasks.windows.cache_clear()


def tiny(regime: str = "constant", model: str = "tiny", cell: str = "tiny") -> Run:
    """Return a run of 100 steps."""
    return Run(cell=cell, model=model, regime=regime, num_steps=NUM_STEPS, seed=10)


@pytest.fixture(scope="module")
def trained(home: Path) -> Trained:
    train(tiny())
    return Trained(tiny())


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20), st.floats(-100, 100))
def test_an_interval_of_the_mean_holds_it_and_moves_with_it(values: list[float], shift: float) -> None:
    """Goes red if an interval is not around the mean."""
    low, high = mean_interval(values) or (0, 0)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    moved = mean_interval([v + shift for v in values])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)
    assert mean_interval(values[:2]) is None


@settings(max_examples=25)
@given(st.integers(1, 300), st.data())
def test_an_interval_of_a_probability_holds_the_share_and_mirrors(total: int, data: st.DataObject) -> None:
    """Goes red if a tail is on the wrong side."""
    num = data.draw(st.integers(0, total))
    low, high = proportion_interval(num, total)
    assert 0 <= low <= num / total <= high <= 1
    assert proportion_interval(total - num, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_an_interval_of_a_probability_keeps_its_promise() -> None:
    """Goes red if it is narrower than Clopper and Pearson's, which holds at least 95 % of the time."""
    drawn = np.random.default_rng(0).binomial(50, 0.1, size=500)
    held = [low <= 0.1 <= high for low, high in (proportion_interval(int(k), 50) for k in drawn)]
    assert np.mean(held) >= 0.95


@settings(max_examples=25)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(80, 100))
def test_a_trend_finds_the_plane_that_values_lie_on(size: float, steps: float, level: float) -> None:
    """Goes red if slopes change places."""
    places = [(x, y) for x in (-0.5, 0.0, 1.0) for y in (-0.4, 0.0, 0.6)]
    found = trend(places, [level + size * x + steps * y for x, y in places])
    assert found is not None
    assert [s.value for s in found.slopes_D] == pytest.approx([size, steps], abs=1e-6)
    assert found.level.value == pytest.approx(level)
    assert all(s.interval[0] <= s.value <= s.interval[1] for s in (found.level, *found.slopes_D))


def test_one_length_tells_no_trend_of_lengths() -> None:
    """Goes red if a slope is told that no run determines."""
    assert trend([(x, 0.0) for x in (0.0, 0.5, 1.0, 1.5)], [1.0, 2.0, 3.0, 4.0]) is None


def test_a_runs_name_tells_it_apart_from_all_others() -> None:
    """Goes red if two runs would be kept in one place; the twin of a constant run is a regime of its own."""
    of_part = {part: [(run.directory, run.cell) for run in protocol.runs(part)] for part in PARTS}
    assert all(len(set(found)) == len(found) for found in of_part.values())
    trained_runs = {(run.model, run.regime, run.num_steps, run.seed) for part in PARTS for run in protocol.runs(part)}
    assert len({directory for found in of_part.values() for directory, _ in found}) == len(trained_runs)


def test_a_trail_holds_the_means_and_points_of_the_run(trained: Trained) -> None:
    """Goes red if a segment's mean or the twin's beginning is off by a step."""
    again = Training(trained.run)
    weights = []
    for _ in range(NUM_STEPS):
        again.advance()
        weights.append(again.weights())
    assert torch.equal(trained.latest_P, weights[-1])
    for m in (0, NUM_SEGMENTS - 1):
        torch.testing.assert_close(trained._trail["means_MP"][m], weights[m])  # of segments of one step
    # At its first step the twin still has the whole rate.
    torch.testing.assert_close(trained._branch["means_MP"][0], weights[80])


@pytest.mark.parametrize("name", sorted(REGIMES.keys() - {"constant", "images", "denoising"}))
def test_each_regime_trains_and_its_twin_decays(name: str, home: Path) -> None:
    """Goes red if a regime's rate does not reach 0 in its twin, or its weights leave their precision."""
    run, how = tiny(name), REGIMES[name]
    training = Training(run)
    for _ in range(3):
        training.advance()
    assert torch.isfinite(training.weights()).all()
    if how.in_bfloat16:
        assert torch.equal(training.weights(), training.weights().bfloat16().float())
    last = how.rate(NUM_STEPS - 1, NUM_STEPS, decay_from=80 if how.has_twin else None)
    assert last <= 0.051 * (SPIKE_RATE if how.has_spike else 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_is_scored_as_it_was_loaded(name: str, home: Path) -> None:
    """Goes red if loading leaves a trace, as BatchNorm's statistics would, or a split shares a batch with another."""
    run = tiny(ARCHITECTURES[name][1], model=name)
    training = Training(run)
    training.advance()
    task, model, weights_P = run.task(), training.model, training.weights()
    batches = task.batches()
    assert {split: len(found) for split, found in batches.items()} == NUM_BATCHES
    values = []
    for w_P in (weights_P, 0.5 * weights_P, weights_P):
        task.load(model, w_P.clone())
        with torch.no_grad():
            values.append(float(task.loss(model, batches["search"][0])))
    assert values[0] == values[2] != values[1]


def test_a_run_is_measured_once_and_again_on_request(
    trained: Trained, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if a stopped command would begin anew, or if results of runs that are not there are lost."""
    monkeypatch.setattr(measure, "runs", lambda part: [trained.run])
    monkeypatch.setitem(measure.METHODS_OF_PART, "ladder", (DEFAULT, "EMA"))
    with only_expected():
        measure.measure("ladder", trained.run)
    path = home / "results" / "ladder.json"
    (first,) = json.loads(path.read_text())
    assert first["methods"].keys() == {DEFAULT, "EMA"}
    assert first["methods"][DEFAULT]["losses"].keys() == NUM_BATCHES.keys()
    other = {**first, "run": {**first["run"], "seed": 11}}
    monkeypatch.setattr(measure, "runs", lambda part: [trained.run, Run(**{**vars(trained.run), "seed": 11})])
    path.write_text(json.dumps([first, other]))
    monkeypatch.setattr(measure, "record", None)  # would be called
    measure.measure("ladder", trained.run)
    assert json.loads(path.read_text()) == [first, other]


def test_referees_average_the_runs_own_trajectory(trained: Trained) -> None:
    """Goes red if the replay leaves the trajectory, or an average is not the one that its label tells."""
    with only_expected(r"litlogger", r"has no `train_dataloader`|IterableDataset"):
        found = referees.ride(trained)
    again = Training(trained.run)
    weights_SP = torch.stack([(again.advance(), again.weights())[1] for _ in range(NUM_STEPS)])
    torch.testing.assert_close(found["swa_utils"]["last 50 %"], weights_SP[50:].mean(0))
    torch.testing.assert_close(found["queue"]["every 0.8 %"], weights_SP[-10:].mean(0))
    # Windows of ten steps, of which every fifth is sampled.
    torch.testing.assert_close(found["windows"]["horizon 2"], weights_SP[[84, 89, 94, 99]].mean(0))
    ema_P = weights_SP[0]
    for weights_P in weights_SP[1:]:
        ema_P = 0.9 * ema_P + 0.1 * weights_P
    torch.testing.assert_close(found["Lightning EMA"]["decay 0.9"], ema_P, rtol=1e-3, atol=1e-4)


def test_a_verdict_is_judged_by_windows_that_it_has_not_seen(
    trained: Trained, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if a kind of search is not run, or a stopped command would begin anew."""
    monkeypatch.setattr(verdicts, "SPLITS_A_RUN", 2)
    monkeypatch.setattr(verdicts, "NOISES_A_RUN", 1)
    monkeypatch.setattr(verdicts, "NUM_REDRAWN", 20)
    monkeypatch.setattr(verdicts, "REDRAWN_BATCHES", (8,))
    monkeypatch.setattr(verdicts, "runs", lambda part: [trained.run])
    with only_expected():
        verdicts.measure(trained.run)
    path = home / "results" / "verdicts.json"
    (found,) = json.loads(path.read_text())
    assert [len(found[kind]) for kind in ("latest", "twin", "noise", verdicts.TAIL_NOISE)] == [1, 1, 1, 1]
    monkeypatch.setattr(verdicts, "searched", None)  # would be called
    verdicts.measure(trained.run)
    assert json.loads(path.read_text()) == [found]


def test_the_page_says_what_has_not_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a page without results claims anything, or with some fails."""
    empty = report.page({part: [] for part in PARTS})
    assert "**holds**" not in empty
    assert "**fails**" not in empty
    assert empty.count(report.NOT_YET) > 20


def test_a_claim_is_judged_once_all_its_runs_are_measured() -> None:
    """Goes red if a page says that a claim holds while runs are missing, or that it does where one cell falls short."""

    def measured(run: Run, share: float) -> dict[str, object]:
        losses = dict.fromkeys(NUM_BATCHES, 2.0 - share / 1000)
        return {
            "run": {"cell": run.cell, "seed": run.seed},
            "latest": dict.fromkeys(NUM_BATCHES, 2.0),
            "twin": dict.fromkeys(NUM_BATCHES, 1.9),
            "twin_interval": (0.09, 0.11),
            "methods": {DEFAULT: {"losses": losses}},
        }

    ladder = protocol.runs("ladder")
    assert report.cells_told([measured(run, 96) for run in ladder], "ladder").startswith("**holds**")
    assert report.cells_told([measured(run, 96) for run in ladder[1:]], "ladder").startswith("open")
    short = [measured(run, 90 if run.model == "3M" else 96) for run in ladder]
    assert report.cells_told(short, "ladder").startswith("**fails**")
    assert "3M, 1,000 steps (90.0 %)" in report.cells_told(short, "ladder")
    assert report.shares([{**short[0], "twin_interval": (-0.01, 0.21)}], DEFAULT) == []


def test_methods_are_compared_on_the_same_runs() -> None:
    """Goes red if a median over other runs stands beside another method's."""
    both, one = ({"methods": dict.fromkeys(names)} for names in ((DEFAULT, "EMA"), (DEFAULT,)))
    assert report.comparable([both, one]) == [both]
    assert report.comparable([one, one]) == [one, one]


def test_the_committed_page_is_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a figure on the page was changed by hand, or results were committed without their page."""
    monkeypatch.setattr(report, "RESULTS", COMMITTED)
    assert report.PAGE.read_text() == report.page({part: report.results(part) for part in PARTS})
