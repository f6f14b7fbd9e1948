"""Several monitored metrics in a real run: the artifact is the front's knee and holds other merges of the front."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler

from lightning_ckmerge import Artifact, CheckpointMergeCallback, SearchConfig, load_merged
from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.errors import ConfigError, MonitorError
from lightning_ckmerge.report.view import build_view
from tests.support.bitwise import Case, compare_runs, fit, fit_plain, merges_dir
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.models import Classifier, TinyGPT, tokens_loader
from tests.support.trainers import make_merge


class Two(TinyGPT):
    """Logs a second metric too, by which weights of a certain size, which lies halfway through the run, are best."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        scale = sum(p.square().sum() for p in self.parameters())
        self.log("val_size", (scale + self.model(input_ids=batch).logits.square().mean() - 198).abs())


def search(**options: Any) -> SearchConfig:
    return SearchConfig(n_trials=8, max_fraction_of_training=None, sampler=RandomSampler(seed=0), **options)


GPT = Case(model=Two, train=partial(tokens_loader, train=True), val=partial(tokens_loader, train=False))


def test_the_knee_is_published_and_others_of_the_front_inside_it(tmp_path: Path) -> None:
    """Searched for a high loss, older weights are better; for a certain size, not too old ones."""
    plain = fit_plain(GPT, tmp_path / "plain")
    turned_round: Any = {"mode": ["max", "min"], "check_mode": False}
    merge = make_merge(monitor=["val_loss", "val_size"], **turned_round, every_n_train_steps=10, search=search())
    run = fit(GPT, tmp_path / "merged", [merge])
    compare_runs(plain, run)
    artifact = Artifact.open(merges_dir(run) / "step=000000010")
    manifest = artifact.manifest
    verdict = manifest["verdict"]
    assert (manifest["monitor"], manifest["mode"]) == ("val_loss", "max")
    assert [(o["monitor"], o["mode"]) for o in verdict["others"]] == [("val_size", "min")]
    assert verdict["status"] == "accepted"
    by_name = {c["name"]: c for c in [*manifest["anchors"], *manifest["trials"]]}
    members = sorted((artifact.path / "front").iterdir())
    assert members
    for path in members:
        member = read_manifest(path)
        assert member["verdict"]["winner"] == path.name in verdict["front"]
        assert member["verdict"]["status"] != "rejected"
        assert member["coefficients"] == by_name[path.name]["coefficients"] != manifest["coefficients"]
        assert member["verdict"]["value"] == by_name[path.name]["confirm"]["value"]
        assert ckmerge_json("verify", path)["ok"]
        assert {f"front/{path.name}/{name}" for name in (*member["files"], "manifest.json")} <= manifest["files"].keys()
        ours, theirs = TinyGPT(), TinyGPT()
        load_merged(path, ours)
        load_merged(artifact, theirs)
        assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ckmerge_json("verify", artifact.path)["ok"]
    assert {row.place for row in build_view(manifest).front if row.place} == {f"front/{p.name}" for p in members}
    assert "Pareto front, search half" in ckmerge("show", artifact.path).output
    assert "Pareto front" in (artifact.path / "report.html").read_text()


@pytest.mark.parametrize("monitors", [["val_loss", "val_acc", "val_hard"], ["val_acc", "val_loss"]])
def test_metrics_of_any_kind_are_searched_together(monitors: list[str], tmp_path: Path) -> None:
    """A metric object and one of an epoch hook have no batches to compare, and are compared by blocks."""
    modes: Any = ["max" if m == "val_acc" else "min" for m in monitors]
    run = fit(Case(), tmp_path, [make_merge(monitor=monitors, mode=modes, every_n_train_steps=8, search=search())])
    (manifest,) = [read_manifest(p) for p in merges_dir(run).glob("step=*")]
    verdict = manifest["verdict"]
    assert [manifest["monitor"], *(o["monitor"] for o in verdict["others"])] == monitors
    assert verdict["winner"] in verdict["front"]
    if verdict["winner"] != "latest":
        assert all(o["interval"] is not None for o in (verdict, *verdict["others"]))


def test_each_name_is_checked_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MonitorError, match="got 'val_ac'"):
        fit(Case(model=Classifier), tmp_path, [make_merge(monitor=["val_loss", "val_ac"])])


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="`mode` must be one for all"):
        CheckpointMergeCallback(monitor=["a", "b"], mode=["min"])
    one, two = CheckpointMergeCallback(monitor=["a", "b"]), CheckpointMergeCallback(monitor="a")
    assert one.state_key != two.state_key
