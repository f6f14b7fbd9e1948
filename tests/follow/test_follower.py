"""A follower finds what the run would have found itself, bit for bit, while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckmerge.artifact.manifest import read_manifest
from lightning_ckmerge.artifact.timeline import read_timeline
from tests.support.follow import FollowerProcess, InStep, config_of, fit


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a run that has searched itself."""
    root = tmp_path_factory.mktemp("inside")
    fit(root, search={"where": "training"})
    return root / "merges"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of the same run with a follower."""
    root = tmp_path_factory.mktemp("followed")
    config_of(root)
    with FollowerProcess(root) as follower:
        fit(root, InStep(root / "merges"))
        told = follower.result()
    assert told["ending"] == "ended"
    assert [r["status"] for r in told["results"]] == ["published", "published"]
    return root / "merges"


def test_it_publishes_the_same_bits(inside: Path, followed: Path) -> None:
    names = sorted(p.name for p in inside.glob("step=*"))
    assert len(names) == 2
    assert names == sorted(p.name for p in followed.glob("step=*"))
    for name in names:
        one, other = read_manifest(inside / name), read_manifest(followed / name)
        assert one["files"]["model.safetensors"] == other["files"]["model.safetensors"]
        for part in ("snapshots", "anchors", "trials", "verdict", "coordinates", "evaluation"):
            assert one[part] == other[part], part
    assert (inside / "best").resolve().name == (followed / "best").resolve().name
    records = [
        [(r["step"], r["status"], r["values"], r["validation"]) for r in read_timeline(d)] for d in (inside, followed)
    ]
    assert records[0] == records[1]
