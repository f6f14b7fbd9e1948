"""Studies of a paraboloid, whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.pilot.advice import advise
from lightning_ckmerge.pilot.findings import find
from lightning_ckmerge.pilot.ledger import Ledger
from lightning_ckmerge.pilot.plan import between, make_plan, mean, single
from lightning_ckmerge.pilot.study import Scores, run_study, vertex
from tests.support.quadratic import CIRCLING, Quadratic

STEPS = [10 * (k + 1) for k in range(len(CIRCLING))]
PLAN = make_plan(len(CIRCLING))


def study(root: Path, loss: Quadratic, *, identity: str = "one", sign: int = 1, **options: Any) -> Scores:
    return run_study(PLAN, loss, sign, Ledger(root / "evaluations.jsonl", identity), **options)


def found_by(scores: Scores, mode: str = "min") -> dict[str, Any]:
    found = find(scores, STEPS)
    return {**found, "advice": advise(found, STEPS, "val_loss", mode)}


def best_lam(older: tuple[float, ...], newer: tuple[float, ...]) -> float:
    """Where the straight line through two points is nearest to the origin."""
    direction = [n - o for o, n in zip(older, newer, strict=True)]
    return -sum(o * d for o, d in zip(older, direction, strict=True)) / sum(d * d for d in direction)


def test_each_pair_is_scored_at_its_optimum(tmp_path: Path) -> None:
    """Goes red if the parabola is wrong. Where the middle is within 0.05 of the optimum, it stands for it."""
    pairs = found_by(study(tmp_path, Quadratic()))["pairs"]
    assert len(pairs) == 15
    for pair in pairs:
        exact = best_lam(CIRCLING[pair["older"]], CIRCLING[pair["newer"]])
        assert pair["lam"] == pytest.approx(min(max(exact, 0.05), 0.95), abs=0.05)
        loss = Quadratic().loss(between(pair["older"], pair["newer"], pair["lam"]))
        ends = [Quadratic().loss(single(pair[name])) for name in ("older", "newer")]
        assert pair["gain_over_better"] == pytest.approx(min(ends) - loss)
        assert pair["gain_over_newest"] == pytest.approx(Quadratic().loss(single(5)) - loss)


def test_the_best_number_is_the_known_one(tmp_path: Path) -> None:
    """Pairs cancel the swing, and every older one adds drift: the newest two are the best mean of all."""
    means = {(m["num"], m["stride"]): m["gain"] for m in found_by(study(tmp_path, Quadratic()))["means"]}
    assert max(means, key=lambda key: means[key]) == (2, 1)
    expected = Quadratic().loss(single(5)) - Quadratic().loss(mean([2, 3, 4, 5]))
    assert means[4, 1] == pytest.approx(expected)


def test_a_line_holds_what_lies_past_its_ends_and_on_the_circle(tmp_path: Path) -> None:
    lines = {(line["older"], line["newer"]): line for line in found_by(study(tmp_path, Quadratic()))["lines"]}
    assert {(4, 5), (0, 5)} <= lines.keys()
    for (older, newer), line in lines.items():
        for path in ("linear", "slerp"):
            assert {-0.5, 0.0, 0.5, 1.0, 1.5} <= {lam for lam, _ in line[path]}
            for lam, value in line[path]:
                shift = Quadratic()(single(0), "search").value - Quadratic().loss(single(0))
                assert value - shift == pytest.approx(Quadratic().loss(between(older, newer, lam, path)))


def test_what_helps_is_advised_and_taken_by_the_callback(tmp_path: Path) -> None:
    advice = found_by(study(tmp_path, Quadratic()))["advice"]
    assert (advice["status"], advice["choice"]) == ("accepted", "best pair")
    assert "steps 50 and 60 at `lam`" in advice["what"]
    assert "On the confirmation half, which chose nothing" in advice["what"]
    (entry,) = yaml.safe_load(advice["yaml"])["trainer"]["callbacks"]
    assert entry["init_args"] == advice["config"]
    assert entry["init_args"]["buffer"]["every_n_train_steps"] == 10
    settings = CheckpointMergeCallback(**entry["init_args"]).settings
    assert settings.space_name == "pairwise"


def test_where_a_mean_is_best_the_window_is_advised(tmp_path: Path) -> None:
    """Six points around the optimum, none of which another one cancels."""
    circle = [(math.cos(k * math.pi / 3), math.sin(k * math.pi / 3) + 0.1 * (k == 0)) for k in (0, 2, 4, 1, 3, 5)]
    points = [(x, y, *(float(k == j) for j in range(6))) for k, (x, y) in enumerate(circle)]
    advice = found_by(study(tmp_path, Quadratic(points)))["advice"]
    assert advice["choice"] == "best mean"
    assert advice["config"]["search"] == {"space": "window"}
    assert advice["config"]["buffer"]["capacity"] == 6
    assert "it is the longest that was scored" in advice["how_many"]
    CheckpointMergeCallback(**advice["config"])


def test_where_nothing_helps_that_is_said(tmp_path: Path) -> None:
    """On the way to an optimum at 0 the newest checkpoint beats all means."""
    straight = [(6.0 - k, 0.0) for k in range(6)]
    advice = found_by(study(tmp_path, Quadratic(straight)))["advice"]
    assert advice["status"] == "rejected"
    assert advice["choice"] == "newest checkpoint"
    assert advice["config"] == {"monitor": "val_loss"}
    assert "Merging these checkpoints did not help" in advice["text"]
    assert ", past the newer one." in advice["how"]


def test_without_a_confirmation_half_no_gain_is_claimed(tmp_path: Path) -> None:
    scores = study(tmp_path, Quadratic(), can_confirm=lambda: False)
    advice = found_by(scores)["advice"]
    assert advice["status"] == "unconfirmed"
    assert "No batches were left to confirm it" in advice["what"]


def test_the_direction_of_the_metric_counts(tmp_path: Path) -> None:
    class Reward(Quadratic):
        def __call__(self, merge: Any, half: Any) -> Any:
            score = super().__call__(merge, half)
            negated = tuple(-v for v in score.values_B or ())
            return type(score)(value=-score.value, values_B=negated, sizes_B=score.sizes_B, num_batches=8)

    losses, rewards = (tmp_path / name for name in ("losses", "rewards"))
    expected = found_by(study(losses, Quadratic()))
    found = found_by(study(rewards, Reward(), sign=-1), mode="max")
    assert [p["lam"] for p in found["pairs"]] == [p["lam"] for p in expected["pairs"]]
    assert [p["gain_over_better"] for p in found["pairs"]] == [p["gain_over_better"] for p in expected["pairs"]]
    assert found["advice"]["config"]["mode"] == "max"


def test_values_that_are_not_finite_do_not_stop_it(tmp_path: Path) -> None:
    class Bursting(Quadratic):
        def __call__(self, merge: Any, half: Any) -> Any:
            score = super().__call__(merge, half)
            broken = merge.places == (0,) or merge.lam < 0
            return type(score)(value=math.nan, num_batches=8) if broken else score

    found = found_by(study(tmp_path, Bursting()))
    json.dumps(found, allow_nan=False)
    assert found["checkpoints_scored"][0]["value"] is None
    assert found["advice"]["status"] == "accepted"
    again = Bursting()
    assert found_by(study(tmp_path, again)) == found
    assert len(again.asked) == 1


@pytest.mark.parametrize("stop_after", [1, 40, 70])
def test_a_study_that_was_stopped_goes_on(tmp_path: Path, stop_after: int) -> None:
    """Only the newest checkpoint is scored again, which tells whether the data are the same."""
    whole = Quadratic()
    expected = found_by(study(tmp_path / "whole", whole))
    first = Quadratic(stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "cut", first)
    path = tmp_path / "cut" / "evaluations.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "linear 0:1')  # as a crash leaves it
    second = Quadratic()
    assert found_by(study(tmp_path / "cut", second)) == expected
    assert sorted([*first.asked, *second.asked[1:]]) == sorted(whole.asked)
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(records) == len(whole.asked) + 1


def test_other_data_begin_a_study_anew(tmp_path: Path) -> None:
    study(tmp_path, Quadratic())
    other = Quadratic(noise=0.02)
    study(tmp_path, other)
    assert len(other.asked) > 50
    assert len(set(other.asked)) == len(other.asked)


def test_other_checkpoints_begin_a_study_anew(tmp_path: Path) -> None:
    study(tmp_path, Quadratic())
    other = Quadratic()
    study(tmp_path, other, identity="two")
    assert len(other.asked) > 50


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    """A resumed one too: what is there already counts as done."""
    for _ in range(2):
        told: list[tuple[int, int]] = []
        study(tmp_path, Quadratic(), on_scored=lambda amount, total: told.append((amount, total)))  # noqa: B023
        assert sum(amount for amount, _ in told) == told[-1][1] <= PLAN.num_evaluations


@pytest.mark.parametrize("lam", [-0.3, 0.0, 0.2, 0.5, 1.4])
def test_the_vertex_of_a_parabola_is_exact(lam: float) -> None:
    assert vertex(*(3 * (x - lam) ** 2 - 1 for x in (0.0, 0.5, 1.0))) == pytest.approx(lam)
    assert vertex(*(-3 * (x - lam) ** 2 for x in (0.0, 0.5, 1.0))) is None
    assert vertex(math.inf, 0.0, 0.0) is None
