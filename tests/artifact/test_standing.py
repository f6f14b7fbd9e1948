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
    assert standing.advice.startswith("Use the weights of step 16, not the best merge, of step 8: the merge ")
    with pytest.warns(UserWarning, match="the best artifact of its run. Use the weights of step 16, not"):
        load_merged(tmp_path / "merges", TiedModel())
    assert Artifact.open(tmp_path / "merges").caveat == standing.advice


def test_a_later_merge_that_is_better_is_the_best(search: Publish, tmp_path: Path) -> None:
    search(step=8, value=0.682)
    better = search(step=16, value=0.4)
    assert Artifact.open(tmp_path / "merges").path == better.path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_merged(tmp_path / "merges", TiedModel())
    assert standing_of(better.path.parent).advice == (
        "Use the best merge, of step 16, not the weights of step 16: it lowers val_loss from 0.450 to 0.400, 11 % "
        "less, on the same batches."
    )


@pytest.mark.parametrize(
    ("standing", "told"),
    [
        (
            {"interval": (-0.0794, 0.569)},
            "Use the best merge, of step 8, not the final weights of step 32: it lowers val_loss from 0.90 to 0.65, "
            "28 % less; 95 % interval 8.8 % more to 63 % less, on the same batches, so it may be nothing.",
        ),
        (
            {"interval": (0.1, 0.4), "mode": "max", "value": -0.65, "best_value": -0.4},
            "Use the best merge, of step 8, not the final weights of step 32: it raises val_loss from -0.65 to -0.40, "
            "0.25 more; 95 % interval 0.10 to 0.40, on the same batches.",
        ),
        (
            {"interval": (-0.4, -0.1), "best_value": 1.15},
            "Use the final weights of step 32, not the best merge, of step 8: the merge raises val_loss from 0.90 to "
            "1.15, 28 % more; 95 % interval 11 to 44 %, on the same batches.",
        ),
    ],
)
def test_advice_has_the_form_of_a_verdict(standing: dict[str, Any], told: str) -> None:
    """The interval is told in the words of the change, never as a gain with a hyphen before it."""
    known = {"run_id": "a", "monitor": "val_loss", "mode": "min", "step": 32, "value": 0.9, "is_final": True}
    best: dict[str, Any] = {"best": "step=000000008", "best_step": 8, "best_value": 0.65}
    assert Standing(**{**known, **best, **standing}).advice == told


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
