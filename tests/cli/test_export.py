from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_ckmerge.cli import pretrained
from lightning_ckmerge.report.card import render_card
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.language import CASES, Language, gpt2, llama, logits
from tests.support.outcomes import Publish, tensors_of

transformers: Any = pytest.importorskip("transformers")


def build(case: str, seed: int = 1) -> tuple[Any, Any]:
    """A module whose weights are those of no fresh model, and the transformers model in it."""
    make, wrap, _, _ = CASES[case]
    model = make()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return wrap(model), model


def save_config(model: Any, path: Path) -> Path:
    """A directory with config and a tokenizer, as a trainer has it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"no weights of ours")
    return path


def open_pretrained(case: str, path: Path) -> Any:
    """Open as users do; nothing may be missing, unexpected or new."""
    auto = getattr(transformers, CASES[case][3])
    with contextlib.redirect_stderr(io.StringIO()):
        model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_opens_an_exported_artifact_with_equal_logits(
    publish: Publish, tmp_path: Path, case: str, size: str
) -> None:
    module, model = build(case)
    artifact = publish(weights=tensors_of(module))
    config = save_config(model, tmp_path / "config")
    found = ckmerge_json(
        "export",
        artifact.path,
        "--to",
        "hf",
        "--config-from",
        config,
        "--out",
        tmp_path / "hf",
        "--max-shard-size",
        size,
    )
    assert found["prefix"] == CASES[case][2]
    assert ("model.safetensors.index.json" in found["files"]) is (size == "4KB")
    assert "tokenizer.json" in found["files"]
    opened = open_pretrained(case, tmp_path / "hf")
    assert type(opened) is type(model)
    assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("case", ["gpt2", "llama-tied"])
def test_tied_weights_are_written_once_under_the_name_that_is_loaded_first(
    publish: Publish, tmp_path: Path, case: str
) -> None:
    module, model = build(case)
    config = save_config(model, tmp_path / "config")
    ckmerge("export", publish(weights=tensors_of(module)).path, "--config-from", config, "--out", tmp_path / "hf")
    names = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert names == {n for n, _ in model.named_parameters()}
    opened = open_pretrained(case, tmp_path / "hf")
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


def test_the_card_tells_verdict_metrics_recipe_and_sources(publish: Publish, tmp_path: Path) -> None:
    module, model = build("gpt2")
    artifact = publish(weights=tensors_of(module))
    config = save_config(model, tmp_path / "config")
    ckmerge("export", artifact.path, "--config-from", config, "--out", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert "library_name: transformers" in front
    assert artifact.manifest["verdict"]["sentence"].replace("_", "\\_") in body
    assert all(s["sha256"][:12] in body for s in artifact.manifest["snapshots"] if s["sha256"])
    transformers.AutoConfig.from_pretrained(tmp_path / "hf")


def test_any_checkpoint_can_be_exported_and_a_merge_says_that_nothing_was_measured(tmp_path: Path) -> None:
    paths, models = [], []
    for step in (100, 200):
        module, model = build("llama", seed=step)
        models.append(model)
        paths.append(tmp_path / f"step={step}.ckpt")
        torch.save({"state_dict": tensors_of(module), "global_step": step}, paths[-1])
    config = save_config(models[0], tmp_path / "config")
    ckmerge("export", paths[1], "--config-from", config, "--out", tmp_path / "last")
    assert torch.equal(logits(open_pretrained("llama", tmp_path / "last")), logits(models[1]))
    ckmerge("merge", *paths, "--weights", "1,3", "--out", tmp_path / "merged")
    ckmerge("export", tmp_path / "merged", "--config-from", config, "--out", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "step=200.ckpt" in card
    assert "+0.7500" in card
    assert "nothing is claimed" in card


def test_merging_hub_directories_gives_one(tmp_path: Path) -> None:
    models = [build("gpt2", seed=s)[1] for s in (1, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{i}")
    ckmerge(
        "merge", tmp_path / "checkpoint-0", tmp_path / "checkpoint-1", "--weights", "1,1", "--out", tmp_path / "out"
    )
    opened = open_pretrained("gpt2", tmp_path / "out")
    for (name, p), a, b in zip(opened.named_parameters(), *(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, (a + b) / 2, msg=name)


def test_the_config_of_the_run_is_found(publish: Publish, tmp_path: Path) -> None:
    """An earlier artifact has an `hf` directory; this one was published without."""
    module, model = build("gpt2")
    earlier = publish(step=1, weights=tensors_of(module))
    save_config(model, earlier.path / "hf")
    artifact = publish(step=2, weights=tensors_of(module))
    found = ckmerge_json("export", artifact.path, "--out", tmp_path / "out")
    assert Path(found["config_from"]) == earlier.path / "hf"
    assert torch.equal(logits(open_pretrained("gpt2", tmp_path / "out")), logits(model))


def test_without_transformers_the_prefix_must_be_named_and_is_enough(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model = build("gpt2")
    artifact, config = publish(weights=tensors_of(module)), save_config(model, tmp_path / "config")
    monkeypatch.setattr(pretrained, "expected_tensors", lambda config_dir: None)
    args = ("export", artifact.path, "--config-from", config, "--out", tmp_path / "hf")
    assert "--prefix" in ckmerge(*args, code=2).stderr
    ckmerge(*args, "--prefix", "net.lm.")
    assert torch.equal(logits(open_pretrained("gpt2", tmp_path / "hf")), logits(model))


@pytest.mark.parametrize("prefix", ["foo.", "ne", "net.lm.transformer.x", "net.l"])
@pytest.mark.parametrize("has_transformers", [True, False])
def test_a_prefix_of_nothing_writes_nothing(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, has_transformers: bool
) -> None:
    """An empty model with a card that says "Accepted" would be the worst of exports."""
    module, model = build("gpt2")
    artifact, config = publish(weights=tensors_of(module)), save_config(model, tmp_path / "config")
    if not has_transformers:
        monkeypatch.setattr(pretrained, "expected_tensors", lambda config_dir: None)
    args = ("export", artifact.path, "--config-from", config, "--out", tmp_path / "hf", "--prefix", prefix)
    assert "The names start with net.;" in ckmerge(*args, code=2).stderr
    assert not (tmp_path / "hf").exists()
    whole = ckmerge_json(*args[:-1], "net.lm")
    assert (whole["prefix"], whole["left_out"], whole["verdict"]) == ("net.lm.", 1, "accepted")


@pytest.mark.parametrize("status", ["unconfirmed", "rejected"])
def test_the_card_says_what_was_not_accepted(publish: Publish, status: str) -> None:
    manifest = json.loads(json.dumps(publish().manifest))
    assert "not shown to be better" not in render_card(manifest)
    manifest["verdict"]["status"] = status
    card = render_card(manifest)
    assert f"**{status.capitalize()}.**" in card
    assert "not shown to be better" in card


def twice(model: Any) -> dict[str, Tensor]:
    """A student and a teacher side by side."""
    return {f"{side}.{n}": t for side in ("student", "teacher") for n, t in tensors_of(model).items()}


def test_of_two_models_one_must_be_chosen(publish: Publish, tmp_path: Path) -> None:
    _, model = build("llama")
    artifact, config = publish(weights=twice(model)), save_config(model, tmp_path / "config")
    args = ("export", artifact.path, "--config-from", config, "--out", tmp_path / "hf")
    assert "'student.', 'teacher.'" in ckmerge(*args, code=2).stderr
    assert ckmerge_json(*args, "--prefix", "teacher.")["tensors"] == len(model.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json must be there"),
        (lambda: gpt2(n_inner=8), "must have the shapes of the config's model"),
        (llama, "must hold every tensor of the config's model, got none called"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(publish: Publish, tmp_path: Path, config: Any, message: str) -> None:
    artifact = publish(weights=tensors_of(Language(gpt2())))
    args: list[Any] = ["export", artifact.path, "--out", tmp_path / "hf"]
    if config is not None:
        args += ["--config-from", save_config(config(), tmp_path / "config")]
    assert message in ckmerge(*args, code=2).stderr
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_config_that_names_no_model_of_transformers_is_refused_with_what_it_names(
    publish: Publish, tmp_path: Path
) -> None:
    artifact, config = publish(weights=tensors_of(Language(gpt2()))), save_config(gpt2(), tmp_path / "config")
    path = config / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["OurOwn"]}))
    error = ckmerge("export", artifact.path, "--config-from", config, "--out", tmp_path / "hf", code=2).stderr
    assert "got ['OurOwn']. Install it, correct the entry" in error


def test_the_best_of_a_run_is_exported_and_a_record_is_refused(publish: Publish, tmp_path: Path) -> None:
    module, model = build("gpt2")
    config = save_config(model, tmp_path / "config")
    record = publish(step=1, status="rejected", weights=None)
    publish(step=2, weights=tensors_of(module))
    ckmerge("export", tmp_path / "merges", "--config-from", config, "--out", tmp_path / "hf")
    error = ckmerge("export", record.path, "--config-from", config, "--out", tmp_path / "other", code=2).stderr
    assert "its search was rejected" in error
    shutil.rmtree(tmp_path / "hf")
    assert json.loads((config / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
