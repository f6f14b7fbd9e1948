from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge import BufferConfig
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.offline import NUM_STEPS, write_config

pytestmark = pytest.mark.filterwarnings("ignore")
# One layer of 8 weights and a bias, in float32.
MODEL_BYTES = 36


def plan_of(path: Path, code: int = 0) -> dict[str, Any]:
    found = ckmerge_json("plan", path, code=code)
    assert found["ok"] is (code == 0)
    (plan,) = found["plans"]
    return dict(plan)


def test_a_plan_counts_what_the_run_will_take(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, buffer={"capacity": 4, "every_n_train_steps": 5}, save_top_k=2))
    assert plan["num_parameters"] == 9
    assert (plan["total_steps"], plan["num_searches"], plan["segment_steps"]) == (NUM_STEPS, 4, 5)
    # Two segments in progress; twice the buffer, a pair being pooled, and what the last two checkpoints hold.
    assert plan["buffer_memory"] == 2 * MODEL_BYTES
    assert plan["search_memory"] == MODEL_BYTES + 256_000_000
    assert plan["disk"] == (2 * 4 + 2 + 2) * MODEL_BYTES + 4 * MODEL_BYTES
    assert (plan["search_batches"], plan["confirm_batches"]) == (20, 20)
    assert plan["evaluations"] == 20 * (10 + 3) + 3 * 20
    assert plan["free_disk"] > 0


@pytest.mark.parametrize(
    ("trainer", "config", "field", "value"),
    [
        ({"devices": 4, "strategy": "ddp"}, {"buffer": {"storage": "cpu", "capacity": 6}}, "buffer_memory", 2.5),
        ({"devices": 4, "strategy": "ddp"}, {}, "search_batches", 5),
        ({"max_steps": -1, "max_epochs": 2}, {}, "total_steps", 320),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 4}, {}, "total_steps", 80),
        ({}, {"every_n_train_steps": 30}, "num_searches", 3),
        ({}, {"evaluation": {"limit_batches": 10}}, "search_batches", 5),
        ({"limit_val_batches": 0.5}, {}, "confirm_batches", 10),
        ({}, {"search": {"space": "auto"}}, "space", "auto"),
        # A gradient, as three evaluations, and up to three candidates.
        ({}, {"search": {"refine": "gradient", "n_trials": 3}}, "evaluations", 20 * (10 + 3 + 3 + 3) + 3 * 20),
    ],
)
def test_a_plan_follows_the_config(
    tmp_path: Path, trainer: dict[str, Any], config: dict[str, Any], field: str, value: Any
) -> None:
    plan = plan_of(write_config(tmp_path, trainer=trainer, **config))
    if field == "buffer_memory":
        # Ten snapshots of the model over four ranks.
        assert plan[field] == value * MODEL_BYTES
    else:
        assert plan[field] == value


def test_means_in_host_memory_are_told_with_their_staging_and_their_traffic(tmp_path: Path) -> None:
    """Of four ranks each sends a quarter; the copy that it waits in is counted with the means."""
    config = write_config(
        tmp_path, trainer={"devices": 4, "strategy": "ddp"}, buffer={"accumulate_on": "host", "bucket_size": "1KB"}
    )
    plan = plan_of(config)
    assert plan["buffer_memory"] == (2 + 1) * MODEL_BYTES // 4
    assert (plan["update_bytes"], plan["update_every"]) == (MODEL_BYTES // 4, 3)
    assert MODEL_BYTES // 4 <= plan["staging_memory"] <= MODEL_BYTES // 4 + 32
    assert "go from it to the host every 3 steps" in ckmerge("plan", config).stdout


def test_an_unsupported_strategy_is_a_finding_with_the_reason(tmp_path: Path) -> None:
    strategy = {"class_path": "tests.support.offline.OwnStrategy", "init_args": {"accelerator": None}}
    plan = plan_of(write_config(tmp_path, trainer={"strategy": strategy}), code=1)
    assert "got OwnStrategy. Supported: a single device" in plan["faults"][0]


def test_a_search_that_its_budget_does_not_allow_is_foretold(tmp_path: Path) -> None:
    (warning,) = plan_of(write_config(tmp_path))["warnings"]
    assert "`search.max_fraction_of_training` allows 5 %" in warning
    assert plan_of(write_config(tmp_path, search={"max_fraction_of_training": None}))["warnings"] == []


def test_data_that_is_elsewhere_leaves_a_plan_with_a_warning(tmp_path: Path) -> None:
    plan = plan_of(write_config(tmp_path, data="BrokenData"))
    assert "FileNotFoundError: shards of the cluster" in plan["warnings"][0]
    assert plan["search_batches"] is None
    assert plan["buffer_memory"] == 2 * MODEL_BYTES


def test_an_earlier_run_in_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "merges").mkdir()
    (tmp_path / "merges" / "timeline.jsonl").write_text("")
    plan = plan_of(write_config(tmp_path, dirpath=str(tmp_path / "merges")))
    assert any("already holds a run" in warning for warning in plan["warnings"])


def test_nothing_is_written_and_the_text_says_the_same(tmp_path: Path) -> None:
    path = write_config(tmp_path, dirpath=str(tmp_path / "merges"))
    text = ckmerge("plan", path).output
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    assert "up to 320 forward batches" in text
    assert "SingleDeviceStrategy, 1 rank" in text


def test_a_config_without_the_callback_is_planned_with_its_defaults(tmp_path: Path) -> None:
    path = write_config(tmp_path, trainer={"callbacks": None})
    assert plan_of(path)["space"] == "grouped"
    assert BufferConfig().capacity == 10
    assert "no CheckpointMergeCallback" in ckmerge("plan", path).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "must be YAML, got expected the node content, but found '<stream end>' in line 1 in "),
        ("- a", "must be a mapping, got list"),
        ("", "must be a mapping, got nothing"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert message in ckmerge("plan", tmp_path / "run.yaml", code=2).stderr


@pytest.mark.parametrize("command", [["plan"], ["search", "--checkpoints", "c", "--out", "o", "--config"]])
@pytest.mark.parametrize(("name", "why"), [("nope.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_config_that_cannot_be_read_is_an_error_with_its_remedy(
    tmp_path: Path, command: list[str], name: str, why: str
) -> None:
    error = ckmerge(*command, tmp_path / name, code=2).stderr
    assert error == (
        f"error: the config must be a file that can be read, got {tmp_path / name}: {why}. Check the path.\n"
    )


@pytest.mark.parametrize(("num", "is_told"), [(2, True), (9, True), (10, False), (None, False)])
def test_too_few_batches_for_a_verdict_are_foretold(tmp_path: Path, num: int | None, is_told: bool) -> None:
    found = plan_of(write_config(tmp_path, evaluation={"limit_batches": num}))["warnings"]
    assert any("A verdict needs at least 5 confirmation batches" in w for w in found) is is_told


def test_a_config_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes live in the user's own files, which a console script does not see by itself."""
    (tmp_path / "users_own_module.py").write_text("from tests.support.offline import Wandering as Own\n")
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("tests.support.offline.Wandering", "users_own_module.Own"))
    monkeypatch.chdir(tmp_path)
    assert ckmerge_json("plan", path)["ok"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"moniter": "val_loss"},
            "`fit` runs with, got lightning_ckmerge.CheckpointMergeCallback: Option 'moniter' is not",
        ),
        (
            {"search": {"n_trials": "ten"}},
            "search.n_trials: Expected a <class 'int'>. Got value: ten. Correct that entry",
        ),
        (
            {"every_n_train_steps": 2.5},
            "every_n_train_steps: Expected a <class 'int'>; Given value: 2.5. Correct that entry",
        ),
        ({"search": {"n_trials": 0}}, "error: `search.n_trials >= 1` must hold, got 0. The default is 16."),
        ({"data": "NoData"}, "module 'tests.support.offline' has no attribute 'NoData'. Run from the directory where"),
        ({"trainer": {"max_stepz": 1}}, "Group 'trainer' does not accept option 'max_stepz'. Correct that entry"),
    ],
)
def test_of_a_parsers_long_account_the_line_that_matters_is_shown(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    error = ckmerge("plan", write_config(tmp_path, **config), code=2).stderr
    assert message in error
    assert "Subtypes" not in error
    assert len(error) < 400
