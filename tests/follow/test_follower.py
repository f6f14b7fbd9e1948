"""A follower finds what the run would have found itself, bit for bit, while training goes on."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from lightning_ckmerge import CheckpointMergeCallback, SearchConfig, load_merged
from lightning_ckmerge.artifact.due import DueSearch, RunSign, list_due, read_due, read_results
from lightning_ckmerge.artifact.leases import Lease, find_lease
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.standing import read_standing
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.checkpoints.rebuild import rebuild
from lightning_ckmerge.cli.main import app
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.follow.follower import FollowOptions, follow_run
from lightning_ckmerge.plugin.offline.scoring import make_trainer
from lightning_ckmerge.plugin.plan import plan_rows
from lightning_ckmerge.plugin.rank import due as rank_due
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.follow import (
    EVERY,
    NUM_STEPS,
    FollowerProcess,
    Gated,
    InStep,
    config_of,
    die,
    fit,
    make_callback,
)
from tests.support.postgres import PG_CTL, postgres
from tests.support.rank_runs import Classifier, make_rank_merge, points
from tests.support.rank_runs import fit as fit_rank
from tests.support.ranks import RankPool, forkserver
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has searched itself."""
    root = tmp_path_factory.mktemp("inside")
    fit(root, search={"where": "training"})
    return root


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointMergeCallback, Any]:
    """The directory of the same run with a follower beside it, its callback, and what the follower told."""
    root = tmp_path_factory.mktemp("followed")
    config_of(root)
    with FollowerProcess(root) as follower:
        options = {"logger": CSVLogger(root, name="", version=""), "log_every_n_steps": 1}
        callback = fit(root, InStep(root / "merges"), trainer=options)
        return root, callback, follower.result()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody has followed."""
    root = tmp_path_factory.mktemp("left")
    fit(root)
    return root


@pytest.fixture
def due(left: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    root = tmp_path / "left"
    shutil.copytree(left, root)
    config_of(root)
    return root


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    path = tmp_path / "gate"
    path.mkdir()
    return path


def published(dirpath: Path) -> list[str]:
    return sorted(p.name for p in dirpath.glob("step=*"))


def test_it_publishes_the_same_bits(inside: Path, followed: tuple[Path, Any, Any]) -> None:
    dirpaths = [inside / "merges", followed[0] / "merges"]
    names = published(dirpaths[0])
    assert names == published(dirpaths[1]) == [f"step={step:09d}" for step in (EVERY, NUM_STEPS)]
    for name in names:
        one, other = (read_manifest(d / name) for d in dirpaths)
        assert one["files"]["model.safetensors"] == other["files"]["model.safetensors"]
        for part in ("snapshots", "anchors", "trials", "verdict", "coordinates", "evaluation"):
            assert one[part] == other[part], part
    assert len({(d / "best").resolve().name for d in dirpaths}) == 1
    one, other = ([(r["step"], r["status"], r["values"], r["validation"]) for r in read_timeline(d)] for d in dirpaths)
    assert one == other
    standings = [read_standing(d) for d in dirpaths]
    assert standings[0] is not None
    assert standings[1] is not None
    assert standings[0] == replace(standings[1], run_id=standings[0].run_id)
    assert standings[0].is_final


def test_the_run_learns_of_the_result(followed: tuple[Path, CheckpointMergeCallback, Any]) -> None:
    root, callback, told = followed
    assert told["ending"] == "ended"
    assert [(r["status"], r["step"]) for r in told["results"]] == [("published", EVERY), ("published", NUM_STEPS)]
    best = callback.best_artifact
    assert best is not None
    assert best.path == (root / "merges" / "best").resolve()
    with (root / "metrics.csv").open() as file:
        logged = {int(row["step"]) for row in csv.DictReader(file) if row.get("merge/gain")}
    assert logged == {EVERY, NUM_STEPS}


def test_nothing_is_left_behind_a_followed_run(followed: tuple[Path, Any, Any]) -> None:
    merges = followed[0] / "merges"
    assert list_due(merges) == []
    assert not list((merges / "follow").rglob("*.safetensors"))


def test_training_is_not_touched(left: Path, tmp_path: Path) -> None:
    """No validation but the run's own, and the weights of the run without the callback."""
    counts, weights = [], []

    class Count(pl.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            counts.append(1)

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            weights.append([t.clone() for t in pl_module.state_dict().values()])

    fit(tmp_path / "with", Count())
    num = len(counts)
    fit(tmp_path / "without", Count(), every_n_train_steps=10**6, search_on_train_end=False)
    assert len(counts) == 2 * num
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_what_no_follower_has_searched_is_told(due: Path) -> None:
    """The newest due search stays whole; the one before was taken away, which a follower enters into the timeline."""
    merges = due / "merges"
    assert [r.status for r in read_results(merges).values()] == ["evicted"]
    assert [d.name[:14] for d in list_due(merges)] == [f"step={NUM_STEPS:09d}"]
    told = ckmerge_json("follow", merges, "--config", due / "run.yaml", "--poll", 0.01)
    assert [r["step"] for r in told["results"]] == [NUM_STEPS]
    assert [(r["step"], r["status"]) for r in read_timeline(merges)] == [(NUM_STEPS, "accepted"), (EVERY, "skipped")]
    again = ckmerge("follow", merges, "--config", due / "run.yaml", "--poll", 0.01).stdout.splitlines()
    assert again == [f"following {merges}", "the run has ended: took 0 searches"]
    assert len(read_timeline(merges)) == 2


def test_another_follower_goes_on_where_one_was_killed(due: Path, gate: Path) -> None:
    config_of(due, model=Gated)
    with FollowerProcess(due, gate=gate) as follower:
        follower.wait_for_gate(gate)
        (path,) = list_due(due / "merges")
        assert find_lease(path) is not None
        follower.kill()
        assert find_lease(path) is None
    config_of(due)
    with FollowerProcess(due) as other:
        assert [r["status"] for r in other.result()["results"]] == ["published"]
    ckmerge("verify", due / "merges" / f"step={NUM_STEPS:09d}")


def test_a_killed_run_is_followed_to_its_end(tmp_path: Path) -> None:
    config_of(tmp_path)
    process = forkserver().Process(target=die, args=(tmp_path, EVERY + 2))
    process.start()
    process.join(200)
    assert process.exitcode == -9
    with FollowerProcess(tmp_path, "--timeout", 0.5) as follower:
        told = follower.result(code=1)
    assert told["ending"] == "lost"
    assert published(tmp_path / "merges") == [f"step={EVERY:09d}"]


@pytest.fixture(params=["journal", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "journal":
        yield None
    elif PG_CTL is None:
        pytest.skip("no PostgreSQL server on this machine")
    else:
        with postgres() as url:
            yield url


def test_followers_share_a_search_and_survive_its_leader(due: Path, gate: Path, storage: str | None) -> None:
    config_of(due, model=Gated, search={"n_trials": 8})
    more = ["--share", *(["--storage", storage] if storage else [])]
    with (
        FollowerProcess(due, *more, name="0", gate=gate) as first,
        FollowerProcess(due, *more, name="1", gate=gate) as second,
        FollowerProcess(due, *more, name="2", gate=gate) as third,
    ):
        followers = {f.process.pid: f for f in (first, second, third)}
        for follower in followers.values():
            follower.wait_for_gate(gate)
        (path,) = list_due(due / "merges")
        lease = find_lease(path)
        assert lease is not None
        followers.pop(lease.pid).kill()
        (gate / "open").touch()
        told = [f.result() for f in followers.values()]
    results = [r for t in told for r in t["results"]]
    assert [r["status"] for r in results] == ["published"]
    assert all(t["num_helped"] >= 1 for t in told)
    assert len(ckmerge_json("show", due / "merges")["trials"]) == 8
    if storage:
        trials = optuna.load_study(study_name=None, storage=storage).trials
        assert len([t for t in trials if t.user_attrs["name"].startswith("trial-")]) >= 8


def test_a_lease_keeps_what_is_read(tmp_path: Path) -> None:
    """Goes red if the ring evicts what a follower reads, or keeps it when the follower is done."""
    merges = tmp_path / "merges"
    seen: dict[str, Any] = {}

    class Read(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            step = trainer.global_step
            if step == EVERY + 1:
                wait_until(lambda: list_due(merges) and read_due(list_due(merges)[0]))
                seen["due"] = read_due(list_due(merges)[0])
                seen["lease"] = Lease.acquire(seen["due"].path, shares=False)
            if step == 2 * EVERY + 9:
                wait_until(lambda: len([d for d in list_due(merges) if read_due(d)]) == 2)
                seen["held"] = all(path.is_file() for path in files(seen["due"]))
                seen["ring"] = {p.name for p in (merges / "buffer").iterdir()}
                seen["lease"].release()

    def files(due: DueSearch) -> list[Path]:
        return [due.buffer_dirpaths[0] / name for name in due.parts[0].names]

    fit(tmp_path, Read(), max_steps=3 * EVERY)
    assert seen["held"]
    assert seen["lease"] is not None
    assert len(seen["ring"]) > 4
    assert not seen["due"].path.exists()
    assert len(list((merges / "buffer").iterdir())) == 4
    assert [r.status for r in read_results(merges).values()] == ["evicted"] * 2


def test_a_lease_is_taken_once_and_taken_over_when_it_has_run_out(due: Path) -> None:
    (path,) = list_due(due / "merges")
    first = Lease.acquire(path, shares=True, duration_s=300)
    assert first is not None
    assert Lease.acquire(path, shares=True) is None
    record = json.loads((path / "lease-000.json").read_text())
    (path / "lease-000.json").write_text(json.dumps({**record, "expires": 1.0}))
    with Lease.acquire(path, shares=True) or pytest.fail("it has run out") as second:
        assert first.is_lost()
        assert not second.is_lost()
    first.release()
    assert find_lease(path) is None
    # Of one whose follower died while it was written, time alone tells.
    (path / "lease-002.json").touch()
    assert Lease.acquire(path, shares=True) is None


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a step waits for a due search to be written."""
    released, original = [], rank_due._store

    def slow(storage: Any, name: str, *args: Any) -> Any:
        if "-latest" in name:
            wait_until(lambda: released)
        return original(storage, name, *args)

    class Release(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == EVERY + 4:
                assert not any(read_due(d) for d in list_due(tmp_path / "merges"))
                released.append(trainer.global_step)

    monkeypatch.setattr(rank_due, "_store", slow)
    fit(tmp_path, Release(), max_steps=EVERY + 5, search_on_train_end=False)
    assert [read_due(d) is not None for d in list_due(tmp_path / "merges")] == [True]


def train_rank(strategy: str, root: str) -> dict[str, torch.Tensor]:
    """Return the final weights, whole."""
    merge = make_rank_merge(root, search=SearchConfig(n_trials=2, where="follower"), every_n_train_steps=100)
    module = fit_rank(strategy, root, merge, model=ranked).module
    state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in module.state_dict().items()}
    return {n: t.detach().clone() for n, t in state.items()}


def ranked() -> Classifier:
    return Classifier(norm=False)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_are_read_as_one(strategy: str, tmp_path: Path, ranks: RankPool) -> None:
    """The follower's latest weights are the run's, and its merge is that of the ranks' own snapshots."""
    final = ranks.run(train_rank, strategy, str(tmp_path))[0]
    merge = make_rank_merge(str(tmp_path), search=SearchConfig(n_trials=2, where="follower"))
    module = ranked()
    data = {"train_dataloaders": DataLoader(points(8)), "val_dataloaders": DataLoader(points(83), batch_size=8)}
    done = follow_run(
        make_trainer({"accelerator": "cpu"}),
        module,
        data,
        merge.settings,
        tmp_path / "merges",
        FollowOptions(poll_s=0.01),
    )
    assert [r.status for r in done.results] == ["published"]
    assert all(torch.equal(module.state_dict()[n], t) for n, t in final.items())
    artifact = Artifact.open(tmp_path / "merges" / done.results[0].artifact)
    assert all(len(s["files_sha256"]) == 2 for s in artifact.manifest["snapshots"][:-1])
    found = rebuild(artifact, tmp_path / "merges" / "buffer", final)
    assert found.different == ()
    assert found.num_compared == 4
    load_merged(artifact, ranked())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buffer": {"storage": "cpu"}}, "processes can read, got `buffer.storage` 'cpu'. Set it to 'disk'."),
        ({"apply": "on_train_end"}, 'after training only, got `apply` "on_train_end". Use'),
    ],
)
def test_what_followers_cannot_serve_is_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_callback(tmp_path, **wrong)


def test_artifacts_at_a_url_are_refused(tmp_path: Path) -> None:
    buffer = {"dirpath": str(tmp_path / "local")}
    with pytest.raises(
        ConfigError, match=r"both processes see, got the URL memory://.*copy the artifacts from there\."
    ):
        fit(tmp_path, dirpath="memory://follow/run", buffer=buffer, max_steps=1)


def test_the_follower_refuses_another_model_and_a_run_that_searches_itself(due: Path) -> None:
    config = config_of(due, search={"where": "training"})
    merges = due / "merges"
    assert 'got "training". Set it, and' in ckmerge("follow", merges, "--config", config, code=2).stderr
    text = (
        config_of(due)
        .read_text()
        .replace("class_path: tests.support.offline.Wandering", "&model\n")
        .replace("&model\n", "class_path: tests.support.offline.Wandering\n  init_args: {width: 3}")
    )
    config.write_text(text)
    told = CliRunner().invoke(app, ["follow", str(merges), "--config", str(config)])
    assert (told.exit_code, told.stdout) == (2, f"following {merges}\n")
    assert told.stderr.startswith(
        "error: a follower's module must be the run's, got layer.weight of another shape. Use"
    )
    assert len(told.stderr.splitlines()) == 1
    assert read_due(list_due(merges)[0]) is not None
    assert find_lease(list_due(merges)[0]) is None


def test_the_plan_says_who_searches_and_what_is_written(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            (callback,) = [c for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)]
            assert callback._run is not None
            self.plan = callback._run.plan
            assert callback.search_now() is None

    keep = Keep()
    fit(tmp_path, keep, max_steps=1, search_on_train_end=False)
    rows = dict(plan_rows(keep.plan))
    # Nine weights and a counter; their mean.
    assert rows["when one is due"] == "80 B copied to host memory, and written behind training"
    assert rows["who searches"].startswith("a follower, at no cost of training: `ckmerge follow")
    assert "during a search" not in rows
    assert "a full search takes" not in rows


def test_the_end_is_told(left: Path) -> None:
    sign = RunSign.read(left / "merges")
    assert sign is not None
    assert (sign.state, sign.step, sign.left) == ("ended", NUM_STEPS, 2)
