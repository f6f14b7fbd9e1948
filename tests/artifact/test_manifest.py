from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.artifact.manifest import build_manifest, check_manifest, read_manifest, write_manifest
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.errors import ArtifactError
from tests.support.outcomes import make_outcome

# DESIGN 3.3: keys exactly.
KEYS = {
    "schema_version",
    "step",
    "monitor",
    "mode",
    "verdict",
    "space",
    "coordinates",
    "snapshots",
    "coefficients",
    "anchors",
    "trials",
    "evaluation",
    "cost",
    "files",
    "software",
}


def complete(**kwargs: Any) -> dict[str, Any]:
    return {**build_manifest(make_outcome(**kwargs)), "files": {}}


@pytest.mark.parametrize("status", ["accepted", "rejected", "unconfirmed"])
@pytest.mark.parametrize("winner_is_anchor", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_every_outcome_is_read_back_as_it_was_written(
    tmp_path: Path, status: Any, winner_is_anchor: bool, mode: Any
) -> None:
    manifest = complete(status=status, winner_is_anchor=winner_is_anchor, mode=mode)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.keys() == KEYS


def test_a_snapshot_of_several_files_names_them_all(tmp_path: Path) -> None:
    """And one of a single file says what it always said."""
    outcome = make_outcome()
    one, *others = outcome.snapshots_K
    several = replace(one, sha256=None, files_sha256=("ab" * 32, "cd" * 32))
    manifest = {**build_manifest(replace(outcome, snapshots_K=(several, *others))), "files": {}}
    write_manifest(tmp_path, manifest)
    first, second, *_ = read_manifest(tmp_path)["snapshots"]
    assert (first["sha256"], first["files_sha256"]) == (None, ["ab" * 32, "cd" * 32])
    assert second.keys() == {"kind", "first_step", "last_step", "num_updates", "sha256"}


def test_what_the_winner_was_and_scored_can_be_found() -> None:
    manifest = complete(value=1.5)
    assert (manifest["verdict"]["winner"], manifest["verdict"]["value"]) == ("trial-6", 1.5)
    winner = next(t for t in manifest["trials"] if t["name"] == "trial-6")
    assert winner["coefficients"] == manifest["coefficients"]
    assert winner["coordinates"] == manifest["coordinates"]
    assert complete(winner_is_anchor=True)["coordinates"] is None


def test_building_leaves_the_outcome_apart() -> None:
    outcome = make_outcome()
    manifest = build_manifest(outcome)
    manifest["cost"]["seconds"]["anchors"] = -1
    assert outcome.cost.seconds["anchors"] == 2.0


def test_scores_that_are_not_finite_become_null(tmp_path: Path) -> None:
    outcome = make_outcome()
    wild = replace(outcome.trials[0], search=Score(value=math.inf, metrics={"val_loss": math.nan}))
    verdict = replace(outcome.verdict, gain=math.nan, interval=(-math.inf, math.inf))
    manifest = build_manifest(replace(outcome, trials=(wild, *outcome.trials[1:]), verdict=verdict))
    write_manifest(tmp_path, {**manifest, "files": {}})
    stored = read_manifest(tmp_path)
    assert stored["trials"][0]["search"]["value"] is None
    assert stored["trials"][0]["search"]["metrics"] == {"val_loss": None}
    assert (stored["verdict"]["gain"], stored["verdict"]["interval"]) == (None, None)


def test_coefficients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    manifest = complete()
    manifest["coefficients"][1] = math.nan
    with pytest.raises(ArtifactError, match=r"\$\.coefficients\[1\].*nan"):
        write_manifest(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("verdict", "status"), "splendid", r"\$\.verdict\.status.*'splendid'"),
        (("step",), -1, r"\$\.step.*-1"),
        (("schema_version",), 2, r"\$\.schema_version.*2"),
        (("surprise",), 1, r"`\$`.*'surprise' was unexpected"),
        (("verdict", "surprise"), 1, r"\$\.verdict.*'surprise' was unexpected"),
        (
            ("files", "model.safetensors"),
            {"bytes": 1, "sha256": "abc"},
            r"\$\.files\['model\.safetensors'\]\.sha256|'abc'",
        ),
        (("snapshots", 0, "kind"), "median", r"\$\.snapshots\[0\]\.kind.*'median'"),
        (("coefficients",), [1.0], r"\$\.coefficients.*\[1\.0\].*6 snapshots"),
    ],
)
def test_a_breach_of_the_schema_is_named_by_its_path_and_value(
    tmp_path: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    manifest = complete()
    node: Any = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        write_manifest(tmp_path, manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_is_demanded(key: str) -> None:
    manifest = copy.deepcopy(complete())
    del manifest[key]
    with pytest.raises(ArtifactError, match=f"'{key}' is a required property"):
        check_manifest(manifest, "manifest.json")


@pytest.mark.parametrize("text", ["", "[]", '{"step": NaN}', "{", "\x80"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_long_value_does_not_flood_the_message() -> None:
    manifest = complete()
    manifest["verdict"]["status"] = "x" * 10_000
    with pytest.raises(ArtifactError) as error:
        check_manifest(manifest, "manifest.json")
    assert len(str(error.value)) < 800
