"""How the GPT is trained and on what: Python's own sources, so that nothing is downloaded.

Letters: B windows in a batch, T bytes in a window.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from gpt import GPT
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Dataset


class GPTModule(LightningModule):
    """Trains a ``GPT`` with AdamW at a constant learning rate after a warm-up.

    Args:
        gpt: The model.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: Optimizer steps over which it rises linearly.
        decay_fraction: Share of the run, at its end, over which it falls linearly to 0; 0 keeps it constant.
    """

    def __init__(
        self, gpt: GPT, *, learning_rate: float = 2e-3, warmup_steps: int = 50, decay_fraction: float = 0.0
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.decay_fraction = decay_fraction

    def configure_model(self) -> None:
        """Shard the model where a ``ModelParallelStrategy`` asks for it: each block on its own, and what is around."""
        if self.device_mesh is not None and not isinstance(self.gpt, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)

    def loss(self, windows_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a byte."""
        windows_BT = windows_BT.long()
        logits = self.gpt(windows_BT[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows_BT[:, 1:].flatten())

    def training_step(self, windows_BT: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(windows_BT)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows_BT: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(windows_BT)
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def test_step(self, windows_BT: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(windows_BT))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_decay_steps = self.decay_fraction * num_steps

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / self.warmup_steps)
            return rise * min(1.0, (num_steps - step) / num_decay_steps) if num_decay_steps else rise

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StdlibData(LightningDataModule):
    """Windows of the Python standard library's sources; each file belongs to one of train, validation and test.

    Args:
        batch_size: Windows a batch.
        context: Bytes that a window predicts; it holds one more.
        num_eval_batches: Batches in each of the validation and test sets, drawn once, the same in every run.
    """

    def __init__(self, batch_size: int = 16, context: int = 128, num_eval_batches: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.num_eval_windows = num_eval_batches * batch_size

    def setup(self, stage: str) -> None:
        texts = read_stdlib()
        self.train = Windows(texts["train"], self.context)
        self.val = Windows(texts["val"], self.context, self.num_eval_windows)
        self.test = Windows(texts["test"], self.context, self.num_eval_windows)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.test, self.batch_size)


class Windows(Dataset[Tensor]):
    """Windows of ``context + 1`` bytes that share no predicted byte.

    Args:
        text: The bytes to cut.
        context: Bytes that a window predicts.
        num_windows: Size of a fixed random sample; ``None``: all of them.
    """

    def __init__(self, text: bytes, context: int, num_windows: int | None = None) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = context + 1
        self.starts = torch.arange(0, len(text) - context, context)
        if num_windows is not None:
            order = torch.randperm(len(self.starts), generator=torch.Generator().manual_seed(0))
            self.starts = self.starts[order[:num_windows]]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.length]


def read_stdlib() -> dict[str, bytes]:
    """Return the library's sources as ``train``, ``val`` and ``test``, without its own tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(name.split("/")):
            # By name, so that a file stays where it is from machine to machine.
            bucket = hashlib.sha256(name.encode()).digest()[0] % 10
            texts["val" if bucket == 0 else "test" if bucket == 1 else "train"].append(path.read_bytes())
    return {split: b"".join(parts) for split, parts in texts.items()}
