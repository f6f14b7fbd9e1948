"""An ensemble on disk is what was published, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ckmerge.artifact.ensembles import ENSEMBLE_NAME, PAGE_NAME, EnsembleArtifact, publish_ensemble
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import file_record

MANIFEST: dict[str, Any] = {
    "averaging": "probabilities",
    "predict": None,
    "members": [{"name": "trial-1", "weight": 0.75}, {"name": "block-2", "weight": 0.25}],
    "comparison": [{"name": "latest", "forward_passes": 1, "loss": float("nan")}],
    "verdict": {"status": "unconfirmed", "gain": 0.1, "interval": None, "sentence": "Unconfirmed."},
}

RECORD = {"bytes": 1, "sha256": "0" * 64}


def states() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "layer.weight": torch.randn(4, 3, generator=generator).bfloat16(),
            "layer.bias": torch.randn(4, generator=generator),
            "calls": torch.tensor(m),
        }
        for m in range(2)
    ]


@pytest.fixture
def published(tmp_path: Path) -> EnsembleArtifact:
    return publish_ensemble(tmp_path / "ensemble", states(), MANIFEST, 1 << 30)


@pytest.mark.parametrize("max_shard_size", [1 << 30, 20])
def test_members_are_read_as_they_were_written(tmp_path: Path, max_shard_size: int) -> None:
    publish_ensemble(tmp_path / "ensemble", states(), MANIFEST, max_shard_size)
    found = EnsembleArtifact.open(tmp_path / "ensemble")
    assert found.weights == (0.75, 0.25)
    assert found.averaging == "probabilities"
    for m, state in enumerate(states()):
        stored = found.tensors(m)
        assert set(stored) == set(state)
        assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    assert found.manifest["comparison"][0]["loss"] is None


def test_nothing_else_lies_in_the_directory(published: EnsembleArtifact) -> None:
    files = {p.relative_to(published.path).as_posix() for p in published.path.rglob("*") if p.is_file()}
    assert files == {ENSEMBLE_NAME, *published.manifest["files"]}
    assert {Path(f).suffix for f in files} == {".json", ".safetensors"}


def test_a_file_with_one_other_bit_is_refused(published: EnsembleArtifact) -> None:
    path = published.path / "member-1" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="another SHA-256"):
        EnsembleArtifact.open(published.path)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="bytes instead of"):
        EnsembleArtifact.open(published.path, verify=False)


def test_a_page_lies_beside_the_members_and_is_not_needed(tmp_path: Path) -> None:
    """It is listed with its hash, and an ensemble without it predicts as before."""
    seen: list[Any] = []

    def render(manifest: Any) -> str:
        seen.append(sorted(manifest["files"]))
        return "<p>"

    published = publish_ensemble(tmp_path / "ensemble", states(), MANIFEST, 1 << 30, render)
    page = published.path / PAGE_NAME
    assert seen == [["member-0/model.safetensors", "member-1/model.safetensors"]]
    assert published.manifest["files"][PAGE_NAME] == file_record(page)
    assert page.read_text() == "<p>"
    page.write_text("<b>")
    EnsembleArtifact.open(published.path)
    page.unlink()
    assert EnsembleArtifact.open(published.path).manifest == published.manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"members": [{"name": "a", "weight": 0.75, "directory": "member-0"}]}, "sum to 1"),
        ({"members": [{"name": "a", "weight": 1.0, "directory": "../secret"}]}, "members"),
        ({"averaging": "votes"}, "averaging"),
        ({"files": {f"{d}model.safetensors": RECORD for d in ("../", "member-0/", "member-1/")}}, "inside"),
        ({"files": {"member-0/model.safetensors": RECORD}}, "no weights in member-1"),
    ],
    ids=["weights", "directory", "averaging", "files", "unlisted"],
)
def test_an_edited_manifest_is_refused(published: EnsembleArtifact, change: dict[str, Any], named: str) -> None:
    path = published.path / ENSEMBLE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=named):
        EnsembleArtifact.open(published.path)


def test_what_is_there_is_not_overwritten(published: EnsembleArtifact) -> None:
    with pytest.raises(ArtifactError, match="must not exist"):
        publish_ensemble(published.path, states(), MANIFEST, 1 << 30)
    EnsembleArtifact.open(published.path)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    bad = [*states()[:1], {"odd": torch.zeros(2, dtype=torch.complex128)}]
    with pytest.raises(ArtifactError, match="hold every tensor"):
        publish_ensemble(tmp_path / "ensemble", bad, MANIFEST, 1 << 30)
    assert list(tmp_path.iterdir()) == []


def test_another_directory_is_no_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=ENSEMBLE_NAME):
        EnsembleArtifact.open(tmp_path)
