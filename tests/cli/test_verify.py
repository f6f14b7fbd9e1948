from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ckmerge.artifact.files import file_record
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.core.outcome import SnapshotRecord
from tests.artifact.conftest import Publish, TiedModel, tensors_of
from tests.artifact.outcomes import LAST_STEPS
from tests.cli.commands import ckmerge, ckmerge_json


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_intact_artifact_is_sound(publish: Publish) -> None:
    artifact = publish(max_shard_size=64)
    found = ckmerge_json("verify", artifact.path)
    assert found["ok"]
    assert found["files"] == dict.fromkeys(artifact.manifest["files"], "ok")
    assert "sound" in ckmerge("verify", artifact.path).output


@pytest.mark.parametrize(
    ("change", "state"),
    [(damage, "another SHA-256"), (lambda p: p.write_bytes(b"x"), "another size"), (lambda p: p.unlink(), "missing")],
)
def test_a_damaged_file_is_a_finding(publish: Publish, change: Any, state: str) -> None:
    artifact = publish()
    change(artifact.path / "model.safetensors")
    found = ckmerge_json("verify", artifact.path, code=1)
    assert (found["ok"], found["files"]) == (False, {"model.safetensors": state})
    output = ckmerge("verify", artifact.path, code=1).output
    assert state in output
    assert "NOT SOUND" in output


def test_a_missing_artifact_is_an_error(tmp_path: Path) -> None:
    ckmerge("verify", tmp_path, code=2)


@pytest.fixture
def rebuildable(publish: Publish, tmp_path: Path) -> Artifact:
    """An artifact that really is the merge of the files in its run's buffer."""
    model = TiedModel()
    names = [n for n, t in tensors_of(model).items() if t.is_floating_point() and n != "wte.weight"]
    buffer = tmp_path / "merges" / "buffer"
    buffer.mkdir(parents=True)
    snapshots: list[dict[str, Tensor]] = []
    records = []
    for first, last in zip((0, *LAST_STEPS[:-1]), LAST_STEPS, strict=True):
        torch.manual_seed(last)
        state = {n: torch.where(t.isfinite(), torch.randn_like(t), t) for n, t in tensors_of(model).items() if n in names}
        path = buffer / f"0123abcd-{first + 1:09d}-{last:09d}-mean.safetensors"
        save_file(state, path)
        snapshots.append(state)
        sha256 = file_record(path)["sha256"]
        records.append(
            SnapshotRecord(kind="mean", first_step=first + 1, last_step=last, num_updates=last - first, sha256=sha256)
        )
    records.append(SnapshotRecord(kind="point", first_step=1000, last_step=1000, num_updates=1, sha256=None))
    snapshots.append({n: t for n, t in tensors_of(model).items() if n in names})
    from lightning_ckmerge.artifact import manifest as manifests  # the outcome with these records

    del manifests
    coefficients = publish_coefficients()
    for name in names:
        merge_tensor(model.state_dict()[name], [s[name] for s in snapshots], coefficients, "buffer")
    return publish_with(publish, model, records, tmp_path)


def publish_coefficients() -> tuple[float, ...]:
    from tests.artifact.outcomes import make_outcome

    return tuple(make_outcome().winner.candidate.coefficients_K)


def publish_with(publish: Publish, model: nn.Module, records: list[SnapshotRecord], tmp_path: Path) -> Artifact:
    artifact = publish(weights=tensors_of(model))
    path = artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["snapshots"] = [vars(r) for r in records]
    path.write_text(json.dumps(manifest))
    return Artifact.open(artifact.path)
