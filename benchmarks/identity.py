"""Prints what nine small runs and one offline merge publish, to compare two versions of the package bit by bit.

python -m benchmarks.identity > before.json    then the change, then the same again: the two files must be equal
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_ckmerge import ArtifactConfig, BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig

NUM_STEPS = 14
# Of a buffer's files, anew for each run.
RUN_ID = re.compile(r"\b[0-9a-f]{8}-")
POINTS: dict[str, Any] = {"snapshot": "point", "layout": "uniform"}
# Of the manifest: all that does not tell the time, the machine or the software.
KEYS = ("step", "space", "coordinates", "coefficients", "snapshots", "front", "verdict")


class Noisy(pl.LightningModule):
    """Learns the next of 16 symbols, at a rate too high to settle."""

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net: nn.Module = nn.Sequential(
            nn.Embedding(16, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 16)
        )
        if adapters:
            import peft

            self.net = peft.get_peft_model(self.net, peft.LoraConfig(r=2, target_modules=["1", "5"]))

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.net(x), (x * 3 + 1) % 16, label_smoothing=0.3)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.loss(x)

    def validation_step(self, x: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(x)
        self.log("val_loss", loss)
        self.log("val_gain", (loss - 1).square())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def main() -> None:
    """Print one line of JSON a configuration."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_ckmerge", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for name, options in CASES.items():
            print(json.dumps({"case": name, **search(Path(root, name), **options)}))
        print(json.dumps({"case": "offline", **merge_offline(Path(root, "offline"))}))


CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "decay, two monitors": {"space": "decay", "monitor": ["val_loss", "val_gain"]},
    "pairwise, points": {"space": "pairwise", "buffer": POINTS},
    "window, in memory": {"space": "window", "buffer": {"storage": "cpu"}},
    "simplex, bfloat16": {"space": "simplex", "buffer": {"dtype": "bfloat16", **POINTS}},
    "affine, recalibrated": {"space": "affine", "recalibrate_batches": 2},
    "auto, sharded": {"space": "auto", "artifact": {"max_shard_size": "1KB", "formats": ("safetensors", "ckpt")}},
    "refined": {"refine": "gradient"},
    "adapters": {"adapters": True, "artifact": {"adapters": "products"}},
}


def search(
    root: Path,
    *,
    space: str = "grouped",
    monitor: Any = "val_loss",
    buffer: dict[str, Any] | None = None,
    artifact: dict[str, Any] | None = None,
    refine: Any = None,
    recalibrate_batches: int = 0,
    adapters: bool = False,
) -> dict[str, Any]:
    """Return what a short run leaves on disk."""
    pl.seed_everything(1, verbose=False)
    fixed: dict[str, Any] = {"n_trials": 2, "max_fraction_of_training": None}
    callback = CheckpointMergeCallback(
        monitor=monitor,
        dirpath=root,
        save_top_k=-1,
        buffer=BufferConfig(every_n_train_steps=2, capacity=5, update_every_n_steps=1, **buffer or {}),
        search=SearchConfig(space=space, refine=refine, **fixed),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(recalibrate_batches=recalibrate_batches),
        artifact=ArtifactConfig(**artifact or {}),
        on_error="raise",
        check_mode=False,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=NUM_STEPS, accelerator="cpu", callbacks=[callback], num_sanity_val_steps=0, **quiet)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.fit(Noisy(adapters), symbols(seed=2, size=NUM_STEPS * 8), symbols(seed=3, size=64))
    manifests = [json.loads(path.read_text()) for path in sorted(root.glob("step=*/manifest.json"))]
    return {**tree(root), "manifests": [_told(manifest) for manifest in manifests]}


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    scored = [*manifest["anchors"], *manifest["trials"]]
    values = [
        [s["name"], s["coefficients"], *((s[half] or {}).get("metrics") for half in ("search", "confirm"))]
        for s in scored
    ]
    return {**{key: manifest[key] for key in KEYS if key in manifest}, "values": values}


def merge_offline(root: Path) -> dict[str, Any]:
    """Return what merges of three Lightning checkpoints leave on disk."""
    from lightning_ckmerge.cli.main import app

    root.mkdir()
    checkpoints = []
    for step in (10, 20, 30):
        torch.manual_seed(step)
        state = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in Noisy().state_dict().items()}
        checkpoints.append(str(root / f"step={step}.ckpt"))
        torch.save(
            {"pytorch-lightning_version": "2.5.0", "global_step": step, "state_dict": state, "hyper_parameters": {}},
            checkpoints[-1],
        )
    for schedule, out in (("minus-sqrt", "merged"), ("slerp:0.5", "slerp.safetensors"), ("ema:2", "merged.ckpt")):
        inputs = checkpoints[:2] if schedule.startswith("slerp") else checkpoints
        with contextlib.redirect_stdout(io.StringIO()):
            app(["merge", *inputs, "--schedule", schedule, "--out", str(root / out)], standalone_mode=False)
    return tree(root)


def symbols(seed: int, size: int) -> DataLoader[Any]:
    """Return a loader of batches of 8 symbols, the same ones at each call."""
    drawn = torch.randint(0, 16, (size,), generator=torch.Generator().manual_seed(seed))
    return DataLoader(list(drawn), batch_size=8)  # type: ignore[arg-type]


def tree(root: Path) -> dict[str, Any]:
    """Return the names of all files below ``root``, and a SHA-256 of what each file of tensors holds."""
    names = {path: RUN_ID.sub("RUN-", path.relative_to(root).as_posix()) for path in sorted(root.rglob("*"))}
    tensors = [path for path in names if path.suffix in (".safetensors", ".ckpt")]
    return {
        "files": sorted(names.values()),
        "sha256": {names[path]: hashlib.sha256(_content(path)).hexdigest() for path in tensors},
    }


def _content(path: Path) -> bytes:
    """Return the tensors' bytes alone: headers may name the run, which has a new identity each time."""
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)["state_dict"]
        return b"".join(name.encode() + t.numpy().tobytes() for name, t in sorted(state.items()))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return json.dumps(header).encode() + content[8 + length :]


if __name__ == "__main__":
    main()
