"""The account of a merge of a quadratic's checkpoints: every figure is what the closed form says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ckmerge import Artifact, SearchConfig, explain, search_checkpoints
from lightning_ckmerge.artifact.accounts import ACCOUNT_NAME, PAGE_NAME, read_account
from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.checkpoints.formats import open_source
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.plugin.offline.explain import Forecast
from lightning_ckmerge.tensorfiles.durable import file_record
from tests.support.quadratic_module import NUM_BATCHES, SCALES, STEPS, Bowl, loader, loss, samples, write_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-6}


def predict(module: Bowl, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Whether a sample's first number lies above the first weight; true: above 0."""
    return (batch[0][:, 0] > module.embed.weight[0, 0]).long(), (batch[0][:, 0] > 0).long()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quadratic")
    write_checkpoints(root / "checkpoints")
    search = SearchConfig(n_trials=3, space="decay")
    search_checkpoints(Bowl(), loader(), root / "checkpoints", dirpath=root / "merges", search=search)
    return root


@pytest.fixture(scope="module")
def told(root: Path) -> dict[str, Any]:
    """Forecasts, the hashes before, and the account."""
    forecasts: list[Forecast] = []
    path = root / "merges" / f"step={STEPS[-1]:09d}"
    files = {name: file_record(path / name) for name in Artifact.open(path).manifest["files"]}
    account = explain(
        path,
        Bowl(),
        loader(),
        checkpoints=root / "checkpoints",
        predict=predict,
        curvature_batches=3,
        on_forecast=forecasts.append,
    )
    return {"account": account, "forecast": forecasts[0], "files": files, "path": path}


@pytest.fixture(scope="module")
def account(told: dict[str, Any]) -> dict[str, Any]:
    return told["account"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def weights(root: Path, told: dict[str, Any]) -> dict[Any, dict[str, Tensor]]:
    found: dict[Any, dict[str, Tensor]] = {
        k: dict(open_source(root / "checkpoints" / f"step={step}.ckpt").weights) for k, step in enumerate(STEPS)
    }
    stored = Artifact.open(told["path"]).tensors()
    return {**found, "latest": found[len(STEPS) - 1], "merge": {name: stored[name] for name in SCALES}}


def mix(a: dict[str, Tensor], b: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    return {n: (1 - t) * a[n].double() + t * b[n].double() for n in SCALES}


def test_the_published_files_stay_as_they_are(told: dict[str, Any]) -> None:
    path = told["path"]
    artifact = Artifact.open(path)
    assert {name: file_record(path / name) for name in artifact.manifest["files"]} == told["files"]
    assert not {ACCOUNT_NAME, PAGE_NAME} & told["files"].keys()


def test_the_ends_are_those_of_the_verdict(account: dict[str, Any], weights: dict[Any, Any], told: Any) -> None:
    manifest = Artifact.open(told["path"]).manifest
    assert account["values"]["latest"] == pytest.approx(loss(weights["latest"]), **CLOSE)
    assert account["values"]["merge"] == pytest.approx(manifest["verdict"]["value"], **CLOSE)
    assert account["gain"] == pytest.approx(manifest["verdict"]["gain"], **CLOSE)
    assert (account["half"], account["num_batches"], account["notes"]) == ("confirm", NUM_BATCHES // 2, [])


def test_a_snapshot_counts_by_how_much_the_loss_is_higher_without_it(
    account: dict[str, Any], weights: dict[Any, Any], told: Any
) -> None:
    c_K = Artifact.open(told["path"]).manifest["coefficients"]
    rows = account["figures"]["snapshots"]["rows"]
    scored = [k for k, row in enumerate(rows) if row["value"] is not None]
    assert scored == [k for k, c in enumerate(c_K) if c]
    for k in scored:
        others = [0.0 if j == k else c / (1 - c_K[k]) for j, c in enumerate(c_K)]
        without = {n: sum(c * weights[j][n].double() for j, c in enumerate(others)) for n in SCALES}
        assert rows[k]["value"] == pytest.approx(loss(without), **CLOSE)  # type: ignore[arg-type]
        assert rows[k]["gain"] == pytest.approx(loss(without) - loss(weights["merge"]), **CLOSE)  # type: ignore[arg-type]
        assert rows[k]["interval"][0] <= rows[k]["gain"] <= rows[k]["interval"][1]


def test_the_line_is_a_parabola_without_a_barrier(account: dict[str, Any], weights: dict[Any, Any]) -> None:
    line = account["figures"]["line"]
    expected = [loss(mix(weights["latest"], weights["merge"], t)) for t in line["places"]]
    assert line["values"] == pytest.approx(expected, **CLOSE)
    assert line["barrier"] == 0
    assert "no barrier" in line["sentence"]
    flat = [torch.cat([weights[name][n].reshape(-1) for n in SCALES]) for name in ("latest", "merge")]
    assert line["distance"] == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5)


def test_parts_that_do_not_act_on_each_other_add_up(account: dict[str, Any], weights: dict[Any, Any]) -> None:
    """The Hessian is diagonal."""
    parts = {
        "groups": ["embeddings", "mlp", "attention"],
        "layers": ["outside layers", "layer 0", "layer 1"],
    }
    for key, names in parts.items():
        figure = account["figures"][key]
        by_name = {row["name"]: row for row in figure["rows"]}
        assert figure["sum"] == pytest.approx(figure["gain"], **CLOSE)
        for name, tensor in zip(names, SCALES, strict=True):
            alone = {**weights["latest"], tensor: weights["merge"][tensor]}
            expected = loss(weights["latest"]) - loss(alone)
            row = by_name[name]
            assert row["alone"] == pytest.approx(expected, **CLOSE)
            assert row["without"] == pytest.approx(expected, **CLOSE)
        assert sum(row["way"] for row in figure["rows"]) == pytest.approx(1)


def test_the_plane_has_the_losses_of_its_places(account: dict[str, Any], weights: dict[Any, Any]) -> None:
    plane = account["figures"]["plane"]
    mean = {n: sum(weights[k][n].double() for k in range(len(STEPS))) / len(STEPS) for n in SCALES}
    latest, merge, third = (
        torch.cat([w[n].double().reshape(-1) for n in SCALES]) for w in (weights["latest"], weights["merge"], mean)
    )
    right = (merge - latest) / (merge - latest).norm()
    up = third - latest - right * ((third - latest) @ right)
    up = up / up.norm()
    for y, row in zip(plane["y"], plane["values"], strict=True):
        for x, value in zip(plane["x"], row, strict=True):
            at = latest + x * right + y * up
            pieces = dict(zip(SCALES, at.split(2), strict=True))
            assert value == pytest.approx(loss(pieces), **CLOSE)
    assert plane["corners"]["mean"]["value"] == pytest.approx(loss(mean), **CLOSE)  # type: ignore[arg-type]


def test_the_curvature_is_the_hessians(account: dict[str, Any]) -> None:
    curvature = account["figures"]["curvature"]
    for name in ("latest", "merge"):
        assert curvature[name]["top"] == pytest.approx(max(SCALES.values()), rel=1e-4)
        assert curvature[name]["trace"] == pytest.approx(2 * sum(SCALES.values()), rel=1e-4)
    assert "the first 3 batches of the confirmation half" in curvature["sentence"]


def test_flips_are_those_of_the_predictions(account: dict[str, Any], weights: dict[Any, Any]) -> None:
    x = samples().view(NUM_BATCHES, -1, 6)[1::2, :, 0].reshape(-1)
    before, after = (x > weights[name]["embed.weight"][0, 0] for name in ("latest", "merge"))
    truth, found = x > 0, account["figures"]["agreement"]
    assert found["num"] == len(x)
    assert found["won"] == int(((after == truth) & (before != truth)).sum())
    assert found["lost"] == int(((after != truth) & (before == truth)).sum())
    assert found["same"] == pytest.approx(float((before == after).double().mean()))


def test_what_is_left_out_says_why(account: dict[str, Any]) -> None:
    assert "candidates in the space" in account["left_out"]["importances"] or "importances" in account["figures"]
    assert "Two searches" in account["left_out"]["stability"]
    assert account["complete"]


def test_the_forecast_is_kept(told: dict[str, Any], account: dict[str, Any]) -> None:
    assert told["forecast"].num_evaluations == len(account["points"])
    assert f"at most {len(account['points'])} evaluations" in str(told["forecast"])


def test_the_page_is_linked_from_the_runs(told: dict[str, Any]) -> None:
    page = (told["path"] / PAGE_NAME).read_text()
    for figure in told["account"]["figures"].values():
        assert figure["sentence"].split(" (")[0].split("'")[0] in page
    assert read_history(told["path"].parent).explained == {told["path"].name}
    assert f"{told['path'].name}/{PAGE_NAME}" in (told["path"].parent / "report.html").read_text()


def copied(told: dict[str, Any], root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "merges", tmp_path / "merges", symlinks=True)
    return tmp_path / "merges" / told["path"].name


def test_an_interrupted_account_goes_on(
    told: dict[str, Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if a score that is in the file is made again, or one of other weights is taken."""
    from lightning_ckmerge.plugin.evaluate.scorer import CandidateScorer

    path = copied(told, root, tmp_path)
    account = json.loads((path / ACCOUNT_NAME).read_text())
    del account["points"]["line-0.5"]
    account["points"]["line-2"]["weights"] = "others"
    (path / ACCOUNT_NAME).write_text(json.dumps({**account, "complete": False}))
    scored: list[str] = []
    score = CandidateScorer.score
    monkeypatch.setattr(
        CandidateScorer, "score", lambda self, c, half, *a: (scored.append(half), score(self, c, half, *a))[1]
    )
    again = explain(path, Bowl(), loader(), checkpoints=root / "checkpoints", curvature_batches=3)
    assert scored == ["search", "confirm", "confirm", "confirm"]  # latest twice, and the two places
    assert again["figures"]["line"] == told["account"]["figures"]["line"]
    assert again["figures"]["plane"] == told["account"]["figures"]["plane"]
    assert read_account(path) == again


def test_a_budget_leaves_out_what_does_not_fit(told: dict[str, Any], root: Path, tmp_path: Path) -> None:
    path = copied(told, root, tmp_path)
    (path / ACCOUNT_NAME).unlink()
    latest = root / "checkpoints" / f"step={STEPS[-1]}.ckpt"
    account = explain(path, Bowl(), loader(), checkpoints=latest, max_evaluations=12, curvature_batches=0)
    assert len(account["points"]) <= 12
    assert {"line", "snapshots"} & account["figures"].keys()
    assert "`max_evaluations` of 12" in account["left_out"]["groups"]
    # The other checkpoints were not named: what needs them is told.
    assert "3 of the 4 snapshots that were merged are no longer kept" in account["notes"][0]
    assert "Fewer than two" in account["left_out"]["plane"]


def test_an_account_needs_the_latest_weights(told: dict[str, Any], root: Path) -> None:
    other = root / "checkpoints" / f"step={STEPS[0]}.ckpt"
    with pytest.raises(ArtifactError, match=r"the steps: 10\."):
        explain(told["path"], Bowl(), loader(), checkpoints=other)
    with pytest.raises(ConfigError, match="max_evaluations >= 2"):
        explain(told["path"], Bowl(), loader(), checkpoints=other, max_evaluations=1)
