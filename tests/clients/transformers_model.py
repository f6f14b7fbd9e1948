"""A causal language model of transformers' in a plain module, and ``from_pretrained`` on the artifact's ``hf/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_ckmerge import Artifact, ArtifactConfig
from tests.clients.check import Client, confirmed

VOCABULARY, LENGTH, BATCH = 32, 24, 8


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,
    )
    return AutoModelForCausalLM.from_config(config)


class Pretraining(pl.LightningModule):
    """The few lines that a user writes around a model of transformers'."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def loader(num_samples: int, *, seed: int, shuffle: bool = False) -> Any:
    """Return walks on a ring of tokens: the next one is near the last."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2, 4, (num_samples, LENGTH), generator=generator)
    return DataLoader(steps.cumsum(1) % VOCABULARY, batch_size=BATCH, shuffle=shuffle)


def train(root: Path, callbacks: list[pl.Callback], make: Any = make_model) -> Any:
    pl.seed_everything(1, verbose=False)
    module = Pretraining(make())
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(160, seed=1, shuffle=True), loader(128, seed=2))
    return module


@torch.no_grad()
def loss_of(model: Any) -> float:
    """Return the mean loss over the confirmation half, by the model's own forward pass."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.double() for batch in confirmed(list(loader(128, seed=2)))]
    return float(torch.stack(losses).mean())


def predict(artifact: Artifact, trained: Any) -> float:
    return loss_of(AutoModelForCausalLM.from_pretrained(artifact.path / "hf"))


CLIENT = Client(
    packages=["transformers"],
    does="a Llama of two layers in a plain module",
    predicts='`AutoModelForCausalLM.from_pretrained("hf")`, its loss',
    train=train,
    predict=predict,
    merge={"artifact": ArtifactConfig(formats=("safetensors", "hf"))},
)
