"""Small runs on several ranks, for a pool's processes or for a script of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ckmerge import ArtifactConfig, BufferConfig, CheckpointMergeCallback, EvaluationConfig
from tests.support.trainers import make_merge, train

NUM_TRAIN = 96
BATCH = 4


def points(num_samples: int) -> Dataset[Any]:
    """Labels of mostly noise, so that training wanders and a merge is always better than the latest weights."""
    generator = torch.Generator().manual_seed(num_samples)
    x = torch.randn(num_samples, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) + 9 * torch.randn(num_samples, generator=generator)).gt(0).long())


class Classifier(pl.LightningModule):
    """The training loss depends on what validation left behind. Where ranks hold the model whole: BatchNorm, dropout.

    Sharded, it takes the strategy's mesh: FSDP2 with a root group, tensor parallelism, or both.
    """

    def __init__(self, width: int = 33, norm: bool = True, lr: float = 0.3) -> None:
        super().__init__()
        self.lr, self.scale, self.is_sharded = lr, 1.0, False
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1 if norm else 0.0), nn.Linear(width, 2))
        self.norm: nn.Module = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.trail: list[Tensor] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or self.is_sharded:
            return
        self.is_sharded = True
        if mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.norm(batch[0])), batch[1])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.scale * self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        self.scale = 1 + 0.01 * float(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        tensors = [p.to_local() if isinstance(p, DTensor) else p for p in (*self.parameters(), *self.buffers())]
        self.trail.append(torch.cat([t.detach().reshape(-1).double() for t in tensors]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class TiedGPT(Classifier):
    """A GPT-2 whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"vocab_size": 19, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
        self.net = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))

    def loss(self, batch: Any) -> Tensor:
        ids = (batch[0] * 4).long().clamp(-9, 9) + 9
        loss: Tensor = self.net(input_ids=ids, labels=ids).loss
        return loss


@dataclass
class Run:
    """What is left of a run on one rank."""

    module: Any
    trainer: pl.Trainer
    callback: CheckpointMergeCallback | None


def make_strategy(name: str) -> Any:
    if name == "ddp_static":
        return DDPStrategy(static_graph=True)
    if name == "fsdp":
        return FSDPStrategy(use_orig_params=True)
    sizes = {"fsdp2": (2, 1), "tp": (1, 2), "fsdp2 x tp": (2, 2)}
    return ModelParallelStrategy(*sizes[name]) if name in sizes else name


def make_rank_merge(root: str, **overrides: Any) -> CheckpointMergeCallback:
    """Return a callback that searches twice and fails loudly."""
    options: dict[str, Any] = {
        "dirpath": f"{root}/merges",
        "every_n_train_steps": 6,
        "search_on_train_end": True,
        "buffer": BufferConfig(every_n_train_steps=2, update_every_n_steps=1),
        # No batch is left to confirm with, so that no search is rejected and each publishes weights.
        "evaluation": EvaluationConfig(confirm_fraction=0.01),
        "artifact": ArtifactConfig(max_shard_size="600B"),
    }
    return make_merge(**{**options, **overrides})


def fit(
    strategy: str,
    root: str,
    callback: CheckpointMergeCallback | None,
    *,
    model: Callable[[], pl.LightningModule] = Classifier,
    others: Any = (),
    devices: int = 2,
    val: Any = None,
    ckpt_path: str | None = None,
    expected: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Train on one rank of several: for twelve steps, if there are two."""
    defaults: Mapping[str, Any] = {"max_epochs": 1, "val_check_interval": 0.5}
    trainer = train(
        model,
        DataLoader(points(NUM_TRAIN), batch_size=BATCH, shuffle=True),
        val or DataLoader(points(83), batch_size=2 * BATCH),
        root=root,
        callbacks=[*([callback] if callback else []), *others],
        ckpt_path=ckpt_path,
        expected=expected,
        devices=devices,
        strategy=make_strategy(strategy),
        **{**defaults, **options},
    )
    return Run(trainer.lightning_module, trainer, callback)


_PLAIN_RUNS: dict[Any, Run] = {}


def fit_plain(strategy: str, root: str, *, model: Callable[[], pl.LightningModule] = Classifier, **options: Any) -> Run:
    """Return the run without the merge callback; under DDP, once for all tests of these processes that compare with it.

    All ranks have to call this alike, as they have to call ``fit``.
    """
    key = (strategy, model, tuple((name, repr(value)) for name, value in sorted(options.items())))
    if not strategy.startswith("ddp"):
        return fit(strategy, root, None, model=model, **options)
    if key not in _PLAIN_RUNS:
        _PLAIN_RUNS[key] = fit(strategy, root, None, model=model, **options)
    return _PLAIN_RUNS[key]


def same_trail(run: Run, baseline: Run) -> bool:
    """Whether weights and buffers were equal bit for bit after each batch."""
    trails = run.module.trail, baseline.module.trail
    return bool(trails[0]) and all(torch.equal(a, b) for a, b in zip(*trails, strict=True))


def published(root: str | Path) -> list[str]:
    return sorted(p.name for p in (Path(root) / "merges").glob("step=*"))
