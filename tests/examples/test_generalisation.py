"""Merges chosen on one domain and measured on all, on a line that is fitted in a second."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.generalisation import NUM_BATCHES, Case, Domains, run

BATCH_SIZE = 4


class Line(LightningModule):
    """Fits a linear function at a rate so high that its last weights are noisy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def domain(slope: float) -> TensorDataset:
    """Return noisy points of a linear function."""
    x = torch.randn(NUM_BATCHES * BATCH_SIZE, 8)
    return TensorDataset(x, slope * x.sum(1, keepdim=True) + torch.randn(len(x), 1))


def test_a_merge_is_measured_on_every_domain_whatever_it_was_chosen_on(tmp_path: Path) -> None:
    """Goes red if a domain is left out, or if one's gains are measured on another's data."""
    seed_everything(0)
    slopes = {"near": 1.0, "far": -1.0}
    val, test = ({name: domain(slope) for name, slope in slopes.items()} for _ in range(2))
    case = Case(Line(), Domains(domain(1.0), val, test, BATCH_SIZE), tuple(slopes), num_steps=120)
    found = run(case, tmp_path, n_trials=1)
    assert found["chosen_on"].keys() == {"near", "far", "all"}
    # It has learnt the near one, and a mean of its last weights lies nearer still.
    assert found["latest"]["far"] > found["latest"]["near"]
    gain, (low, high) = found["chosen_on"]["near"]["gains"]["near"]
    assert 0 < low < gain < high
    assert found["chosen_on"]["near"]["gains"].keys() == slopes.keys()


def test_all_domains_together_are_in_both_halves_alike() -> None:
    """Goes red if a search over all domains would choose by one of them and be judged by another."""
    domains = {name: TensorDataset(torch.full((48 * BATCH_SIZE, 1), k)) for k, name in enumerate(("a", "b", "c"))}
    batches = list(Domains(domains["a"], domains, domains, BATCH_SIZE).val_dataloader())
    for half in (batches[0:NUM_BATCHES:2], batches[1:NUM_BATCHES:2]):
        counts = torch.bincount(torch.cat([x.flatten() for (x,) in half]))
        assert counts.tolist() == [NUM_BATCHES // 6 * BATCH_SIZE] * 3
