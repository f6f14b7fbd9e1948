from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning_ckmerge import EvaluationConfig
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.plugin.clock import Curve
from lightning_ckmerge.search.verdict import Progress
from tests.support.bitwise import Case, fit, merges_dir
from tests.support.models import Classifier
from tests.support.outcomes import make_outcome
from tests.support.trainers import make_merge, manifests


def test_it_keeps_the_last_third_and_what_is_not_published() -> None:
    curve = Curve()
    for step in range(100, 1001, 100):
        curve.add_validation(step, 1 / step)
    curve.add_validation(1000, math.nan)
    assert [s for s, _ in curve.unpublished] == list(range(100, 1001, 100))
    for step in (300, 600, 900, 1000):
        curve.add_search(make_outcome(step=step, value=2.0))
    assert [s for s, _ in curve.validated] == [700, 800, 900, 1000]
    assert curve.searched == [(900, 2.05), (1000, 2.05)]
    assert curve.unpublished == []
    curve.add_validation(1100, 0.5)
    assert curve.unpublished == [(1100, 0.5)]


def test_a_search_without_a_confirmed_value_adds_none() -> None:
    curve, outcome = Curve(), make_outcome()
    curve.add_search(replace(outcome, anchors=(replace(outcome.anchors[0], confirm=None),)))
    assert curve.searched == []


def test_it_goes_on_after_a_restart() -> None:
    curve, resumed = Curve(), Curve()
    curve.add_validation(900, 0.5)
    curve.add_search(make_outcome(step=1000))
    curve.add_validation(1100, 0.4)
    resumed.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    assert (resumed.validated, resumed.unpublished) == (curve.validated, curve.unpublished)


def test_a_verdict_tells_the_gain_in_steps_of_the_runs_own_slope(tmp_path: Path) -> None:
    """By what the run logged at its validations, which the timeline holds, each once."""
    steps = {"max_epochs": 5, "val_check_interval": 2, "limit_train_batches": 6}
    case = Case(model=partial(Classifier, scheduler=None, optimizer="sgd"), trainer=steps)
    run = fit(case, tmp_path, [make_merge(every_n_train_steps=10, evaluation=EvaluationConfig(confirm_fraction=0.8))])
    validated = [tuple(v) for r in read_timeline(merges_dir(run)) for v in r["validation"]]
    assert [s for s, _ in validated] == list(range(2, 30, 2))
    for manifest in manifests(merges_dir(run)):
        verdict, step = manifest["verdict"], manifest["step"]
        searched = [(m["step"], m["anchors"][0]["confirm"]["value"]) for m in manifests(merges_dir(run))]
        # The step's own validation comes after its search.
        known = ([p for p in validated if p[0] < step], [p for p in searched if p[0] <= step])
        expected = Progress(step, known).steps_worth(verdict["gain"], 1)
        assert verdict["equivalent_steps"] == (expected if verdict["status"] == "accepted" else None)
