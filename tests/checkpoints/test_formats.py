from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from lightning_ckmerge.checkpoints.formats import find_sources, open_source, run_sources
from lightning_ckmerge.core.layout import tensor_spec
from lightning_ckmerge.errors import ArtifactError
from tests.support.checkpoints import STEPS, WRITERS, model_at, write_all, write_distributed, write_hub, write_lightning
from tests.support.outcomes import Publish, tensors_of


class Surprise:
    """Leaves a directory behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_holds_the_same_weights_and_steps(tmp_path: Path, kind: str) -> None:
    for step, path in zip(STEPS, write_all(tmp_path, kind), strict=True):
        source, expected = open_source(path), tensors_of(model_at(step))
        assert source.step == step
        assert source.specs.keys() == source.weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(source.weights[name], tensor), name
            assert source.specs[name] == tensor_spec(tensor.shape, tensor.dtype)
        assert all(file.is_file() for file in source.files)


@pytest.mark.parametrize("kind", ["lightning", "torch", "safetensors"])
def test_tied_weights_are_seen(tmp_path: Path, kind: str) -> None:
    (first, *_) = write_all(tmp_path, kind)
    assert open_source(first).aliases in ({"wte.weight": "head.weight"}, {"head.weight": "wte.weight"})


def test_an_artifact_is_a_source(publish: Publish) -> None:
    model = model_at(100)
    artifact = publish(weights=tensors_of(model))
    source = open_source(artifact.path)
    assert (source.kind, source.step) == ("artifact", 1000)
    assert torch.equal(source.weights["wte.weight"], model.wte.weight)
    (artifact.path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="bytes instead of"):
        open_source(artifact.path)


def test_code_in_a_torch_file_is_refused_with_the_remedy_and_not_run(tmp_path: Path) -> None:
    path = write_lightning(tmp_path / "a.ckpt", 100, hyper_parameters=Surprise(tmp_path / "ran"))
    with pytest.raises(ArtifactError, match=r"alone, got `\w+\.mkdir` .* `save_weights_only=True`"):
        open_source(path)
    assert not (tmp_path / "ran").exists()


def test_code_in_distributed_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    path = write_distributed(tmp_path / "d", 100)
    (path / ".metadata").write_bytes(pickle.dumps(Surprise(tmp_path / "ran")))
    with pytest.raises(ArtifactError, match=r"tensors alone, got \w+\.mkdir"):
        open_source(path)
    assert not (tmp_path / "ran").exists()


def test_a_shard_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write_distributed(tmp_path / "d", 100)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = "../elsewhere"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ArtifactError, match="must lie inside"):
        open_source(path)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    path = write_distributed(tmp_path / "d", 100)
    for shard in path.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ArtifactError, match="hold every shard"):
        open_source(path).weights["mask"]


@pytest.mark.parametrize(("key", "lightning"), [("", False), ("model", True)])
def test_the_weights_of_a_distributed_checkpoint_are_found(tmp_path: Path, key: str, lightning: bool) -> None:
    """FSDP's lie under `model`; without Lightning's mark the whole checkpoint is taken, optimizer and all."""
    path = write_distributed(tmp_path / "d", 100, key=key, lightning=lightning)
    names = set(open_source(path).specs)
    assert names - {"optimizer_0.m"} == tensors_of(model_at(100)).keys()
    assert ("optimizer_0.m" in names) is not lightning


@pytest.mark.parametrize("kind", ["torch", "distributed"])
def test_the_entry_can_be_named(tmp_path: Path, kind: str) -> None:
    if kind == "torch":
        path = tmp_path / "a.pt"
        torch.save({"net": tensors_of(model_at(100)), "lr": 0.1}, path)
    else:
        path = write_distributed(tmp_path / "d", 100, key="net")
    assert open_source(path, "net").specs.keys() == tensors_of(model_at(100)).keys()
    with pytest.raises(ArtifactError, match="Name the entry with `--key`"):
        open_source(path)


def test_an_index_must_not_leave_its_directory(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "checkpoint-1", 100)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(ArtifactError, match="must lie inside"):
        open_source(path)
    index.write_text("[]")
    with pytest.raises(ArtifactError, match="weight_map"):
        open_source(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.ckpt").write_text("x")
    for name, found in (("a.txt", "another file"), ("gone.ckpt", "nothing"), (".", "another directory")):
        with pytest.raises(ArtifactError, match=f"a checkpoint must be a Lightning .ckpt, .* got {found}"):
            open_source(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"`torch.save` wrote"):
        open_source(tmp_path / "a.ckpt")


def test_checkpoints_of_one_step_hold_the_same_weights(tmp_path: Path) -> None:
    """Lightning keeps copies of the last, which are no other weights; those of another run are."""
    paths = [write_lightning(tmp_path / f"step={step}.ckpt", step) for step in (10, 20)]
    copy = write_lightning(tmp_path / "last.ckpt", 20, epoch=1)
    assert [s.path for s in run_sources([*paths, copy])] == paths
    other = write_lightning(tmp_path / "other" / "step=20.ckpt", 30, global_step=20)
    message = f"hold the same weights, got {paths[1]} and {other}, both of step 20, which differ in head.weight. Name"
    with pytest.raises(ArtifactError, match=message):
        run_sources([*paths, other])


def test_a_directory_of_checkpoints_is_sorted_by_steps(tmp_path: Path) -> None:
    for step in (1000, 200, 90):
        write_lightning(tmp_path / f"epoch=9-step={step}.ckpt", step)
    write_hub(tmp_path / "checkpoint-500", 500)
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "epoch=9-step=1000.ckpt")
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in find_sources(tmp_path)] == [
        "epoch=9-step=90.ckpt",
        "epoch=9-step=200.ckpt",
        "checkpoint-500",
        "epoch=9-step=1000.ckpt",
    ]
    with pytest.raises(ArtifactError, match="got none"):
        find_sources(tmp_path / "gone")
