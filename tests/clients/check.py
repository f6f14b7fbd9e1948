"""What is checked of a client, in the client's own environment: ``python -m tests.clients.check NAME --out FILE``."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_ckmerge import Artifact, ArtifactConfig, BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.plugin.evaluate.halves import confirms

NUM_TRIALS = 4
CONFIRM_FRACTION = 0.5  # the default
# Of a value that other code sums up, in another order and over other batches, in float32.
TOLERANCE = 1e-5
# Of a value that is one draw of a random number, from the mean of others.
NUM_DEVIATIONS = 4
OTHERS = ("lightning", "pytorch-lightning", "torch")


@dataclass(frozen=True, kw_only=True)
class Client:
    """Code of others that trains with Lightning.

    Args:
        packages: Distributions whose versions are told, the client's own first.
        does: What is trained, in a few words.
        predicts: The client's own function that gives the reported value, in a few words.
        train: Runs the client's own ``fit`` in a directory, with the callbacks given, and returns what ``predict``
            needs. It seeds all random numbers.
        predict: Loads an artifact into a new object of the client's, and returns the monitored value that the
            client's own prediction gives on the batches of the confirmation half; several, where it draws at random.
        merge: Arguments of the merge callback.
    """

    packages: Sequence[str]
    does: str
    predicts: str
    train: Callable[[Path, list[Callback]], Any]
    predict: Callable[[Artifact, Any], float | list[float]]
    merge: dict[str, Any]


class Recorder(Callback):
    """Keeps the bits of each loss, and of the weights at each step and validation."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.weights: list[str] = []
        self.metrics: list[dict[str, str]] = []
        self.num_steps = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self  # neuralforecast trains copies of its models, and of their callbacks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.losses.append("" if loss is None else bits(loss))
        self.weights.append(bits(*pl_module.state_dict().values()))
        self.num_steps = trainer.global_step

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics.append({n: bits(v) for n, v in sorted(trainer.callback_metrics.items())})

    on_train_end = on_validation_end


def check(client: Client, root: Path) -> dict[str, Any]:
    """Train without and with the callback, load the artifact, predict; return the figures.

    Raises:
        AssertionError: A promise is broken.
    """
    plain, merged = Recorder(), Recorder()
    merge = CheckpointMergeCallback(**{**options(root / "merges"), **client.merge})
    started = time.monotonic()
    client.train(root / "plain", [plain])
    trained = client.train(root / "merged", [merge, merged])
    seconds = time.monotonic() - started
    assert any(plain.losses), "no loss was seen"
    for what in ("losses", "weights", "metrics"):
        assert getattr(plain, what) == getattr(merged, what), f"{what} differ between the runs without and with us"
    artifacts = [Artifact.open(p) for p in sorted((root / "merges").glob("step=*"))]
    assert artifacts, "no search ended"
    weighty = [a for a in artifacts if a.has_weights]
    assert weighty, f"no search left weights: {[a.manifest['verdict']['sentence'] for a in artifacts]}"
    artifact = weighty[-1]
    verdict = artifact.manifest["verdict"]
    reported, predicted = verdict["value"], client.predict(artifact, trained)
    allowed = TOLERANCE * abs(reported)
    if isinstance(predicted, list):
        allowed, predicted = NUM_DEVIATIONS * statistics.stdev(predicted), statistics.fmean(predicted)
    assert abs(predicted - reported) <= allowed, f"{predicted} is predicted, {reported} was reported"
    return {
        "does": client.does,
        "predicts": client.predicts,
        "versions": {name: version(name) for name in (*client.packages, *OTHERS) if version(name)},
        "python": platform.python_version(),
        "steps": merged.num_steps,
        "searches": len(artifacts),
        "verdict": verdict["status"],
        "monitor": artifact.manifest["monitor"],
        "latest": artifact.manifest["anchors"][0]["confirm"]["value"],
        "reported": reported,
        "predicted": predicted,
        "allowed": allowed,
        "seconds": round(seconds, 1),
    }


def options(dirpath: Path) -> dict[str, Any]:
    """Return arguments that suit a run of seconds: faults are loud, and time is no limit."""
    return {
        "dirpath": dirpath,
        "save_top_k": -1,
        "on_error": "raise",
        "buffer": BufferConfig(every_n_train_steps=4),
        "search": SearchConfig(n_trials=NUM_TRIALS, max_fraction_of_training=None, at_low_lr="search"),
        "artifact": ArtifactConfig(formats=("safetensors", "ckpt")),
    }


def confirmed(batches: Sequence[Any]) -> list[Any]:
    """Return those of a loader's batches that belong to the confirmation half."""
    return [batch for i, batch in enumerate(batches) if confirms(i, CONFIRM_FRACTION)]


def confirmed_samples(num_samples: int, batch_size: int) -> list[int]:
    """Return the places of the samples in those batches, of a loader that does not shuffle."""
    places = range(num_samples)
    return [i for batch in confirmed([places[b : b + batch_size] for b in places[::batch_size]]) for i in batch]


def bits(*tensors: Any) -> str:
    """Return a digest of tensors' bits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def version(name: str) -> str | None:
    """Return an installed distribution's version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Check one client, and write the figures to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.check", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    client: Client = importlib.import_module(f"tests.clients.{arguments.name}").CLIENT
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # some clients write where they run
        figures = check(client, Path(directory))
    arguments.out.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
