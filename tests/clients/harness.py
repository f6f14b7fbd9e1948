"""Trains a client twice, with and without the callback, loads its merge back, and compares what the two runs say.

A script beside this file describes one client and calls ``main``. It runs in the client's own environment, where pytest
need not be.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.manifest import read_manifest

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Client:
    """One client, as its users train it.

    Args:
        name: As in the table.
        packages: Distributions whose versions are told.
        train: Trains from a fixed seed with the callbacks that it is given, in a directory, and returns the client's
            own object.
        value: Loads the artifact in a directory into an object of the client, and returns the metric over the whole
            validation set, by the client's own prediction function.
        callback: The class that the client's Trainer takes callbacks of.
        monitor: The logged metric.
    """

    name: str
    packages: Sequence[str]
    train: Callable[[list[Any], Path], Any]
    value: Callable[[Any, Path], float]
    callback: type
    monitor: str = "val_loss"
    every_n_train_steps: int = 10


def main(client: Client) -> None:
    """Check the client, and write the result as JSON to the file that the command line names.

    Raises:
        AssertionError: The runs differ, no search ended, or the client's own value is not the reported one.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = check(client, Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def check(client: Client, root: Path) -> dict[str, Any]:
    """Return the client's row of the table."""
    plain, merged = _recorder(client.callback), _recorder(client.callback)
    client.train([plain], root / "plain")
    merges = root / "merges"
    merge = CheckpointMergeCallback(
        monitor=client.monitor,
        dirpath=merges,
        every_n_train_steps=client.every_n_train_steps,
        buffer=BufferConfig(every_n_train_steps=2),
        search=SearchConfig(n_trials=4, max_fraction_of_training=None, min_gain_left=0, at_low_lr="search"),
        evaluation=EvaluationConfig(staged=False),
        save_top_k=-1,
        on_error="raise",
    )
    trained = client.train([merge, merged], root / "merged")
    assert plain.losses, "nothing was trained"
    assert plain.losses == merged.losses, "the callback changed a loss"
    assert plain.weights.keys() == merged.weights.keys()
    assert all(torch.equal(plain.weights[n], merged.weights[n]) for n in plain.weights), "the callback changed weights"

    manifests = {path: read_manifest(path) for path in sorted(merges.glob("step=*"))}
    assert manifests, "no search ended"
    path, manifest = [(p, m) for p, m in manifests.items() if m["files"]][-1]
    winner = _winner(manifest)
    reported = _over_all(winner)
    own = client.value(trained, path)
    assert math.isclose(own, reported, rel_tol=TOLERANCE), f"{client.name} says {own}, the manifest {reported}"
    return {
        "client": client.name,
        "versions": {name: version(name) for name in [*client.packages, "torch"]},
        "python": platform.python_version(),
        "steps": len(plain.losses),
        "losses_bit_equal": True,
        "searches": [m["verdict"]["status"] for m in manifests.values()],
        "monitor": client.monitor,
        "reported": reported,
        "own": own,
    }


def _recorder(callback: type) -> Any:
    """Return a callback of the client's own package that keeps each step's loss and the last weights."""

    class Recorder(callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.losses: list[bytes] = []
            self.weights: dict[str, torch.Tensor] = {}

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self.losses.append(loss.detach().cpu().numpy().tobytes())

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.weights = {n: p.detach().clone() for n, p in module.state_dict().items() if torch.is_tensor(p)}

    return Recorder()


def _winner(manifest: dict[str, Any]) -> dict[str, Any]:
    scored = [*manifest["anchors"], *manifest["trials"]]
    return next(s for s in scored if s["name"] == manifest["verdict"]["winner"])


def _over_all(winner: dict[str, Any]) -> float:
    """Return the metric over all batches, which are of one size: that of both halves together."""
    halves = [winner["search"], winner["confirm"]]
    assert all(half["complete"] for half in halves)
    total: float = sum(half["value"] * half["num_batches"] for half in halves)
    return total / sum(half["num_batches"] for half in halves)
