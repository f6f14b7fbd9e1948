"""A small GPT-2 with LoRA adapters in it, and short runs that merge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from tests.cli.transformers_models import VOCABULARY, Language, gpt2
from tests.plugin.models import tokens_loader

RANK = 2
# Of the tensors that are trained: the embedding's factors, two layers' factors, a norm that is trained whole.
NUM_TRAINED = 2 + 2 * 2 + 2


def adapted(**options: Any) -> Any:
    """A PeftModel, the same at each call."""
    import peft

    model = gpt2()
    torch.manual_seed(3)
    config = {
        "r": RANK,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": ["c_attn", "wte"],
        "modules_to_save": ["ln_f"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
        **options,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**config))


class Adapted(Language):
    def __init__(self, model: Any = None, lr: float = 0.02) -> None:
        super().__init__(adapted() if model is None else model)
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net["lm"](input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net["lm"](input_ids=batch, labels=batch).loss
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class MergesToValidate(Adapted):
    """Writes the adapters into their base for the time of a validation; taken out again, its last bits have changed."""

    def on_validation_start(self) -> None:
        self.net["lm"].merge_adapter()

    def on_validation_end(self) -> None:
        self.net["lm"].unmerge_adapter()


def make_merge(root: Path, **overrides: Any) -> CheckpointMergeCallback:
    """Point snapshots, and a mean of them that wins: the loss falls, so that, searching for high ones, old weights do.

    No batch is left to confirm with, so that no search is rejected.
    """
    options: dict[str, Any] = {
        "dirpath": root / "merges",
        "mode": "max",
        "check_mode": False,
        "buffer": BufferConfig(every_n_train_steps=1, capacity=4, snapshot="point", layout="uniform"),
        "search": SearchConfig(n_trials=2, max_fraction_of_training=None),
        "evaluation": EvaluationConfig(confirm_fraction=0.01),
        "every_n_train_steps": 100,
        "on_error": "raise",
        **overrides,
    }
    return CheckpointMergeCallback(**options)


def train(module: pl.LightningModule, callback: CheckpointMergeCallback, **options: Any) -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_steps=8,
        accelerator="cpu",
        callbacks=[callback, *options.pop("callbacks", ())],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, tokens_loader(train=True), tokens_loader(train=False))


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        ids = torch.arange(12).reshape(2, 6) % VOCABULARY
        result: Tensor = model(input_ids=ids).logits
        return result
