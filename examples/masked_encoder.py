"""Pretrain a small BERT on masked bytes of Python's own sources, the model being transformers'.

    python examples/masked_encoder.py [--trainer.max_steps=800 and the like]

Everything is written under ``runs/masked-encoder``, which a new run replaces. The merge is also written for
transformers: ``BertForMaskedLM.from_pretrained("runs/masked-encoder/merges/best/hf")`` opens it.

Letters: B windows in a batch, T bytes in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from comparison import LastSearch, command_line, conclude, contenders, fit, measure, start
from gpt import NUM_BYTES
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pretraining import Windows, read_stdlib
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("runs/masked-encoder")
MASK = NUM_BYTES
MASKED_SHARE = 0.15
# What transformers leaves out of its loss.
NOT_ASKED = -100


class MaskedEncoder(LightningModule):
    """Trains a BERT over bytes with AdamW at a constant learning rate after a warm-up.

    Args:
        width: Features a byte.
        num_layers: Layers.
        num_heads: Attention heads; divides ``width``.
        context: Bytes in a window.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: Optimizer steps over which it rises linearly.
    """

    def __init__(
        self,
        width: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        context: int = 64,
        learning_rate: float = 2e-3,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.bert = BertForMaskedLM(
            BertConfig(
                vocab_size=NUM_BYTES + 1,
                hidden_size=width,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=4 * width,
                max_position_embeddings=context,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross-entropy of the masked bytes, in nats."""
        seen_BT, asked_BT = batch
        loss: Tensor = self.bert(input_ids=seen_BT, labels=asked_BT).loss
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def masked(windows: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return windows as the model sees them, and what it is asked, both ``(B, T)``: the bytes behind the masks."""
    bytes_BT = torch.stack([*windows]).long()
    is_masked = torch.rand(bytes_BT.shape, generator=generator) < MASKED_SHARE
    return [bytes_BT.masked_fill(is_masked, MASK), bytes_BT.masked_fill(~is_masked, NOT_ASKED)]


class MaskedStdlib(LightningDataModule):
    """Windows of the Python standard library's sources; each file belongs to one of train, validation and test.

    Args:
        batch_size: Windows a batch.
        context: Bytes in a window.
        num_eval_batches: Batches in each of the validation and test sets, drawn and masked once, the same in every run.
    """

    def __init__(self, batch_size: int = 16, context: int = 64, num_eval_batches: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.num_eval_windows = num_eval_batches * batch_size

    def setup(self, stage: str) -> None:
        texts = read_stdlib()
        # Such windows hold one byte more than they predict.
        self.train = Windows(texts["train"], self.context - 1)
        self.val, self.test = (self.fixed(texts[split]) for split in ("val", "test"))

    def fixed(self, text: bytes) -> TensorDataset:
        """Return windows to judge by, masked once and for all."""
        windows = Windows(text, self.context - 1, self.num_eval_windows)
        return TensorDataset(*masked(list(windows), torch.Generator().manual_seed(0)))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=masked)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, self.batch_size)


def main(overrides: Sequence[str] = ()) -> None:
    start(RUN)
    cli = fit(CONFIG, overrides)
    ours, pair = (LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-pair"))
    measured = {name: measure(cli, weights) for name, weights in contenders(ours, pair).items()}
    conclude("Loss in nats a masked byte", measured, ours, pair, RUN)


if __name__ == "__main__":
    main(command_line())
