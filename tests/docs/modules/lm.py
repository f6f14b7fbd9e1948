"""``lm.LM`` of ``docs/cli.md``: a small GPT-2 of transformers on bytes."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


class LM(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4))

    def training_step(self, windows_BT: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=windows_BT[:, :-1].long(), labels=windows_BT[:, :-1].long()).loss

    def validation_step(self, windows_BT: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(windows_BT, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)
