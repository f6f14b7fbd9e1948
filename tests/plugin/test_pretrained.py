"""``artifact.formats: [hf]``: a directory beside the weights that ``from_pretrained`` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ckmerge import ArtifactConfig, BufferConfig, CheckpointMergeCallback, SearchConfig, load_merged
from lightning_ckmerge.errors import ConfigError
from tests.cli.test_export import open_pretrained
from tests.support import trainers
from tests.support.language import CASES, Language, gpt2, llama, loader, logits
from tests.support.models import Classifier, points_loader

FORMATS = ("safetensors", "ckpt", "hf")


def train(module: pl.LightningModule, tmp_path: Path, loaders: Any, size: str = "5GB") -> CheckpointMergeCallback:
    callback = CheckpointMergeCallback(
        dirpath=tmp_path / "merges",
        check_mode=False,
        mode="max",  # in so short a run older weights have the higher loss: something is accepted
        buffer=BufferConfig(every_n_train_steps=1, capacity=4),
        search=SearchConfig(n_trials=1, max_fraction_of_training=None),
        artifact=ArtifactConfig(formats=FORMATS, max_shard_size=size),
        save_top_k=-1,
        on_error="raise",
    )
    options: dict[str, Any] = {"max_steps": 6, "num_sanity_val_steps": 0}
    trainers.train(module, *loaders, root=tmp_path, callbacks=[callback], seed=None, **options)
    return callback


@pytest.mark.parametrize("size", ["5GB", "4KB"])
@pytest.mark.parametrize("case", CASES)
def test_an_artifact_holds_a_directory_that_from_pretrained_opens(tmp_path: Path, case: str, size: str) -> None:
    make, wrap, _, _ = CASES[case]
    module = wrap(make())
    callback = train(module, tmp_path, (loader(module, train=True), loader(module, train=False)), size)
    artifact = callback.best_artifact
    assert artifact is not None
    opened = open_pretrained(case, artifact.path / "hf")
    merged = wrap(make())
    load_merged(artifact, merged)
    inner = merged.net["lm"] if isinstance(merged, Language) else merged.model
    assert torch.equal(logits(opened), logits(inner))
    assert opened.config.architectures == [type(inner).__name__]
    assert {"hf/README.md", "hf/config.json"} <= artifact.manifest["files"].keys()
    assert ("hf/model.safetensors.index.json" in artifact.manifest["files"]) is (size == "4KB")


class Tokenizer:
    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}")


def test_the_modules_tokenizer_goes_with_it(tmp_path: Path) -> None:
    module = Language(gpt2())
    module.tokenizer = Tokenizer()
    artifact = train(module, tmp_path, (loader(module, train=True), loader(module, train=False))).best_artifact
    assert artifact is not None
    assert "hf/tokenizer.json" in artifact.manifest["files"]


class Two(Language):
    def __init__(self) -> None:
        super().__init__(gpt2())
        self.net["teacher"] = llama()


@pytest.mark.parametrize(
    ("make", "message"), [(Classifier, "got none"), (Two, r"net\.lm \(GPT2LMHeadModel\), net\.teacher \(Llama")]
)
def test_a_module_without_one_such_model_is_refused_before_training(tmp_path: Path, make: Any, message: str) -> None:
    module = make()
    loaders = (
        (points_loader(train=True), points_loader(train=False))
        if isinstance(module, Classifier)
        else (loader(module, train=True), loader(module, train=False))
    )
    with pytest.raises(ConfigError, match=message):
        train(module, tmp_path, loaders)
