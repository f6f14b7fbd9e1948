"""What an ensemble of merges gains over the single merge, and what it costs: the tables of docs/ensembles.md.

python -m benchmarks.ensembles digits      a CNN with BatchNorm on scikit-learn's digits, with noise, at a constant rate
python -m benchmarks.ensembles cyclic      the same, at a rate that falls and begins anew five times
python -m benchmarks.ensembles gpt         a small GPT on Python's own sources, at a constant rate

Each prints a table of its seeds: the median over them, and how many verdicts there were of each kind.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_ckmerge import EvaluationConfig, MergedEnsemble, SearchConfig, build_ensemble

ROOT = Path(__file__).parents[1]
NUM_CYCLES = 5
NAMES = {
    "latest": "latest weights",
    "merge": "single merge",
    "snapshots": "ensemble of checkpoints",
    "ensemble": "ensemble, of both",
}
COLUMNS = {"loss": 4, "accuracy": 4, "calibration_error": 4, "brier": 4}


class DigitsCNN(pl.LightningModule):
    """A small CNN with BatchNorm; its rate is too high to settle, or falls and begins anew."""

    def __init__(self, num_steps: int, cyclic: bool) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.cyclic = cyclic
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        if not self.cyclic:
            return optimizer
        # As for snapshot ensembles: Huang et al. 2017, arXiv:1704.00109.
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, self.num_steps // NUM_CYCLES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits(seed: int, out: Path | None = None, cyclic: bool = False) -> MergedEnsemble:
    """Train on 1000 noisy digits, and build an ensemble on the other 797."""
    from sklearn.datasets import load_digits

    found = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(found.target), generator=generator)
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    images += 0.3 * torch.randn(images.shape, generator=generator)
    data = TensorDataset(images, torch.tensor(found.target)[order])
    train = torch.utils.data.Subset(data, range(1000))
    val = DataLoader(torch.utils.data.Subset(data, range(1000, len(data))), batch_size=16)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    num_steps, every = 300, 60 if cyclic else 25
    pl.seed_everything(seed, verbose=False)
    return _trained(
        DigitsCNN(num_steps, cyclic),
        loader,
        val,
        num_steps,
        every,
        search=SearchConfig(space="simplex" if cyclic else "decay", n_trials=12),
        evaluation=EvaluationConfig(recalibrate_batches=8),
        out=out,
    )


def cyclic(seed: int, out: Path | None = None) -> MergedEnsemble:
    """As ``digits``, with a checkpoint at the end of each cycle."""
    return digits(seed, out, cyclic=True)


def gpt(seed: int, out: Path | None = None) -> MergedEnsemble:
    """Train a byte-level GPT of 0.1 million parameters."""
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT
    from pretraining import GPTModule, StdlibData

    data = StdlibData(batch_size=16, context=64, num_eval_batches=48)
    data.setup("fit")
    pl.seed_everything(seed, verbose=False)
    module = GPTModule(GPT(num_layers=2, num_heads=4, width=64, context=64), learning_rate=3e-3)

    def predict(module: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows.long()
        return module.gpt(windows[:, :-1]), windows[:, 1:]

    return _trained(
        module,
        data.train_dataloader(),
        data.val_dataloader(),
        600,
        30,
        last=10,
        predict=predict,
        search=SearchConfig(space="decay", n_trials=12),
        out=out,
    )


def _trained(
    module: pl.LightningModule, train: Any, val: Any, num_steps: int, every: int, **arguments: Any
) -> MergedEnsemble:
    with tempfile.TemporaryDirectory() as directory:
        keep = ModelCheckpoint(directory, every_n_train_steps=every, save_top_k=-1, save_weights_only=True)
        trainer = pl.Trainer(
            max_steps=num_steps,
            accelerator="cpu",
            logger=False,
            callbacks=[keep],
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train)
        return build_ensemble(
            module,
            val,
            directory,
            train_dataloaders=train,
            trainer={"accelerator": "cpu"},
            min_gain=0.0,  # to see what the least of gains come to
            **arguments,
        )


def report(manifests: list[dict[str, Any]]) -> str:
    """Return the table: medians over the seeds, and the verdicts."""
    lines = [
        "| | forward passes | loss | accuracy | calibration error | Brier score |",
        "|---|---|---|---|---|---|",
    ]
    for place, name in enumerate(NAMES.values()):
        rows = [m["comparison"][place] for m in manifests]
        passes = sorted({row["forward_passes"] for row in rows})
        told = f"{passes[0]}" if len(passes) == 1 else f"{passes[0]} to {passes[-1]}"
        values = " | ".join(f"{statistics.median(r[c] for r in rows):.{n}f}" for c, n in COLUMNS.items())
        lines.append(f"| {name} | {told} | {values} |")
    verdicts = Counter(m["verdict"]["status"] for m in manifests)
    gains = [m["comparison"][3]["gain_over_merge"]["loss"] for m in manifests]
    lines += ["", f"Verdicts: {', '.join(f'{n} {status}' for status, n in verdicts.most_common())}."]
    for gain, manifest in zip(gains, manifests, strict=True):
        members = ", ".join(f"{m['name']} {m['weight']:.2f}" for m in manifest["members"])
        lines.append(f"- {gain['gain']:+.4f} {gain['interval']}: {members}. {manifest['verdict']['sentence']}")
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks: dict[str, Callable[[int, Path | None], MergedEnsemble]] = {"digits": digits, "cyclic": cyclic, "gpt": gpt}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="Where the manifests go.")
    parser.add_argument("--out", type=Path, help="Where the ensembles go, a directory for each seed.")
    arguments = parser.parse_args()
    outs = [arguments.out and arguments.out / f"seed={seed}" for seed in arguments.seeds]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    task = tasks[arguments.task]
    manifests = [task(seed, out).manifest for seed, out in zip(arguments.seeds, outs, strict=True)]
    if arguments.json:
        arguments.json.write_text(json.dumps(manifests, indent=1) + "\n", encoding="utf-8")
    print(report(manifests))


if __name__ == "__main__":
    main()
