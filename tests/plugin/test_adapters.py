"""PEFT's adapters alone are buffered, merged and published; products are merged exactly, and the artifact says so."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lightning_ckmerge import ArtifactConfig, CheckpointMergeCallback, SearchConfig, load_merged
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Coordinates, Grouped, Interval, Space
from lightning_ckmerge.core.spaces.groups import assign_groups
from lightning_ckmerge.errors import ArtifactError, ConfigError, FinalError
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.language import (
    NUM_TRAINED,
    RANK,
    Adapted,
    Language,
    adapted,
    gpt2,
    logits,
    make_adapter_merge,
    train_on_tokens,
)
from tests.support.models import tokens_loader
from tests.support.trainers import make_trainer
from tests.support.warnings import only_expected

peft: Any = pytest.importorskip("peft")

KINDS = ("factors", "products")
FORMATS = ("safetensors", "hf")


class Sparse(Space):
    """Groups that count different ones of the four snapshots, and none of them the third."""

    def __init__(self, group_of: Mapping[str, str] | None = None) -> None:
        self._group_of = group_of or {}

    def bind(self, names: Sequence[str]) -> Sparse:
        return Sparse(assign_groups(names, "kind"))

    @property
    def group_of(self) -> Mapping[str, str]:
        return self._group_of

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        return {"x": Interval(low=0.25, high=0.75)}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        return (1.0, 0.0, 0.0, 0.0)

    def by_group(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, tuple[float, ...]]:
        x = z_D["x"]
        return {"embeddings": (0.0, x, 0.0, 1 - x), "attention": (1 - x, 0.0, 0.0, x), "norms": (0.0, 0.0, 0.0, 1.0)}


# Products, with a trial that wins and whose coefficients differ between groups.
BY_GROUP = {"grouped": "grouped", "sparse": Sparse()}
RUNS = (*KINDS, *BY_GROUP)


class Published:
    """A run's artifact, and the snapshots that it is the merge of, each as a whole model."""

    def __init__(self, root: Path, kind: Any, **options: Any) -> None:
        self.make = partial(adapted, **options)
        self.module = self.fresh()
        self.merge: Any = "factors" if kind == "factors" else "products"
        search = SearchConfig(
            space=BY_GROUP.get(kind, "grouped"),
            anchors=[] if kind in BY_GROUP else ["uniform"],
            n_trials=2,
            max_fraction_of_training=None,
        )
        artifact = ArtifactConfig(formats=FORMATS, adapters=self.merge)
        train_on_tokens(self.module, make_adapter_merge(root, search=search, artifact=artifact))
        self.artifact = Artifact.open(next((root / "merges").glob("step=*")))
        self.buffer = root / "merges" / "buffer"
        self.groups = {name: g["coefficients"] for name, g in self.artifact.manifest.get("groups", {}).items()}
        assert self.groups.keys() == ({"embeddings", "attention", "norms"} if kind in BY_GROUP else set())

    @property
    def counted(self) -> dict[int, dict[str, Tensor]]:
        """The snapshots with a coefficient other than 0 in any group, by their place."""
        manifest = self.artifact.manifest
        rows = self.groups.values() or [manifest["coefficients"]]
        files = [next(self.buffer.glob(f"*-{s['last_step']:09d}-point.safetensors")) for s in manifest["snapshots"]]
        found = {k: load_file(file) for k, file in enumerate(files) if any(c_K[k] for c_K in rows)}
        assert len(found) > 1
        return found

    def weighted(self, name: str, tensors_K: Mapping[int, Tensor]) -> Any:
        """The sum of a tensor's values, by place, with the coefficients of its kind."""
        c_K = self.groups.get(assign_groups([name], "kind")[name], self.artifact.manifest["coefficients"])
        return sum(c_K[k] * tensor for k, tensor in tensors_K.items())

    def fresh(self) -> Adapted:
        return Adapted(self.make())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    return {kind: Published(tmp_path_factory.mktemp(kind), kind) for kind in RUNS}


def trained_names(module: pl.LightningModule) -> set[str]:
    return {n for n, p in module.named_parameters() if p.requires_grad}


def test_snapshots_and_artifact_hold_what_is_trained_and_no_base(runs: dict[str, Published]) -> None:
    trained = trained_names(Adapted())
    assert len(trained) == NUM_TRAINED
    model_bytes = sum(p.nbytes for p in Adapted().parameters())
    for run in runs.values():
        files = sorted(run.buffer.iterdir())
        assert len(files) == 4
        for file in files:
            assert set(load_file(file)) == trained
            assert file.stat().st_size < model_bytes / 8
        # The counter is no parameter: it is the latest weights'.
        assert set(run.artifact.tensors()) == trained | {"seen"}


def test_factors_are_averaged_each(runs: dict[str, Published]) -> None:
    run = runs["factors"]
    stored = run.artifact.tensors()
    counted = run.counted
    for name in trained_names(Adapted()):
        expected = run.weighted(name, {k: tensors[name] for k, tensors in counted.items()})
        torch.testing.assert_close(stored[name], expected, msg=name)


def merged_into_base(run: Published) -> Any:
    """A GPT-2 without adapters, its weights the sum of what PEFT's own ``merge_and_unload`` makes of each snapshot."""
    merged: dict[str, dict[int, Tensor]] = {}
    for k, tensors in run.counted.items():
        module = run.fresh()
        module.load_state_dict(tensors, strict=False)
        for name, tensor in module.net["lm"].merge_and_unload().state_dict().items():
            merged.setdefault(name, {})[k] = tensor
    total = {name: run.weighted(name, tensors_K) for name, tensors_K in merged.items()}
    model = gpt2()
    # The embedding has an adapter, and the head, which is tied to its base, has none.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    del total["lm_head.weight"]
    model.load_state_dict(total, strict=False)
    return model


@pytest.mark.parametrize("kind", ["products", *BY_GROUP, "rslora"])
def test_products_are_merged_exactly(tmp_path: Path, runs: dict[str, Published], kind: str) -> None:
    """Goes red if factors are averaged, a coefficient is another group's, or the scaling changes with the rank."""
    run = Published(tmp_path, "products", use_rslora=True) if kind == "rslora" else runs[kind]
    expected = logits(merged_into_base(run))
    module = run.fresh()
    load_merged(run.artifact, module)
    torch.testing.assert_close(logits(module.net["lm"]), expected, rtol=1e-4, atol=1e-5)
    averaged = run.fresh()
    counted = run.counted
    factors = {n: run.weighted(n, {k: t[n] for k, t in counted.items()}) for n in trained_names(averaged)}
    averaged.load_state_dict(factors, strict=False)
    assert not torch.allclose(logits(averaged.net["lm"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_the_manifest_says_how_and_the_reports_too(runs: dict[str, Published], kind: str) -> None:
    run = runs[kind]
    said = run.artifact.manifest["adapters"]
    module = Adapted()
    assert said["merge"] == run.merge
    assert set(said["left_out"]) == set(module.state_dict()) - trained_names(module) - {"seen"}
    rank = len(run.counted) * RANK if run.merge == "products" else RANK
    config = said["peft"]["default"]["config"]
    assert (config["r"], config["lora_alpha"]) == (rank, 3 * rank)
    sentence = {"factors": "averaged, tensor by tensor;", "products": "LoRA's products merged exactly;"}[run.merge]
    for text in (run.artifact.path / "report.md", run.artifact.path / "hf" / "README.md"):
        assert sentence in text.read_text()


@pytest.mark.parametrize("kind", RUNS)
def test_the_winners_value_is_that_of_what_is_published(runs: dict[str, Published], kind: str) -> None:
    manifest = runs[kind].artifact.manifest
    module = runs[kind].fresh()
    load_merged(runs[kind].artifact, module)
    with only_expected():
        (logged,) = make_trainer().validate(module, tokens_loader(train=False), verbose=False)
    winner = next(t for t in manifest["anchors"] + manifest["trials"] if t["name"] == manifest["verdict"]["winner"])
    assert winner["search"]["value"] == pytest.approx(logged["val_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", RUNS)
def test_peft_opens_the_hf_directory_with_equal_logits(runs: dict[str, Published], tmp_path: Path, kind: str) -> None:
    run = runs[kind]
    module = run.fresh()
    load_merged(run.artifact, module)
    opened = peft.PeftModel.from_pretrained(gpt2(), run.artifact.path / "hf")
    assert torch.equal(logits(opened), logits(module.net["lm"]))
    # What PEFT itself would save.
    module.net["lm"].save_pretrained(tmp_path)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (run.artifact.path / "hf", tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("kind", RUNS)
def test_export_needs_nothing_but_the_artifact(runs: dict[str, Published], tmp_path: Path, kind: str) -> None:
    artifact = runs[kind].artifact
    found = ckmerge_json("export", artifact.path, "--to", "hf", "--out", tmp_path / "out")
    assert (found["adapters"], found["tensors"]) == (["default"], NUM_TRAINED)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (artifact.path / "hf" / name).read_bytes()
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", RUNS)
def test_verify_rebuilds_the_adapters_bit_for_bit(runs: dict[str, Published], tmp_path: Path, kind: str) -> None:
    """From the kept snapshots and a checkpoint, which holds the base as well."""
    run, latest = runs[kind], tmp_path / "step=8.ckpt"
    torch.save({"state_dict": run.module.state_dict(), "global_step": 8}, latest)
    found = ckmerge_json("verify", run.artifact.path, "--rebuild", "--latest", latest)["rebuild"]
    assert (found["state"], found["compared"], found["different"]) == ("equal", NUM_TRAINED, [])
    assert found["not_compared"] == ["seen"]
    torch.save({"state_dict": Adapted().state_dict(), "global_step": 8}, latest)
    found = ckmerge_json("verify", run.artifact.path, "--rebuild", "--latest", latest, code=1)["rebuild"]
    assert len(found["different"]) == NUM_TRAINED


def test_loading_is_strict_but_for_the_frozen_base(runs: dict[str, Published]) -> None:
    artifact = runs["factors"].artifact
    with pytest.raises(ArtifactError, match=r"missing from the artifact: .*c_proj\.lora_A"):
        load_merged(artifact, Adapted(adapted(target_modules=["c_attn", "c_proj", "wte"])))
    with pytest.raises(ArtifactError, match=r"unexpected by the model: .*lora_A"):
        load_merged(artifact, Language(gpt2()))
    with pytest.raises(ArtifactError, match="of another shape"):
        load_merged(artifact, Adapted(adapted(r=3)))


class Thawing(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            pl_module.net["lm"].requires_grad_(True)


def test_a_base_that_is_thawed_is_not_merged_without(tmp_path: Path) -> None:
    with pytest.raises(FinalError, match="must stay frozen during `fit`, got 28 trainable tensors"):
        train_on_tokens(Adapted(), make_adapter_merge(tmp_path), callbacks=[Thawing()])


def test_a_base_that_is_trained_from_the_start_is_merged(tmp_path: Path) -> None:
    module = Adapted()
    module.net["lm"].base_model.model.transformer.wpe.requires_grad_(True)
    train_on_tokens(module, make_adapter_merge(tmp_path))
    (artifact,) = (tmp_path / "merges").glob("step=*")
    assert sum("wpe" in name for name in Artifact.open(artifact).tensors()) == 1


class MeanTeacher(Adapted):
    """A frozen copy follows the student: its adapters change without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net["teacher"] = copy.deepcopy(self.net["lm"]).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        for own, student in zip(self.net["teacher"].parameters(), self.net["lm"].parameters(), strict=True):
            if student.requires_grad:
                own.data.lerp_(student.data, 0.5)


def test_a_teachers_adapters_are_merged_too(tmp_path: Path) -> None:
    train_on_tokens(MeanTeacher(), make_adapter_merge(tmp_path))
    (artifact,) = (tmp_path / "merges").glob("step=*")
    names = set(Artifact.open(artifact).tensors())
    assert names == trained_names(Adapted()) | {n.replace(".lm.", ".teacher.") for n in trained_names(Adapted())} | {
        "seen"
    }


def injected() -> Any:
    """A model whose adapters have no PeftModel around them, as transformers' ``add_adapter`` leaves it."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=RANK, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.inject_adapter_in_model(config, gpt2())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_injected_into_a_model_can_be_opened_by_peft(tmp_path: Path, kind: Any) -> None:
    train_on_tokens(
        Adapted(injected()), make_adapter_merge(tmp_path, artifact=ArtifactConfig(formats=FORMATS, adapters=kind))
    )
    (artifact,) = (tmp_path / "merges").glob("step=*")
    module = Adapted(injected())
    load_merged(artifact, module)
    opened = peft.PeftModel.from_pretrained(gpt2(), artifact / "hf")
    assert torch.equal(logits(opened), logits(module.net["lm"]))


def prompted() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(gpt2(), config)


def test_other_adapters_are_averaged_and_refused_where_peft_saves_no_tensor_of_theirs(tmp_path: Path) -> None:
    train_on_tokens(Adapted(prompted()), make_adapter_merge(tmp_path))
    (path,) = (tmp_path / "merges").glob("step=*")
    artifact = Artifact.open(path)
    assert set(artifact.tensors()) == {"seen", "net.lm.prompt_encoder.default.embedding.weight"}
    load_merged(artifact, Adapted(prompted()))
    assert "must say how PEFT saves" in ckmerge("export", path, "--out", tmp_path / "out", code=2).stderr
    config = ArtifactConfig(formats=FORMATS)
    with pytest.raises(ConfigError, match="needs one model whose adapters PEFT can save"):
        train_on_tokens(Adapted(prompted()), make_adapter_merge(tmp_path / "hf", artifact=config))


def test_what_cannot_be_merged_by_products_is_refused_before_training(tmp_path: Path) -> None:
    config = ArtifactConfig(adapters="products")
    with pytest.raises(ConfigError, match="needs LoRA layers of PEFT that are trained, got none in Language"):
        train_on_tokens(Language(gpt2()), make_adapter_merge(tmp_path, artifact=config))
    space = Grouped(groups={"first": r"_A\."}, factors={"first": 2.0})
    with pytest.raises(
        ConfigError, match=r"one group.*lora_embedding_A.* in 'first' and .*lora_embedding_B.* in 'other'"
    ):
        train_on_tokens(Adapted(), make_adapter_merge(tmp_path, artifact=config, search=SearchConfig(space=space)))
    with pytest.raises(ConfigError, match='`apply` "on_train_end" would give the module\'s LoRA layers another rank'):
        CheckpointMergeCallback(artifact=config, apply="on_train_end")


def test_the_plan_says_how_much_is_buffered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        train_on_tokens(Adapted(), make_adapter_merge(tmp_path))
    assert f"{NUM_TRAINED} of 36 tensors, 1.5 kB of 30.3 kB, are buffered and merged (factors)" in caplog.text


def test_a_run_without_adapters_says_nothing_of_them(tmp_path: Path) -> None:
    train_on_tokens(Language(gpt2()), make_adapter_merge(tmp_path))
    (path,) = (tmp_path / "merges").glob("step=*")
    assert "adapters" not in json.loads((path / "manifest.json").read_text())


def test_a_plan_counts_the_base_for_the_search_alone(tmp_path: Path) -> None:
    evaluation = {"cache_batches": 0}
    callback = {"class_path": "lightning_ckmerge.CheckpointMergeCallback", "init_args": {"evaluation": evaluation}}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 8, "logger": False, "callbacks": [callback]},
        "model": {"class_path": "tests.support.language.Adapted"},
        "data": {"class_path": "tests.support.offline.PointsData"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    (found,) = ckmerge_json("plan", path)["plans"]
    trained = sum(p.nbytes for p in Adapted().parameters() if p.requires_grad)
    assert found["buffer_memory"] == 2 * trained
    assert found["search_memory"] == sum(p.nbytes for p in Adapted().parameters())
