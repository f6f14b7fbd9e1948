from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_ckmerge.artifact.ensembles import publish_ensemble
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.core.specs import Box, part_name, whole
from lightning_ckmerge.tensorfiles.durable import file_record
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.outcomes import LAST_STEPS, Publish, TiedModel, make_outcome, tensors_of


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


class Kept:
    """A run whose buffer really holds what its artifact is the merge of."""

    def __init__(self, publish: Publish, dirpath: Path, latest_counts: bool = False) -> None:
        self.buffer = dirpath / "buffer"
        self.buffer.mkdir(parents=True)
        self.latest = TiedModel()
        self.names = [n for n, t in tensors_of(self.latest).items() if t.is_floating_point() and n != "wte.weight"]
        coefficients = list(make_outcome().winner.candidate.coefficients_K)
        if latest_counts:
            coefficients[-1], coefficients[-2] = coefficients[-2], 0.0
        snapshots = [self._write(first, last) for first, last in pairwise((0, *LAST_STEPS))]
        own = {n: t.clone() for n, t in tensors_of(self.latest).items()}
        model = TiedModel()
        for name in self.names:
            merge_tensor(model.state_dict()[name], [s[name] for s in [*snapshots, own]], coefficients, "buffer")
        self.artifact = publish(weights=tensors_of(model))
        self._edit_manifest(coefficients)

    def paths(self) -> list[Path]:
        return sorted(self.buffer.iterdir())

    def _write(self, first: int, last: int) -> dict[str, Tensor]:
        torch.manual_seed(last)
        state = {
            n: torch.where(t.isfinite(), torch.randn_like(t), t)
            for n, t in tensors_of(self.latest).items()
            if n in self.names
        }
        save_file(state, self.buffer / f"0123abcd-{first + 1:09d}-{last:09d}-mean.safetensors")
        return state

    def _edit_manifest(self, coefficients: list[float]) -> None:
        path = self.artifact.path / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["coefficients"] = coefficients
        for snapshot, file in zip(manifest["snapshots"], self.paths(), strict=False):
            snapshot["sha256"] = file_record(file)["sha256"]
        path.write_text(json.dumps(manifest))


@pytest.fixture
def kept(publish: Publish, tmp_path: Path) -> Kept:
    return Kept(publish, tmp_path / "merges")


def test_a_rebuild_is_equal_bit_for_bit(kept: Kept) -> None:
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild")
    assert found["rebuild"] == {
        "state": "equal",
        "compared": len(kept.names),
        "different": [],
        "not_compared": ["norm.num_batches_tracked"],
    }


def test_snapshots_are_found_by_content_and_needed_only_if_they_count(kept: Kept) -> None:
    """A pooled point's name says less than its segment; the oldest snapshots are the first to go."""
    for path in kept.paths():
        path.rename(path.with_name(path.name.replace("0123abcd", "fedcba98")))
    assert ckmerge_json("verify", kept.artifact.path, "--rebuild")["ok"]
    kept.paths()[0].unlink()
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]
    assert found["state"] == "impossible"
    assert "steps 1-512 (coefficient -0.1)" in found["reason"]
    text = ckmerge("verify", kept.artifact.path, "--rebuild", code=1).stdout
    assert "the files are sound; the weights cannot be rebuilt" in text
    assert "NOT SOUND" not in text


def test_a_snapshot_that_changed_is_not_taken(kept: Kept) -> None:
    damage(kept.paths()[1])
    assert ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]["state"] == "impossible"


def test_one_wrong_bit_in_the_artifact_is_found_and_named(kept: Kept) -> None:
    """Hashes alone would not tell: whoever changes the weights may change the manifest too."""
    path = kept.artifact.path / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.bias"][0] = torch.nextafter(tensors["norm.bias"][0], torch.tensor(9.0))
    save_file(tensors, path, metadata={"format": "pt", "wte.weight": "head.weight"})
    manifest = json.loads((kept.artifact.path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = file_record(path)
    (kept.artifact.path / "manifest.json").write_text(json.dumps(manifest))
    assert ckmerge_json("verify", kept.artifact.path)["ok"]
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]
    assert (found["state"], found["different"]) == ("different", ["norm.bias"])


def test_latest_weights_that_count_must_be_named(publish: Publish, tmp_path: Path) -> None:
    kept = Kept(publish, tmp_path / "merges", latest_counts=True)
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]
    assert "the latest weights (coefficient" in found["reason"]
    assert "--latest" in found["reason"]
    torch.save({"state_dict": tensors_of(kept.latest), "global_step": 1000}, tmp_path / "last.ckpt")
    args = ("verify", kept.artifact.path, "--rebuild", "--latest", tmp_path / "last.ckpt")
    assert ckmerge_json(*args)["rebuild"]["state"] == "equal"


def deal_out(kept: Kept, cut: Callable[[Tensor], list[Box]]) -> None:
    """Spread each snapshot over the files of several ranks, whose BatchNorm statistics differ, as DDP's do."""
    path = kept.artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for snapshot, file in zip(manifest["snapshots"], kept.paths(), strict=False):
        states: list[dict[str, Tensor]] = [{}, {}]
        for name, tensor in load_file(file).items():
            if name.startswith("norm."):
                states[0][name], states[1][name] = tensor, tensor + 1
                continue
            for state, box in zip(states, cut(tensor), strict=True):
                state[part_name(name, box, tensor.shape)] = piece(tensor, box)
        snapshot["files_sha256"] = []
        for rank, state in enumerate(states):
            directory = kept.buffer / f"rank={rank:05d}-of-00002"
            directory.mkdir(exist_ok=True)
            save_file(state, directory / file.name)
            snapshot["files_sha256"].append(file_record(directory / file.name)["sha256"])
        snapshot["sha256"] = None
        file.unlink()
    path.write_text(json.dumps(manifest))


def piece(tensor: Tensor, box: Box) -> Tensor:
    """A box of a tensor, or, with one range for several dimensions, of the flattened tensor."""
    found = tensor if len(box.ranges_D) == tensor.dim() else tensor.reshape(-1)
    return found[box.within(whole(found.shape))].contiguous()


CUTS: dict[str, Callable[[Tensor], list[Box]]] = {
    "rows": lambda t: [Box(((0, 1), (0, t.shape[1]))), Box(((1, t.shape[0]), (0, t.shape[1])))],
    "columns": lambda t: [Box(((0, t.shape[0]), (0, 2))), Box(((0, t.shape[0]), (2, t.shape[1])))],
    "flat": lambda t: [Box(((0, 5),)), Box(((5, t.numel()),))],
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_parts_of_several_ranks_are_put_together(kept: Kept, cut: str) -> None:
    deal_out(kept, CUTS[cut])
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild")["rebuild"]
    assert (found["state"], found["compared"]) == ("equal", len(kept.names))
    assert " +1" in ckmerge("show", kept.artifact.path).output


def test_what_one_rank_kept_is_no_snapshot(kept: Kept) -> None:
    deal_out(kept, CUTS["rows"])
    files = sorted((kept.buffer / "rank=00001-of-00002").iterdir())
    damage(files[1])
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]
    assert found["state"] == "impossible"
    assert re.search(r"steps \d+-\d+ \(coefficient [-\d.]+, 1 of 2 files\)", found["reason"])


def test_parts_that_do_not_make_a_whole_are_no_snapshot(kept: Kept) -> None:
    """Nothing is guessed: the second rank's file is the first's again."""
    deal_out(kept, CUTS["rows"])
    path = kept.artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for snapshot in manifest["snapshots"][:-1]:
        snapshot["files_sha256"][1] = snapshot["files_sha256"][0]
    path.write_text(json.dumps(manifest))
    found = ckmerge_json("verify", kept.artifact.path, "--rebuild", code=1)["rebuild"]
    assert found["state"] == "impossible"
    assert "whole tensors" in found["reason"]


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    states = [{"w": torch.full((3,), float(m))} for m in range(2)]
    manifest = {
        "averaging": "outputs",
        "members": [{"name": "merge", "weight": 0.75}, {"name": "latest", "weight": 0.25}],
        "comparison": [],
        "verdict": {"status": "accepted", "gain": 0.1, "interval": [0.05, 0.2], "sentence": "An ensemble."},
    }
    return publish_ensemble(tmp_path / "ensemble", states, manifest, 1 << 30, lambda complete: "<p>").path


def test_an_intact_ensemble_is_sound(ensemble: Path) -> None:
    found = ckmerge_json("verify", ensemble)
    assert (found["ok"], found["state"]) == (True, "sound")
    assert found["members"] == [
        {"name": "merge", "weight": 0.75, "state": "sound"},
        {"name": "latest", "weight": 0.25, "state": "sound"},
    ]
    assert set(found["files"]) == {"member-0/model.safetensors", "member-1/model.safetensors", "ensemble.html"}
    assert "NOT SOUND" not in ckmerge("verify", ensemble).output


def test_a_member_with_one_other_bit_is_named(ensemble: Path) -> None:
    damage(ensemble / "member-1" / "model.safetensors")
    found = ckmerge_json("verify", ensemble, code=1)
    assert (found["ok"], found["files"]["member-1/model.safetensors"]) == (False, "another SHA-256")
    assert [m["state"] for m in found["members"]] == ["sound", "not sound"]
    output = ckmerge("verify", ensemble, code=1).output
    assert "another SHA-256" in output
    assert "NOT SOUND" in output
    assert "the members are sound" not in output


def test_another_page_is_a_finding_though_the_members_are_sound(ensemble: Path) -> None:
    (ensemble / "ensemble.html").unlink()
    found = ckmerge_json("verify", ensemble, code=1)
    assert (found["state"], found["files"]["ensemble.html"]) == ("not sound", "missing")
    assert {m["state"] for m in found["members"]} == {"sound"}
    assert "the members are sound" in ckmerge("verify", ensemble, code=1).output


def test_what_cannot_be_verified_of_an_ensemble_is_an_error(ensemble: Path) -> None:
    assert "--rebuild" in ckmerge("verify", ensemble, "--rebuild", code=2).stderr
    (ensemble / "ensemble.json").write_text("{}")
    assert "schema of ensembles" in ckmerge("verify", ensemble, code=2).stderr
