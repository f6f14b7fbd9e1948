"""`ckmerge study` over checkpoints whose losses are known: a paraboloid in two dimensions, with a real Trainer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge import CheckpointMergeCallback, study_checkpoints
from lightning_ckmerge.core.mixing import slerp_tensors
from lightning_ckmerge.plugin.evaluate.halves import confirms
from tests.support.commands import ckmerge, ckmerge_json

POINTS = [(4.0, 1.0), (3.0, -1.0), (2.0, 1.0), (1.0, -1.0)]
STEPS = [100, 200, 300, 400]
pytestmark = pytest.mark.filterwarnings("ignore")


class Point(pl.LightningModule):
    """Its loss is the squared distance from each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.at - batch[0]).square().sum(1).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self.at - batch[0]).square().sum(1).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples() -> Tensor:
    return 0.1 * torch.randn(96, 2, generator=torch.Generator().manual_seed(1))


class Samples(pl.LightningDataModule):
    """Forty-eight batches of two around the origin."""

    def train_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(samples()), batch_size=2)


def loss(at: Sequence[float] | Tensor, half: str = "search") -> float:
    """The loss on one half of the batches, by hand."""
    kept = [b for b in range(48) if confirms(b, 0.5) == (half == "confirm")]
    own = samples().view(48, 2, 2)[kept].reshape(-1, 2)
    return float((torch.as_tensor(at) - own).square().sum(1).mean())


def at_lam(older: int, newer: int, lam: float) -> list[float]:
    return [(1 - lam) * o + lam * n for o, n in zip(POINTS[older], POINTS[newer], strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``checkpoints`` and ``run.yaml``."""
    root = tmp_path_factory.mktemp("run")
    (root / "checkpoints").mkdir()
    for step, point in zip(STEPS, POINTS, strict=True):
        content = {"state_dict": {"at": torch.tensor(point)}, "global_step": step}
        torch.save(content, root / "checkpoints" / f"step={step}.ckpt")
    callback = {"class_path": "lightning_ckmerge.CheckpointMergeCallback", "init_args": {"monitor": "val_loss"}}
    config = {
        "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 400, "callbacks": [callback]},
        "model": {"class_path": "tests.cli.test_study.Point"},
        "data": {"class_path": "tests.cli.test_study.Samples"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def arguments(run: Path, out: Path, *more: object) -> list[object]:
    return ["study", run / "checkpoints", "--config", run / "run.yaml", "--out", out, *more]


@pytest.fixture(scope="module")
def studied(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studied") / "study"
    result = ckmerge(*arguments(run, out))
    assert "4 checkpoints, at most" in result.stderr
    assert "space: pairwise" in result.stdout
    return out


@pytest.fixture(scope="module")
def document(studied: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((studied / "study.json").read_text())
    return found


def test_values_are_those_of_the_checkpoints_and_their_pairs(document: dict[str, Any]) -> None:
    """Goes red if a merge is scored with another's weights, or on the other half."""
    assert [c["value"] for c in document["checkpoints_scored"]] == [pytest.approx(loss(p), rel=1e-5) for p in POINTS]
    assert len(document["pairs"]) == 6
    for pair in document["pairs"]:
        place = at_lam(pair["older"], pair["newer"], pair["lam"])
        assert pair["value"] == pytest.approx(loss(place), rel=1e-4, abs=1e-5)


def test_each_pair_is_scored_near_its_optimum(document: dict[str, Any]) -> None:
    for pair in document["pairs"]:
        places = [at_lam(pair["older"], pair["newer"], lam / 100) for lam in range(5, 96)]
        assert pair["value"] == pytest.approx(min(map(loss, places)), rel=1e-3, abs=0.02)


def test_great_circles_are_those_of_slerp(document: dict[str, Any]) -> None:
    points = [(line, lam, value) for line in document["lines"] for lam, value in line["slerp"] if lam not in (0, 1)]
    assert points
    for line, lam, value in points:
        a, b = (torch.tensor(POINTS[line[name]]) for name in ("older", "newer"))
        assert value == pytest.approx(loss(slerp_tensors(a, b, lam)), rel=1e-4)


def test_places_past_the_ends_are_scored(document: dict[str, Any]) -> None:
    for line in document["lines"]:
        values = dict(map(tuple, line["linear"]))
        for lam in (-0.5, 1.5):
            assert values[lam] == pytest.approx(loss(at_lam(line["older"], line["newer"], lam)), rel=1e-4)


def test_the_geometry_is_that_of_the_points(document: dict[str, Any]) -> None:
    found = document["geometry"]
    assert found["distances_KK"][0][2] == pytest.approx(2)
    assert found["distances_KK"][0][1] == pytest.approx(math.hypot(1, 2))
    assert found["cosines_UU"][0][1] == pytest.approx((1 - 4) / 5)


def test_the_gain_is_told_on_the_confirmation_half(document: dict[str, Any]) -> None:
    advice = document["advice"]
    assert (advice["status"], advice["choice"]) == ("accepted", "best pair")
    chosen = next(f for f in document["finalists"] if f["name"] == "best pair")
    older, newer = chosen["merge"]["places"]
    place = at_lam(older, newer, chosen["merge"]["weights"][1])
    assert chosen["gain"] == pytest.approx(loss(POINTS[-1], "confirm") - loss(place, "confirm"), rel=1e-4)
    assert chosen["search_gain"] == pytest.approx(loss(POINTS[-1]) - loss(place), rel=1e-4)
    assert chosen["interval"][0] < chosen["gain"] < chosen["interval"][1]
    CheckpointMergeCallback(**advice["config"])


def test_it_takes_no_more_than_it_said(document: dict[str, Any]) -> None:
    evaluation = document["evaluation"]
    assert evaluation["num_evaluations"] <= evaluation["most_evaluations"]
    assert (evaluation["search_batches"], evaluation["confirm_batches"]) == ([24], [24])


def test_a_study_that_is_there_is_not_scored_again(run: Path, studied: Path, tmp_path: Path) -> None:
    """All but the newest checkpoint, which tells that the data are the same."""
    out = tmp_path / "study"
    shutil.copytree(studied, out)
    (ledger,) = out.glob("evaluations-*.jsonl")
    before = ledger.read_bytes()
    result = ckmerge(*arguments(run, out))
    assert f"{len(before.splitlines()) - 1} are there from before" in result.stderr
    assert ledger.read_bytes() == before
    assert answers(out) == answers(studied)


def answers(out: Path) -> dict[str, Any]:
    """A study without its times."""
    found = json.loads((out / "study.json").read_text())
    return {name: value for name, value in found.items() if name not in ("created", "evaluation")}


def test_what_a_kill_leaves_is_gone_on_from(run: Path, studied: Path, tmp_path: Path) -> None:
    """A file of lines that ends within one, and no answers; then those of a study that was left alone."""
    (whole,) = studied.glob("evaluations-*.jsonl")
    out = tmp_path / "study"
    out.mkdir()
    kept = whole.read_bytes()[: len(whole.read_bytes()) // 2]
    (out / whole.name).write_bytes(kept)
    ckmerge(*arguments(run, out))
    lines = (out / whole.name).read_bytes().splitlines()
    assert lines[: kept.count(b"\n")] == kept.splitlines()[: kept.count(b"\n")]
    assert sorted(lines) == sorted(whole.read_bytes().splitlines())
    assert answers(out) == answers(studied)


def test_a_function_finds_what_the_command_finds(run: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """A limit thins its map; what both have scored is equal."""
    module = Point()
    found = study_checkpoints(
        module,
        Samples().val_dataloader(),
        run / "checkpoints",
        dirpath=tmp_path / "study",
        max_evaluations=24,
        trainer={"accelerator": "cpu"},
    )
    assert found["evaluation"]["num_evaluations"] <= found["evaluation"]["most_evaluations"] <= 24
    assert found["mapped"] == [0, 2, 3]
    assert found["finalists"][0] == document["finalists"][0]
    assert torch.equal(module.at.detach(), torch.tensor(POINTS[-1]))
    assert (tmp_path / "study" / "study.html").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--monitor", "loss"), "Logged are: val_loss"),
        (("--mode", "max"), "got 'max' for 'val_loss', for which lower is better judging by its name"),
        (("--last", "1"), "needs two checkpoints"),
        (("--max-evaluations", "5"), "`max_evaluations >= 17` must hold for a study of 4 checkpoints, got 5"),
        (("--max-evaluations", "0"), "`max_evaluations >= 1` must hold"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(
    run: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    assert message in ckmerge(*arguments(run, tmp_path / "study", *more), code=2).stderr.splitlines()[-1]
    assert not (tmp_path / "study" / "study.json").exists()


def test_json_names_the_files(run: Path, studied: Path) -> None:
    found = ckmerge_json(*arguments(run, studied))
    assert Path(found["page"]).is_file()
    assert found["advice"]["text"].startswith("Of what the callback can merge")


def test_one_batch_leaves_nothing_to_confirm(run: Path, tmp_path: Path) -> None:
    found = study_checkpoints(
        Point(),
        DataLoader(TensorDataset(samples()), batch_size=96),
        run / "checkpoints",
        dirpath=tmp_path / "study",
        evaluation={"confirm_fraction": 0.5},  # type: ignore[arg-type]
        max_evaluations=20,
        trainer={"accelerator": "cpu"},
    )
    assert found["advice"]["status"] == "unconfirmed"
    assert [f["confirm"] for f in found["finalists"]] == [None] * len(found["finalists"])
