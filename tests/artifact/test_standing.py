"""A best artifact that newer weights outdo says so wherever it is opened."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.standing import STANDING_NAME, Standing, read_standing, write_standing
from lightning_ckmerge.core.objectives import Mode
from tests.support.outcomes import Publish, TiedModel


@pytest.fixture
def search(publish: Publish, tmp_path: Path) -> Publish:
    """Publishes a search and notes how the run stands, as a run does."""

    def run(**options: Any) -> Artifact:
        artifact = publish(**options)
        store = ArtifactStore(
            tmp_path / "merges", mode=options.get("mode", "min"), save_top_k=-1, max_shard_size=1 << 30
        )
        store.compare(artifact.manifest)
        return artifact

    return run


def standing_of(dirpath: Path) -> Standing:
    standing = read_standing(dirpath)
    assert standing is not None
    return standing


@pytest.mark.parametrize(("mode", "later"), [("min", 0.5), ("max", 0.8)])
def test_a_search_tells_a_stale_best(search: Publish, tmp_path: Path, mode: Mode, later: float) -> None:
    """The weights of a later search were better than the best merge, be its own merge rejected."""
    best = search(step=8, value=0.682, mode=mode)
    assert not standing_of(tmp_path / "merges").is_stale
    search(step=16, value=later, mode=mode, status="rejected", weights=None)
    standing = standing_of(tmp_path / "merges")
    assert standing.is_stale
    assert (standing.best, standing.best_value, standing.step) == (best.path.name, 0.682, 16)
    assert "Use the weights of step 16: val_loss" in standing.advice
    with pytest.warns(UserWarning, match="the best artifact of its run. Use the weights of step 16"):
        load_merged(tmp_path / "merges", TiedModel())
    assert Artifact.open(tmp_path / "merges").caveat == standing.advice


def test_a_later_merge_that_is_better_is_the_best(search: Publish, tmp_path: Path) -> None:
    search(step=8, value=0.682)
    better = search(step=16, value=0.4)
    assert Artifact.open(tmp_path / "merges").path == better.path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_merged(tmp_path / "merges", TiedModel())
    assert "Use the best merge, of step 16: val_loss 0.4, versus 0.45 for" in standing_of(better.path.parent).advice


def test_another_runs_standing_says_nothing(search: Publish, tmp_path: Path) -> None:
    best = search(step=8, value=0.5)
    standing = standing_of(tmp_path / "merges")
    for other in ({"run_id": "another"}, {"best": "step=000000001"}):
        write_standing(tmp_path / "merges", replace(standing, value=0.1, **other))
        assert Artifact.open(best.path).caveat is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"interval": 3}', "\xff"])
def test_a_damaged_file_says_nothing(search: Publish, tmp_path: Path, text: str) -> None:
    best = search(step=8, value=0.5)
    (tmp_path / "merges" / STANDING_NAME).write_text(text, encoding="latin-1")
    assert Artifact.open(best.path).caveat is None
