"""A quadratic loss, of which everything that an account tells can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_BATCHES, BATCH = 24, 4
# Of the Hessian, which is diagonal: by tensor.
SCALES = {"embed.weight": 1.0, "blocks.0.mlp.weight": 4.0, "blocks.1.attn.weight": 0.25}
STEPS = (10, 20, 30, 40)


class Bowl(pl.LightningModule):
    """``0.5 * sum_i h_i (w_i - x_i)^2``, averaged over samples ``x``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 1, bias=False)
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(2, 1, bias=False)}), nn.ModuleDict()])
        self.blocks[1]["attn"] = nn.Linear(2, 1, bias=False)  # type: ignore[index]

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in parameters(self).values()])
        loss = 0.5 * (scales() * (flat - batch[0]).square()).sum(1).mean()
        self.log("val_loss", loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: dict(module.named_parameters())[name] for name in SCALES}


def scales() -> Tensor:
    return torch.tensor([h for h in SCALES.values() for _ in range(2)])


def samples() -> Tensor:
    return 0.3 * torch.randn(NUM_BATCHES * BATCH, 6, generator=torch.Generator().manual_seed(3))


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(samples()), batch_size=BATCH)


def loss(weights: Mapping[str, Tensor], half: str = "confirm") -> float:
    """Of all batches with odd numbers, as the confirmation half has them, in closed form."""
    batches = samples().view(NUM_BATCHES, BATCH, 6)[1 if half == "confirm" else 0 :: 2]
    flat = torch.cat([weights[name].double().reshape(-1) for name in SCALES])
    return float(0.5 * (scales() * (flat - batches.reshape(-1, 6)).square()).sum(1).mean())


def write_checkpoints(directory: Path) -> Path:
    """Write weights that near the optimum, which is near 0, and end up circling it, as Lightning writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for k, step in enumerate(STEPS):
        state = {name: 4 * 0.2**k + torch.randn(1, 2, generator=generator) for name in SCALES}
        checkpoint = {"state_dict": state, "global_step": step, "epoch": 0, "pytorch-lightning_version": "2.5.0"}
        torch.save(checkpoint, directory / f"step={step}.ckpt")
    return directory
