from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.errors import ArtifactError, ConfigError
from tests.support.outcomes import Publish, TiedModel, tensors_of


def randomised(seed: int, **kwargs: Any) -> TiedModel:
    torch.manual_seed(seed)
    model = TiedModel(**kwargs)
    model.norm.num_batches_tracked.fill_(seed)
    model.norm.running_var.uniform_()
    return model


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_manifest(artifact: Artifact, edit: Any) -> None:
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    edit(manifest)
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("max_shard_size", [1 << 30, 64])
@pytest.mark.parametrize("source", ["step=000001000", "best", ""])
def test_a_published_model_is_loaded_bit_for_bit(
    publish: Publish, tmp_path: Path, max_shard_size: int, source: str
) -> None:
    trained, model = randomised(1), randomised(2)
    publish(weights=tensors_of(trained), max_shard_size=max_shard_size)
    artifact = load_merged(str(tmp_path / "merges" / source), model)
    assert artifact.path.name == "step=000001000"
    assert same(tensors_of(model), tensors_of(trained))
    assert model.head.weight is model.wte.weight
    assert load_merged(artifact, model) is artifact


def test_a_file_in_an_artifact_is_refused_with_the_directory(publish: Publish) -> None:
    path = publish(weights=None, status="rejected").path
    with pytest.raises(ArtifactError, match=r"got the file .*json\. Name the directory, "):
        load_merged(path / "manifest.json", TiedModel())
    with pytest.raises(ArtifactError, match=r"is: rejected\). Load another"):
        load_merged(path, TiedModel())


def test_an_open_artifact_gives_its_tensors(publish: Publish) -> None:
    weights = tensors_of(randomised(1))
    assert same(dict(publish(weights=weights).tensors()), weights)


def test_a_model_keeps_its_dtype_and_its_parameters(publish: Publish) -> None:
    trained, model = randomised(1), randomised(2).to(torch.float64)
    parameters = list(model.parameters())
    load_merged(publish(weights=tensors_of(trained)), model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.wte.weight.dtype == torch.float64
    assert torch.equal(model.wte.weight, trained.wte.weight.double())


def test_tied_weights_come_apart_without_loss(publish: Publish) -> None:
    """The file holds one of two tied tensors; a model that does not tie them needs both."""
    trained, model = randomised(1), randomised(2)
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    load_merged(publish(weights=tensors_of(trained)), model)
    assert torch.equal(model.head.weight, trained.head.weight)
    assert torch.equal(model.wte.weight, trained.head.weight)


@pytest.mark.parametrize(("model", "found"), [(TiedModel, "the class TiedModel"), ({}, "a dict"), (None, "a NoneType")])
def test_what_is_no_module_is_refused(publish: Publish, model: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"`model` must be a module, got {found}. Build it"):
        load_merged(publish(), model)


class Renamed(TiedModel):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = self.norm
        del self.norm


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        (TiedModel(width=5), ["of another shape: head.weight (6, 4) for (6, 5)", "and 1 more"]),
        (Renamed(), ["missing from the artifact: norm2.bias", "unexpected by the model: norm.bias"]),
        (nn.Linear(2, 2), ["unexpected by the model: head.weight, mask, norm.bias"]),
        (TiedModel().to("meta"), ["on the meta device: head.weight"]),
    ],
)
def test_a_model_that_does_not_fit_is_told_why_and_left_as_it_was(
    publish: Publish, model: nn.Module, faults: list[str]
) -> None:
    before = {name: t.clone() for name, t in tensors_of(model).items()}
    with pytest.raises(ArtifactError) as error:
        load_merged(publish(), model)
    assert all(fault in str(error.value) for fault in faults)
    assert "configure_model" in str(error.value)
    if not any(t.is_meta for t in before.values()):
        assert same(tensors_of(model), before)


def test_names_may_differ_unless_strict_but_shapes_may_not(publish: Publish) -> None:
    trained, model = randomised(1), Renamed()
    before = model.norm2.weight.clone()
    artifact = publish(weights=tensors_of(trained))
    with pytest.warns(UserWarning, match="Loaded 3 of the 8 tensors of Renamed") as caught:
        load_merged(artifact, model, strict=False)
    [said] = [str(w.message) for w in caught]
    assert "missing from the artifact: norm2.bias, norm2.num_batches_tracked, norm2.running_mean" in said
    assert "unexpected by the model: norm.bias, norm.num_batches_tracked, norm.running_mean" in said
    assert caught[0].filename == __file__
    assert torch.equal(model.wte.weight, trained.wte.weight)
    assert torch.equal(model.norm2.weight, before)
    with pytest.raises(ArtifactError, match="of another shape"):
        load_merged(artifact, TiedModel(width=5), strict=False)


def test_a_model_without_a_name_in_common_is_refused_in_any_case(publish: Publish) -> None:
    with pytest.raises(ArtifactError, match="missing from the artifact: bias, weight; unexpected by the model: head"):
        load_merged(publish(), nn.Linear(2, 2), strict=False)


def test_what_fits_is_loaded_without_a_word(publish: Publish) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_merged(publish(), TiedModel(), strict=False)


def test_a_record_says_that_its_search_was_rejected(publish: Publish) -> None:
    record = publish(status="rejected", weights=None)
    with pytest.raises(ArtifactError, match=r"search was rejected \(The verdict on val_loss is: rejected\)\."):
        load_merged(record.path, TiedModel())


def test_an_outranked_record_says_so(publish: Publish) -> None:
    publish(step=1, value=1.0, save_top_k=1)
    with pytest.raises(ArtifactError, match="save_top_k"):
        publish(step=2, value=2.0, save_top_k=1).tensors()


@pytest.mark.parametrize("name", ["", "best"])
def test_a_run_without_an_accepted_search_says_how_they_ended(publish: Publish, tmp_path: Path, name: str) -> None:
    for step in range(2):
        publish(step=step, status="rejected", weights=None)
    publish(step=2, status="unconfirmed")
    with pytest.raises(ArtifactError, match=r"3 searches.*2 rejected, 1 unconfirmed"):
        Artifact.open(tmp_path / "merges" / name)


@pytest.mark.parametrize("name", ["", "nothing", "best"])
def test_what_is_no_artifact_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="directory with a manifest"):
        Artifact.open(tmp_path / name)


def test_a_flipped_bit_is_found_unless_hashes_are_not_wanted(publish: Publish) -> None:
    artifact = publish()
    path = artifact.path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="another SHA-256"):
        load_merged(artifact.path, TiedModel())
    Artifact.open(artifact.path, verify=False)


def test_a_truncated_or_lost_file_is_found_without_hashing(publish: Publish) -> None:
    artifact = publish()
    path = artifact.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes instead of"):
        Artifact.open(artifact.path, verify=False)
    path.unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        Artifact.open(artifact.path, verify=False)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a//b", "./a", "a/../b", "a\\b", "C:a", ""])
def test_names_that_leave_the_directory_are_refused(publish: Publish, name: str) -> None:
    artifact = publish()
    record = artifact.manifest["files"]["model.safetensors"]
    edit_manifest(artifact, lambda manifest: manifest["files"].update({name: record}))
    with pytest.raises(ArtifactError):
        Artifact.open(artifact.path)


def test_a_link_that_leaves_the_directory_is_refused(publish: Publish, tmp_path: Path) -> None:
    artifact = publish()
    path = artifact.path / "model.safetensors"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="must lie inside"):
        Artifact.open(artifact.path)


def test_a_pointer_that_leaves_the_run_is_refused(publish: Publish, tmp_path: Path) -> None:
    merges = tmp_path / "merges"
    publish()
    shutil.move(merges / "step=000001000", tmp_path / "elsewhere")
    (merges / "best").unlink()
    (merges / "best.json").write_text('{"artifact": "../elsewhere"}')
    with pytest.raises(ArtifactError, match="must lie inside"):
        Artifact.open(merges)
    (merges / "best.json").write_text("[]")
    with pytest.raises(ArtifactError, match="must read"):
        Artifact.open(merges)


def test_a_file_that_the_manifest_does_not_list_is_not_read(publish: Publish) -> None:
    artifact = publish()
    shutil.copy(artifact.path / "model.safetensors", artifact.path / "model-00001-of-00001.safetensors")
    load_merged(artifact.path, TiedModel())


def test_an_artifact_may_be_moved_on_its_own(publish: Publish, tmp_path: Path) -> None:
    trained, model = randomised(1), randomised(2)
    shutil.move(publish(weights=tensors_of(trained)).path, tmp_path / "elsewhere")
    load_merged(tmp_path / "elsewhere", model)
    assert same(tensors_of(model), tensors_of(trained))


def test_an_artifact_shows_itself_in_a_line_and_as_a_card(publish: Publish) -> None:
    """Goes red if it shows its whole manifest, or if a name becomes markup."""
    artifact = publish(weights=tensors_of(randomised(1)))
    assert (
        repr(artifact) == f"Artifact('{artifact.path}', accepted, val_loss {artifact.manifest['verdict']['value']:.5g})"
    )
    hostile = {**artifact.manifest["verdict"], "sentence": "<script>{x}</script>"}
    card = Artifact(artifact.path, {**artifact.manifest, "verdict": hostile})._repr_html_()
    assert "load_merged(&quot;" in card
    assert "&lt;script&gt;{x}" in card
    record = Artifact(artifact.path, {**artifact.manifest, "files": {}})._repr_html_()
    assert "without weights" in record
