from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_ckmerge import EvaluationConfig, SearchConfig, load_merged, search_checkpoints
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.checkpoints.formats import find_sources, open_source
from lightning_ckmerge.cli.main import app
from lightning_ckmerge.errors import ArtifactError, ConfigError, MonitorError
from lightning_ckmerge.tensorfiles.durable import file_record
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.offline import EVERY, NUM_STEPS, PointsData, Wandering, train_without_merging, write_config
from tests.support.postgres import PG_CTL, postgres
from tests.support.ranks import forkserver
from tests.support.trainers import make_trainer

ROOT = Path(__file__).parents[2]
STEPS = list(range(EVERY, NUM_STEPS + 1, EVERY))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_without_merging(tmp_path_factory.mktemp("run"))


def search_args(checkpoints: Path, root: Path, *more: object, **config: Any) -> list[object]:
    path = write_config(root, **config)
    return ["search", "--config", path, "--checkpoints", checkpoints, "--out", root / "merges", *more]


def num_trials(root: Path) -> int:
    """The sampler's trials in the journal."""
    backend = optuna.storages.journal.JournalFileBackend(str(root / "merges" / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    (study,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=study, storage=storage).trials
    return len([t for t in trials if t.user_attrs["name"].startswith("trial-")])


def test_the_merge_of_checkpoints_is_published_as_a_run_would(checkpoints: Path, tmp_path: Path) -> None:
    found = ckmerge_json(*search_args(checkpoints, tmp_path))
    assert found["verdict"]["status"] == "accepted"
    manifest = ckmerge_json("show", tmp_path / "merges")
    assert manifest["step"] == NUM_STEPS
    assert [(s["kind"], s["last_step"]) for s in manifest["snapshots"]] == [("point", step) for step in STEPS]
    sha256 = [file_record(path)["sha256"] for path in find_sources(checkpoints)[: len(STEPS) - 1]]
    assert [s["sha256"] for s in manifest["snapshots"]] == [*sha256, None]
    assert all(a["search"]["num_batches"] for a in manifest["anchors"])
    assert manifest["cost"]["share_of_training"] is None
    assert ckmerge_json("list", tmp_path / "merges")["best"] == f"step={NUM_STEPS:09d}"


def test_it_follows_gradients_too(checkpoints: Path, tmp_path: Path) -> None:
    ckmerge_json(*search_args(checkpoints, tmp_path, search={"refine": "gradient", "n_trials": 4}))
    manifest = ckmerge_json("show", tmp_path / "merges")
    assert manifest["trials"][4]["name"] == "refined-0"
    assert manifest["verdict"]["warnings"] == []


def test_values_are_those_of_trainer_validate(checkpoints: Path, tmp_path: Path) -> None:
    """With all batches in the search half, of which nothing can be confirmed."""
    found = ckmerge_json(*search_args(checkpoints, tmp_path, evaluation={"confirm_fraction": 0.02}), code=1)
    manifest = ckmerge_json("show", found["artifact"])
    module = Wandering()
    trainer = make_trainer()

    def value() -> float:
        return float(trainer.validate(module, datamodule=PointsData(), verbose=False)[0]["val_loss"])

    load_merged(found["artifact"], module)
    winner = next(t for t in [*manifest["anchors"], *manifest["trials"]] if t["name"] == found["verdict"]["winner"])
    assert value() == pytest.approx(winner["search"]["value"], rel=1e-5)
    newest = open_source(find_sources(checkpoints)[len(STEPS) - 1])
    module.load_state_dict(dict(newest.weights))
    assert value() == pytest.approx(manifest["anchors"][0]["search"]["value"], rel=1e-5)


@pytest.mark.parametrize("search", [{}, {"space": "auto"}], ids=["default", "auto"])
def test_the_artifact_can_be_rebuilt_from_the_checkpoints(
    checkpoints: Path, tmp_path: Path, search: dict[str, Any]
) -> None:
    config = {"search": {"n_trials": 3, **search}}
    artifact = ckmerge_json(*search_args(checkpoints, tmp_path, **config))["artifact"]
    last = find_sources(checkpoints)[len(STEPS) - 1]
    args = ("verify", artifact, "--rebuild", "--checkpoints", checkpoints, "--latest", last)
    assert ckmerge_json(*args)["rebuild"]["state"] == "equal"
    calls = load_merged(artifact, Wandering()).tensors()["calls"]
    assert torch.equal(calls, open_source(last).weights["calls"])


def test_a_checkpoint_of_several_files_is_rebuilt_from_all_of_them(checkpoints: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(checkpoints, own)
    *_, before, last = find_sources(own)[: len(STEPS)]
    weights = {n: t.clone() for n, t in open_source(before).weights.items()}
    before.unlink()
    sharded = own / f"step={STEPS[-2]}"
    sharded.mkdir()
    for name, tensor in weights.items():
        save_file({name: tensor}, sharded / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in weights}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    artifact = ckmerge_json(*search_args(own, tmp_path))["artifact"]
    snapshot = ckmerge_json("show", artifact)["snapshots"][-2]
    assert snapshot["sha256"] is None
    assert snapshot["files_sha256"] == [file_record(p)["sha256"] for p in sorted(sharded.glob("*.safetensors"))]
    args = ("verify", artifact, "--rebuild", "--checkpoints", own, "--latest", last)
    assert ckmerge_json(*args)["rebuild"]["state"] == "equal"


def test_a_search_goes_on_where_it_was_stopped(checkpoints: Path, tmp_path: Path) -> None:
    first, second = (
        ckmerge_json(
            "show", ckmerge_json(*search_args(checkpoints, tmp_path, "--n-trials", n, save_top_k=-1))["artifact"]
        )
        for n in (2, 5)
    )
    assert num_trials(tmp_path) == 5
    assert [t["coordinates"] for t in second["trials"][:2]] == [t["coordinates"] for t in first["trials"]]
    assert [t["search"] for t in second["trials"][:2]] == [t["search"] for t in first["trials"]]


def test_other_checkpoints_are_another_search(checkpoints: Path, tmp_path: Path) -> None:
    ckmerge_json(*search_args(checkpoints, tmp_path))
    found = ckmerge_json(*search_args(checkpoints, tmp_path, "--last", 3))
    assert [Path(p).name for p in found["checkpoints"]] == [p.name for p in find_sources(checkpoints)[5:8]]
    assert len(ckmerge_json("show", found["artifact"])["snapshots"]) == 3


def run_elsewhere(args: list[str], cwd: Path, output: Path) -> None:
    os.chdir(cwd)
    with output.open("w") as file, redirect_stdout(file):
        app(args)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/study.db"
    elif PG_CTL is None:
        pytest.skip("no PostgreSQL server on this machine")
    else:
        with postgres() as url:
            yield url


def test_processes_share_one_search(checkpoints: Path, tmp_path: Path, database: str) -> None:
    """In processes of their own, from another directory, as on several devices."""
    args = search_args(checkpoints, tmp_path, "--n-trials", 8, "--storage", database, "--json")
    commands = [[*map(str, args)], [*map(str, args), "--worker"]]
    outputs = [tmp_path / f"{i}.json" for i in range(len(commands))]
    processes = [
        forkserver().Process(target=run_elsewhere, args=(command, tmp_path, output))
        for command, output in zip(commands, outputs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [p.exitcode for p in processes] == [0, 0], "the tracebacks are on stderr"
    first, worker = (json.loads(output.read_text()) for output in outputs)
    assert first["verdict"]["status"] == "accepted"
    assert worker["scored"] >= 1
    study = optuna.load_study(study_name=None, storage=database)
    trials = [t for t in study.trials if t.user_attrs["name"].startswith("trial-")]
    assert 8 <= len(trials) <= 9
    assert [p.name for p in (tmp_path / "merges").glob("step=*")] == [f"step={NUM_STEPS:09d}"]
    assert len(ckmerge_json("show", tmp_path / "merges")["trials"]) == 8


def test_a_config_of_a_class_of_ones_own_names_the_classes(checkpoints: Path, tmp_path: Path) -> None:
    """``LightningCLI(Module, Data)`` leaves them out."""
    args = search_args(checkpoints, tmp_path)
    path = tmp_path / "run.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"], config["data"] = {"width": 8}, {}
    path.write_text(yaml.safe_dump({"fit": config}))
    assert "--model-class" in ckmerge(*args, code=2).stderr
    classes = ("--model-class", "tests.support.offline.Wandering", "--data-class", "tests.support.offline.PointsData")
    assert ckmerge_json(*args, *classes)["verdict"]["status"] == "accepted"


def test_a_merge_that_does_not_help_is_a_finding(checkpoints: Path, tmp_path: Path) -> None:
    """With the mode turned round the latest weights, the worst, are the best of all means."""
    config = {"mode": "max", "check_mode": False, "search": {"space": "window", "n_trials": 2}}
    found = ckmerge_json(*search_args(checkpoints, tmp_path, **config), code=1)
    assert found["verdict"]["status"] == "rejected"


@pytest.mark.parametrize(
    ("more", "config", "message"),
    [
        (("--monitor", "loss"), {}, "Logged are: val_loss"),
        (
            ("--monitor", "val_acc"),
            {},
            "got 'min' for 'val_acc', for which higher is better judging by its name. Use 'max', or",
        ),
        (("--mode", "max"), {}, "got 'max' for 'val_loss', for which lower is better judging by its name"),
        (("--monitor", "val_acc", "--mode", "max"), {}, "Logged are: val_loss"),
        (("--last", "1"), {}, "needs two checkpoints"),
        (
            ("--storage", "mysql://a:secret@b/c"),
            {},
            "got mysql://...@b/c: No module named 'MySQLdb'. Install that driver",
        ),
        (("--storage", "sqlite:////dev/null/x"), {}, "unable to open database file. Check the URL"),
        ((), {"trainer": {"max_stepz": 1}}, "max_stepz"),
        ((), {"search": {"n_trials": 0}}, "`search.n_trials >= 1` must hold"),
        (("--model-class", "tests.support.offline.Gone"), {}, "import path, got 'tests.support.offline.Gone'"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    checkpoints: Path, tmp_path: Path, more: tuple[str, ...], config: dict[str, Any], message: str
) -> None:
    assert message in ckmerge(*search_args(checkpoints, tmp_path, *more, **config), code=2).stderr
    assert not list((tmp_path / "merges").glob("step=*"))


def test_checkpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for step in (1, 2):
        torch.save(
            {"state_dict": {"layer.weight": torch.ones(1, 3)}, "global_step": step}, checkpoints / f"{step}.ckpt"
        )
    error = ckmerge(*search_args(checkpoints, tmp_path), code=2).stderr
    assert "layer.weight of another shape" in error
    assert "calls, layer.bias missing from 2.ckpt" in error


def test_a_checkpoint_without_a_step_is_refused(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    torch.save(Wandering().state_dict(), checkpoints / "final.pt")
    assert "must tell its step" in ckmerge(*search_args(checkpoints, tmp_path), code=2).stderr


@pytest.mark.parametrize("as_given", ["directory", "pattern", "files"])
def test_a_function_makes_the_artifact_that_the_command_makes(checkpoints: Path, tmp_path: Path, as_given: str) -> None:
    """No config, no LightningCLI, no training data."""
    files = sorted(checkpoints.glob("*.ckpt"), reverse=True)
    paths: Any = {"directory": checkpoints, "pattern": f"{checkpoints}/*.ckpt", "files": files}[as_given]
    module = Wandering()
    found = search_checkpoints(
        module,
        PointsData().val_dataloader(),
        paths,
        dirpath=tmp_path / "merges",
        search=SearchConfig(n_trials=3),
        trainer={"accelerator": "cpu"},
    )
    (tmp_path / "cli").mkdir()
    expected = ckmerge_json(*search_args(checkpoints, tmp_path / "cli", buffer={"snapshot": "point"}))
    command = ckmerge_json("show", expected["artifact"])
    for name in ("coefficients", "coordinates", "snapshots", "step", "monitor", "mode"):
        assert found.manifest[name] == command[name], name
    assert found.manifest["verdict"]["status"] == "accepted"
    newest = open_source(checkpoints / "last.ckpt")
    assert torch.equal(module.layer.weight.detach(), newest.weights["layer.weight"])
    assert module.configure_callbacks() == []
    assert "configure_callbacks" not in vars(module)
    load_merged(found, module)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}


def test_other_checkpoints_have_a_place_of_their_own(checkpoints: Path, tmp_path: Path) -> None:
    """Be their names equal. Goes red if a search takes another's place, or returns an accepted merge without weights.

    The same search done again takes the place of its first artifact. The evaluation is given as a mapping, as the
    callback takes it.
    """
    others = tmp_path / "others"
    others.mkdir()
    for path in checkpoints.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"]["layer.bias"] += 0.5
        torch.save(checkpoint, others / path.name)

    def search(paths: Path) -> Artifact:
        return search_checkpoints(
            Wandering(),
            PointsData().val_dataloader(),
            paths,
            dirpath=tmp_path / "merges",
            search=SearchConfig(n_trials=1),
            evaluation={"limit_batches": 30},  # type: ignore[arg-type]
            trainer={"accelerator": "cpu"},
        )

    first = search(checkpoints)
    merged = contents(first.path)
    second, again = search(others), search(checkpoints)
    assert first.manifest["verdict"]["status"] == again.manifest["verdict"]["status"] == "accepted"
    assert [a.path.parent for a in (first, second, again)] == [
        tmp_path / "merges",
        tmp_path / "merges" / "run=2",
        tmp_path / "merges",
    ]
    assert again.has_weights
    assert contents(again.path) == merged
    assert [p.resolve() for p in (tmp_path / "merges").glob("step=*")] == [again.path]
    assert (tmp_path / "merges" / "best").resolve() == again.path
    load_merged(again, Wandering())
    assert num_trials(tmp_path) == 1


@pytest.mark.parametrize(
    ("module", "loaders", "message"),
    [
        (Wandering, None, "`module` must be a LightningModule, got the class Wandering"),
        (torch.nn.Linear(1, 1), None, "`module` must be a LightningModule, got a Linear"),
        (Wandering(), PointsData(), "`val_dataloaders` must be loaders, .*, got a PointsData"),
        (Wandering(), PointsData, "`val_dataloaders` must be loaders, .*, got the class PointsData"),
    ],
)
def test_a_module_and_loaders_are_demanded(
    checkpoints: Path, tmp_path: Path, module: Any, loaders: Any, message: str
) -> None:
    loaders = loaders or PointsData().val_dataloader()
    options: Any = {"dirpath": tmp_path / "merges", "trainer": {"accelerator": "cpu"}}
    with pytest.raises(ConfigError, match=message):
        search_checkpoints(module, loaders, checkpoints, **options)
    assert not list((tmp_path / "merges").glob("step=*"))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"monitor": "val_los"}, MonitorError, "got 'val_los'"),
        ({"monitor": ""}, ConfigError, "`monitor` must name one metric or several different ones, got ''"),
        ({"mode": "max"}, ConfigError, "for which lower is better"),
        ({"mode": "max", "monitor": "val_los", "check_mode": False}, MonitorError, "got 'val_los'"),
        ({"dirpath": ""}, ConfigError, "`dirpath` must name a directory, got ''"),
        ({"dirpath": "s3://bucket/run"}, ConfigError, "got the URL"),
        ({"dirpath": "/dev/null/merges"}, ConfigError, "must be a directory that can be written to"),
        ({"paths": "nowhere/*.ckpt"}, ArtifactError, "got 'nowhere/\\*.ckpt', which matches nothing"),
        ({"paths": []}, ArtifactError, "two checkpoints or more, got none. Name"),
        ({"last": 1}, ArtifactError, "two checkpoints or more, got 1"),
        ({"evaluation": EvaluationConfig(recalibrate_batches=2)}, ConfigError, "needs training data"),
        ({"trainer": {"accelerator": "cpu", "devices": 2}}, ConfigError, "takes one device, got 2"),
        ({"search": {"n_trails": 2}}, ConfigError, "`search` must have the fields"),
    ],
)
def test_the_function_refuses_with_the_reason(
    checkpoints: Path, tmp_path: Path, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    own = {"search": SearchConfig(n_trials=1), "trainer": {"accelerator": "cpu"}, "dirpath": tmp_path / "merges"}
    options = {"paths": checkpoints, **own, **wrong}
    with pytest.raises(error, match=message):
        search_checkpoints(Wandering(), PointsData().val_dataloader(), **options)
    assert not list((tmp_path / "merges").glob("step=*"))


def test_a_search_can_be_explained(checkpoints: Path, tmp_path: Path) -> None:
    """The forecast comes first; a dry run ends there and writes nothing."""
    artifact = Path(ckmerge_json(*search_args(checkpoints, tmp_path))["artifact"])
    args = ("explain", artifact, "--config", tmp_path / "run.yaml", "--checkpoints", checkpoints)
    told = ckmerge(*args, "--dry-run").stderr
    assert re.search(r"at most \d+ evaluations \(snapshots \d+, line 9", told)
    assert not (artifact / "explain.json").exists()
    account = ckmerge_json(*args, "--max-evaluations", 20, "--curvature-batches", 1)
    assert len(account["points"]) <= 20
    assert account["figures"]["curvature"]["num_batches"] == 1
    assert "all of one layer" in account["left_out"]["layers"]
    assert "## Why it works or not" in ckmerge_json("report", artifact)["markdown"]
    assert ckmerge("verify", artifact)
