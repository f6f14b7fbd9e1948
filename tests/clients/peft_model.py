"""LoRA adapters of PEFT on a model of transformers', and ``PeftModel.from_pretrained`` on the artifact's ``hf/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_ckmerge import Artifact, ArtifactConfig
from tests.clients.check import Client
from tests.clients.transformers_model import loss_of, make_model, train


def make_base() -> Any:
    pl.seed_everything(3, verbose=False)
    return make_model()


def make_adapted() -> Any:
    base = make_base()
    with torch.random.fork_rng():
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1))


def train_adapters(root: Path, callbacks: list[pl.Callback]) -> Any:
    return train(root, callbacks, make_adapted)


def predict(artifact: Artifact, trained: Any) -> float:
    return loss_of(PeftModel.from_pretrained(make_base(), artifact.path / "hf"))


CLIENT = Client(
    packages=["peft", "transformers"],
    does="LoRA adapters on the same Llama",
    predicts='`PeftModel.from_pretrained(base, "hf")`, its loss',
    train=train_adapters,
    predict=predict,
    merge={"artifact": ArtifactConfig(formats=("safetensors", "hf"))},
)
