"""Weights chosen on one domain, measured on all of them.

python -m benchmarks.generalisation            both runs, three minutes on two cores; writes docs/generalisation.json
python -m benchmarks.generalisation digits     one of them: ``text`` or ``digits``

``text``: a byte-level GPT trained on Python sources, C++ headers and descriptions of packages in equal parts.
``digits``: the classifier of ``examples/classify_digits.py``, trained on upright digits with little noise; the shifts
are much noise and rotation. In either run one callback searches on each domain, and one on all of them together.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from benchmarks.quality.data import read_headers  # it finds the examples, too
from lightning_ckmerge import Artifact, CheckpointMergeCallback, EvaluationConfig, SearchConfig, load_merged

RESULTS = Path(__file__).parents[1] / "docs" / "generalisation.json"
ALL = "all"
SEED = 1
NUM_BATCHES = 36


@dataclass(frozen=True)
class Case:
    """A run and its domains.

    Args:
        module: What is trained.
        data: Its data; ``val_<domain>`` and ``test_<domain>`` return a domain's loaders.
        domains: Their names.
        num_steps: Optimizer steps.
        recalibrate_batches: Training batches that estimate a candidate's BatchNorm statistics.
    """

    module: LightningModule
    data: LightningDataModule
    domains: tuple[str, ...]
    num_steps: int
    recalibrate_batches: int = 0


class Domains(LightningDataModule):
    """Data of several domains.

    Args:
        train: What is trained on.
        val: Domain -> what is chosen by.
        test: Domain -> what is measured on.
        batch_size: Samples a batch.
        collate: Makes a training batch of samples; ``None``: as usual.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Mapping[str, Dataset[Any]],
        test: Mapping[str, Dataset[Any]],
        batch_size: int,
        collate: Any = None,
    ) -> None:
        super().__init__()
        self.train = train
        self.batch_size = batch_size
        self.collate = collate
        every: ConcatDataset[Any] = ConcatDataset([*val.values()])
        # Batch by batch in turn, so that both halves have as much of each domain.
        blocks = [range(i, i + batch_size) for i in range(0, len(every), batch_size)]
        num = len(blocks) // len(val)
        order = [i for b in range(num) for d in range(len(val)) for i in blocks[d * num + b]]
        val = {**val, ALL: torch.utils.data.Subset(every, order)}
        # A callback asks for its loaders by the name of a method.
        for domain, data in val.items():
            setattr(self, f"val_{domain}", lambda data=data: DataLoader(data, batch_size))
        for domain, data in test.items():
            setattr(self, f"test_{domain}", lambda data=data: DataLoader(data, batch_size))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = getattr(self, f"val_{ALL}")()
        return loader


def text_case() -> Case:
    """Return a small GPT and three kinds of text."""
    from gpt import GPT
    from pretraining import GPTModule, Windows, read_stdlib

    context, batch_size = 64, 16
    texts = {"python": read_stdlib(), "cpp": read_headers(), "english": read_descriptions()}
    num_train = min(len(Windows(text["train"], context)) for text in texts.values())
    parts = {
        split: {domain: Windows(text[split], context, num) for domain, text in texts.items()}
        for split, num in {
            "train": num_train,
            "val": NUM_BATCHES * batch_size,
            "test": NUM_BATCHES * batch_size,
        }.items()
    }
    data = Domains(ConcatDataset([*parts["train"].values()]), parts["val"], parts["test"], batch_size)
    module = GPTModule(GPT(num_layers=2, num_heads=3, width=96, context=context), learning_rate=3e-3)
    return Case(module, data, tuple(texts), num_steps=600)


def read_descriptions() -> dict[str, bytes]:
    """Return the descriptions of the packages that are installed here, mostly English, split by package."""
    texts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    packages = {d.name.lower(): d.metadata for d in importlib.metadata.distributions()}
    for name, metadata in sorted(packages.items()):
        text = metadata.get_payload() or metadata["Description"] or ""
        bucket = hashlib.sha256(name.encode()).digest()[0] % 10
        texts["val" if bucket < 2 else "test" if bucket < 4 else "train"].append(str(text).encode())
    return {split: b"".join(parts) for split, parts in texts.items()}


def digits_case() -> Case:
    """Return a classifier of digits, and digits as they are, under noise and turned."""
    from classify_digits import Classifier
    from digits import digits, shifted

    # A pass has an even number of batches, so that the two halves share no image.
    num_passes, batch_size = 4, 50

    def turned(images: Tensor, generator: torch.Generator) -> Tensor:
        angles = (torch.rand(len(images), generator=generator) * 2 - 1) * math.radians(30)
        turns = torch.stack([angles.cos(), -angles.sin(), 0 * angles, angles.sin(), angles.cos(), 0 * angles], 1)
        grid = F.affine_grid(turns.view(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images + 1, grid, align_corners=False) - 1

    def split(name: str, seed: int) -> dict[str, Dataset[Any]]:
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits(name)
        images, labels = shifted(images.repeat(num_passes, 1, 1, 1), generator), labels.repeat(num_passes)
        noisy = images + 0.7 * torch.randn(images.shape, generator=generator)
        shifts = {"clean": images, "noisy": noisy, "turned": turned(images, generator)}
        return {domain: TensorDataset(x, labels) for domain, x in shifts.items()}

    def collate(samples: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        images, labels = torch.utils.data.default_collate(samples)
        return [shifted(images) + 0.2 * torch.randn(images.shape), labels]

    data = Domains(TensorDataset(*digits("train")), split("val", 1), split("test", 2), batch_size, collate)
    return Case(Classifier(width=16, learning_rate=0.1), data, ("clean", "noisy", "turned"), 600, 10)


def run(case: Case, folder: Path, n_trials: int = 16) -> dict[str, Any]:
    """Train, search on each domain, and return each merge's gain over the latest weights on each domain's test data."""
    from comparison import gain

    callbacks = [
        CheckpointMergeCallback(
            dirpath=folder / domain,
            every_n_train_steps=case.num_steps,
            search=SearchConfig(n_trials=n_trials, max_fraction_of_training=None),
            evaluation=EvaluationConfig(
                dataloader=f"val_{domain}", recalibrate_batches=case.recalibrate_batches, limit_batches=NUM_BATCHES
            ),
            on_error="raise",
        )
        for domain in (*case.domains, ALL)
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=case.num_steps,
        limit_val_batches=2,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(case.module, datamodule=case.data)
    module = case.module.eval()
    latest = measure(case, module)
    rows: dict[str, Any] = {}
    for domain in (*case.domains, ALL):
        artifact = Artifact.open(next((folder / domain).glob("step=*")))
        row: dict[str, Any] = {"status": artifact.manifest["verdict"]["status"]}
        if artifact.has_weights:
            load_merged(artifact, module)
            own = measure(case, module)
            row["gains"] = {d: gain(own[d], latest[d]) for d in case.domains}
        rows[domain] = row
    return {
        "steps": case.num_steps,
        "domains": case.domains,
        "latest": {d: sum(v) / len(v) for d, v in latest.items()},
        "chosen_on": rows,
    }


@torch.no_grad()
def measure(case: Case, module: Any) -> dict[str, list[float]]:
    """Return the loss on each test batch of each domain."""
    return {d: [float(module.loss(batch)) for batch in getattr(case.data, f"test_{d}")()] for d in case.domains}


CASES = {"text": text_case, "digits": digits_case}


def main(names: Sequence[str]) -> None:
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in names or CASES:
        seed_everything(SEED)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(CASES[name](), Path(folder))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results[name], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
