"""Whether equal seeds find equal merges: the artifacts of two equal runs, on one rank and on two, by their SHA-256.

python -m benchmarks.determinism                                       this Python
python -m benchmarks.determinism --out benchmarks/determinism.json     adds it to the file; `make determinism`

A run's trials (coordinates, coefficients and values) and the bytes of its tensors count; its identity and its clock do
not. Each run has a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.identity import Noisy, _told, symbols, tree
from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, SearchConfig

NUM_STEPS = 14
RANKS = (1, 2)
SPACES = ("decay", "grouped")


def train(dirpath: Path, space: str, num_ranks: int) -> None:
    """Run one ``fit`` with searches that ask the Gaussian process."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_ckmerge", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    callback = CheckpointMergeCallback(
        dirpath=dirpath,
        save_top_k=-1,
        buffer=BufferConfig(every_n_train_steps=2, capacity=5, update_every_n_steps=1),
        search=SearchConfig(space=space, n_trials=6, max_fraction_of_training=None),  # type: ignore[arg-type]
        on_error="raise",
        check_mode=False,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy: dict[str, Any] = {"strategy": "ddp", "devices": num_ranks} if num_ranks > 1 else {}
    trainer = pl.Trainer(
        max_steps=NUM_STEPS, accelerator="cpu", callbacks=[callback], num_sanity_val_steps=0, **strategy, **quiet
    )
    trainer.fit(Noisy(), symbols(seed=2, size=NUM_STEPS * 8 * num_ranks), symbols(seed=3, size=64 * num_ranks))


def outcome(dirpath: Path) -> dict[str, Any]:
    """Return what a run has found: its trials' digest, and its tensors' SHA-256 by file."""
    manifests = [json.loads(path.read_text()) for path in sorted(dirpath.glob("step=*/manifest.json"))]
    trials = json.dumps([_told(manifest) for manifest in manifests], sort_keys=True)
    artifacts = {name: digest for name, digest in tree(dirpath)["sha256"].items() if name.startswith("step=")}
    return {"searches": len(manifests), "trials": hashlib.sha256(trials.encode()).hexdigest(), "artifacts": artifacts}


def run_apart(space: str, num_ranks: int) -> dict[str, Any]:
    """Return the outcome of a run in processes of its own."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "benchmarks.determinism", "--space", space, "--ranks", str(num_ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--dirpath", root], check=True, env=environment, stdout=subprocess.DEVNULL)
        return outcome(Path(root))


def main() -> None:
    """Run each case twice, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", choices=SPACES)
    parser.add_argument("--ranks", type=int, choices=RANKS)
    parser.add_argument("--dirpath", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.dirpath is not None:
        train(options.dirpath, options.space, options.ranks)
        return
    cases = {}
    for space in SPACES:
        for num_ranks in RANKS:
            first, second = run_apart(space, num_ranks), run_apart(space, num_ranks)
            name = f"{space}, {num_ranks} rank{'s' * (num_ranks > 1)}"
            cases[name] = {"equal": first == second and first["searches"] > 0 and bool(first["artifacts"]), **first}
            print(name, cases[name], flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "lightning", "optuna", "numpy", "scipy")}
    python = ".".join(platform.python_version_tuple()[:2])
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[python] = {"software": versions, "cases": cases}
        options.out.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
    if not all(case["equal"] for case in cases.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
