"""Small transformers models inside LightningModules, plain and with LoRA adapters, and short runs that merge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from tests.support.models import tokens_loader
from tests.support.trainers import make_merge, train

VOCABULARY = 23


class Language(pl.LightningModule):
    """A causal language model, with something of the user's own around it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = torch.nn.ModuleDict({"lm": model})
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net["lm"](input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Vision(pl.LightningModule):
    """An image classifier, of one class, so that every step helps on every batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(pixel_values=batch, labels=torch.ones(len(batch), dtype=torch.long)).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=VOCABULARY, **ids, **options)
    )


def llama(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
    )


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=2,
        )
    )


CASES: dict[str, Any] = {
    "gpt2": (gpt2, Language, "net.lm.", "AutoModelForCausalLM"),
    "llama": (llama, Language, "net.lm.", "AutoModelForCausalLM"),
    "llama-tied": (lambda: llama(tied=True), Language, "net.lm.", "AutoModelForCausalLM"),
    "vit": (vit, Vision, "model.", "AutoModelForImageClassification"),
}


def loader(module: pl.LightningModule, *, train: bool) -> DataLoader[Any]:
    if isinstance(module, Language):
        return tokens_loader(train=train)
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(images, batch_size=2)  # type: ignore[arg-type]


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        if hasattr(model.config, "image_size"):
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
            return model(pixel_values=images).logits
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


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


def make_adapter_merge(root: Path, **overrides: Any) -> CheckpointMergeCallback:
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
        "search_on_train_end": True,
        "save_top_k": 1,
    }
    return make_merge(**{**options, **overrides})


def train_on_tokens(module: pl.LightningModule, merge: CheckpointMergeCallback, **options: Any) -> None:
    """Train for eight steps."""
    options = {"root": None, "max_steps": 8, "num_sanity_val_steps": 0, **options}
    callbacks = [merge, *options.pop("callbacks", ())]
    train(module, tokens_loader(train=True), tokens_loader(train=False), callbacks=callbacks, **options)
