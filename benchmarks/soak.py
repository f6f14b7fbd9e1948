"""Thousands of searches in one process: whether memory, files, threads, the journal or the time of a search grow.

python -m benchmarks.soak --out benchmarks/soak.json    2,000 searches over 4 runs; `make soak`
python -m benchmarks.soak --searches 100 --fits 2       a short look
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, SearchConfig

STEPS_PER_SEARCH = 2
# The first searches import libraries and fill caches.
WARM_UP_SHARE = 0.1
# A collection takes as long as a search.
COLLECT_EVERY = 20
MIB = 1 << 20


class Tiny(pl.LightningModule):
    """Learns the next of 16 symbols."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 16))

    def loss(self, x: Tensor) -> Tensor:
        """Return the cross-entropy of a batch."""
        return cross_entropy(self.net(x), (x * 3 + 1) % 16, label_smoothing=0.3)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.loss(x)

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.loss(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that does not settle."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Watch(pl.Callback):
    """Notes the state of the process after each step in which there was a search.

    Args:
        dirpath: The run's directory.
        samples: Takes a row a search.
        rows: A file that takes them too, so that a soak that is cut off is not lost.
    """

    def __init__(self, dirpath: Path, samples: list[dict[str, float]], rows: Path | None) -> None:
        self._dirpath = dirpath
        self._samples = samples
        self._rows = rows
        self._started_s = self._started_cpu_s = 0.0
        self._journal = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clock before the step that ends in a search."""
        self._started_s, self._started_cpu_s = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock; the callback's own hook has run, as it stands first."""
        seconds = time.perf_counter() - self._started_s
        spent = time.process_time() - self._started_cpu_s
        if trainer.global_step % STEPS_PER_SEARCH:
            return
        if len(self._samples) % COLLECT_EVERY == 0:
            gc.collect()
        journal = sum(path.stat().st_size for path in self._dirpath.glob("*.journal*"))
        row = {**process_state(), "seconds": seconds, "cpu_seconds": spent, "journal_bytes": journal - self._journal}
        self._samples.append(row)
        self._journal = journal
        if self._rows is not None:
            with self._rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def process_state() -> dict[str, float]:
    """Return this process's memory, open files and threads, as the system counts them."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return {
        "resident_mib": resident * 1024 / MIB,
        "open_files": len(os.listdir("/proc/self/fd")),
        "system_threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def soak(root: Path, num_searches: int, num_fits: int, rows: Path | None = None) -> list[dict[str, float]]:
    """Return a row for each search, in the order of the searches."""
    samples: list[dict[str, float]] = []
    per_fit = num_searches // num_fits
    for fit in range(num_fits):
        dirpath = root / f"fit={fit}"
        pl.seed_everything(1, verbose=False)
        callback = CheckpointMergeCallback(
            dirpath=dirpath,
            every_n_train_steps=STEPS_PER_SEARCH,
            search_on_train_end=False,
            save_top_k=2,
            buffer=BufferConfig(every_n_train_steps=1, capacity=4),
            # Enough for the Gaussian process to be asked once a search.
            search=SearchConfig(n_trials=3, anchors=["uniform"], max_fraction_of_training=None),
            on_error="raise",
            check_mode=False,
        )
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(
            max_steps=per_fit * STEPS_PER_SEARCH,
            accelerator="cpu",
            callbacks=[callback, Watch(dirpath, samples, rows)],
            num_sanity_val_steps=0,
            limit_val_batches=4,
            val_check_interval=None,
            check_val_every_n_epoch=10**9,
            **quiet,
        )
        loader = DataLoader(torch.randint(16, (64,)), batch_size=8)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(Tiny(), loader, DataLoader(torch.randint(16, (64,)), batch_size=8))
    return samples


def slope(values: Sequence[float]) -> dict[str, float]:
    """Return the straight line through a series: its change per thousand searches, twice its standard error, its mean.

    Neighbouring searches are alike, so the error is that of the means of 20 consecutive stretches.
    """
    stretches = np.array([part.mean() for part in np.array_split(np.asarray(values, float), min(20, len(values)))])
    places = np.linspace(0, len(values) / 1000, len(stretches))
    (change, _), covariance = np.polyfit(places, stretches, 1, cov=True)
    return {
        "per_thousand": float(change),
        "two_standard_errors": float(2 * np.sqrt(covariance[0, 0])),
        "mean": float(np.mean(values)),
    }


def summary(samples: Sequence[dict[str, float]], num_fits: int) -> dict[str, Any]:
    """Return the slopes over all searches, and those of the time and the journal within a run."""
    warm = samples[int(WARM_UP_SHARE * len(samples)) :]
    slopes = {key: slope([s[key] for s in warm]) for key in samples[0]}
    per_fit = len(samples) // num_fits
    within = {}
    for key in ("seconds", "cpu_seconds", "journal_bytes", "resident_mib"):
        # The same search of each run, averaged over all runs but the first.
        runs = [samples[i * per_fit : (i + 1) * per_fit] for i in range(num_fits)][1 if num_fits > 1 else 0 :]
        series = np.mean([[s[key] for s in run] for run in runs], axis=0)[max(1, per_fit // 10) :]
        within[key] = slope(series.tolist())
    last, first = samples[-1], warm[0]
    return {
        "searches": len(samples),
        "fits": num_fits,
        "slopes": slopes,
        "within_a_run": within,
        "first": first,
        "last": last,
        "threads_left": sorted(t.name for t in threading.enumerate() if t is not threading.main_thread()),
    }


def main() -> None:
    """Run, print the summary, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--fits", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path, help="takes one JSON line a search")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_ckmerge", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        samples = soak(Path(root), options.searches, options.fits, options.rows)
    found = {
        **summary(samples, options.fits),
        "total_seconds": time.perf_counter() - started_s,
        "machine": f"{os.cpu_count()} shared {platform.machine()} cores",
        "software": {n: metadata.version(n) for n in ("torch", "lightning", "optuna")},
        "python": platform.python_version(),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
