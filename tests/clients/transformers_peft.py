"""A GPT-2 of transformers under LoRA of PEFT, in a plain LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_ckmerge import load_merged
from tests.clients.harness import Client, main

VOCABULARY, LENGTH = 32, 16


def model() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)
    config.loss_type = "ForCausalLM"
    base = GPT2LMHeadModel(config)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], lora_dropout=0.1))


def sentences(number: int, seed: int) -> Tensor:
    """Return rows that count upwards from a random token by a random step of 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (number, 1), generator=generator)
    step = torch.randint(1, 4, (number, 1), generator=generator)
    return (first + step * torch.arange(LENGTH)) % VOCABULARY


class LanguageModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = model()

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=ids, labels=ids).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=2.0)


def validation() -> DataLoader[Any]:
    return DataLoader(sentences(128, 2), batch_size=8)  # type: ignore[arg-type]


def train(callbacks: list[Any], root: Path) -> LanguageModel:
    pl.seed_everything(1, verbose=False)
    module = LanguageModel()
    trainer = pl.Trainer(
        max_steps=60,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    trainer.fit(module, DataLoader(sentences(512, 1), batch_size=8, shuffle=True), validation())  # type: ignore[arg-type]
    return module


@torch.no_grad()
def value(_: LanguageModel, artifact: Path) -> float:
    module = LanguageModel()
    load_merged(artifact, module)
    module.model.eval()
    losses = [module.model(input_ids=ids, labels=ids).loss for ids in validation()]
    return float(torch.stack(losses).double().mean())


if __name__ == "__main__":
    main(Client("transformers and PEFT", ["transformers", "peft", "lightning"], train, value, pl.Callback))
