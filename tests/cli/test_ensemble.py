from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckmerge import load_ensemble
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.offline import Wandering, predict, train_without_merging, write_config

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_ensemble_is_built_told_and_loaded(tmp_path: Path) -> None:
    """Outputs of this model are linear in its weights: the merge has all that an ensemble can give."""
    config, checkpoints, out = write_config(tmp_path), train_without_merging(tmp_path), tmp_path / "ensemble"
    args = ["ensemble", "--config", config, "--source", checkpoints, "--last", 3, "--n-trials", 1]
    args += ["--predict", "tests.support.offline.predict", "--weight-trials", 0]
    found = ckmerge_json(*args, "--out", out, code=1)
    assert found["averaging"] == "outputs"
    assert found["verdict"]["status"] in ("rejected", "unconfirmed")
    assert [c["name"] for c in found["comparison"]] == ["latest", "merge", "snapshots", "ensemble"]
    assert "accuracy" not in found["comparison"][0]
    assert load_ensemble(out, Wandering(), predict=predict).num_members == len(found["members"])
    assert "ensemble.html" in found["files"]
    assert ckmerge_json("verify", out)["ok"]
    told = ckmerge(*args, "--size", 1, "--merges-only", "--out", tmp_path / "again", code=1).stdout
    assert "The single merge has it already" in told
    assert "gain over merge" in told
    assert f"page: {tmp_path / 'again' / 'ensemble.html'}" in told.replace("\n", "")
    assert "must not exist" in ckmerge(*args, "--out", out, code=2).stderr
    wrong = ckmerge(*args[:-4], "--predict", "tests.support.offline.nothing", "--out", tmp_path / "no", code=2)
    assert "import path" in wrong.stderr
