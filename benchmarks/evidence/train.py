"""Train a run with its decayed twin, and keep what merges are made of.

A run's folder holds the means over each hundredth of it, its newest points, those of the twin from where it leaves, and
the optimizer's second moments at its end, as NumPy arrays that are read from the disk as needed.

Letters: P parameters of the model, as one vector; M segments.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.evidence.protocol import Run
from benchmarks.evidence.regimes import BRANCH_SHARE, InBfloat16, random_bytes
from benchmarks.quality.case import Case

NUM_SEGMENTS = 100
# Points are kept back to the twin's beginning, and further where they take little space.
MIN_POINTS, MAX_POINT_VALUES = 21, 50_000_000


class Training:
    """A model, its optimizers and its batches; copied, both copies go on alike."""

    def __init__(self, run: Run) -> None:
        torch.manual_seed(run.seed)
        self.how, self.num_steps, self.step = run.how, run.num_steps, 0
        self.task = run.task()
        self.model: nn.Module = self.task.model().train()
        self.generator = torch.Generator().manual_seed(run.seed)
        self.rounded = InBfloat16(self.model, self._make) if self.how.in_bfloat16 else None
        self.optimizers = self.rounded.optimizers if self.rounded else self._make(self.model)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    def _make(self, model: nn.Module) -> Any:
        return self.how.optimizers(model, self.task.rate)

    def advance(self, decay_from: int | None = None) -> float:
        """Take one optimizer step, and return its loss; from ``decay_from`` on the rate falls linearly to 0."""
        batch = self.task.draw(self.generator)
        if self.how.is_spike(self.step, self.num_steps):
            batch = random_bytes(batch, self.generator)
        loss = self.task.loss(self.model, batch)
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.how.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.how.max_norm)
        factor = self.how.rate(self.step, self.num_steps, decay_from)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        for steps in [self.rounded] if self.rounded else self.optimizers:
            steps.step()
        self.step += 1
        return float(loss.detach())

    def weights(self) -> Tensor:
        """Return a copy of the weights, ``(P,)``."""
        with torch.no_grad():
            return parameters_to_vector(self.model.parameters()).clone()

    def fill(self, trail: Trail, num_segments: int, decay_from: int | None = None) -> None:
        """Advance by so many segments, and keep them."""
        segment_steps = self.num_steps // NUM_SEGMENTS
        for _ in range(num_segments):
            mean_P, loss = torch.zeros_like(self.weights()), 0.0
            for i in range(segment_steps):
                loss += self.advance(decay_from) / segment_steps
                mean_P.lerp_(self.weights(), 1 / (i + 1))
            trail.add(mean_P, self.weights(), loss)

    def second_moments(self) -> Tensor | None:
        """Return Adam's, ``(P,)``, in the order of the weights; ``None`` of other optimizers."""
        state = {p: s for optimizer in self.optimizers for p, s in optimizer.state.items()}
        found = [state.get(p, {}).get("exp_avg_sq") for p in self.model.parameters()]
        return torch.cat([v.float().flatten() for v in found]) if all(v is not None for v in found) else None


class Trail:
    """The means of segments and the newest points, written as they come.

    Args:
        folder: Where the files lie.
        name: Their beginning.
        num_segments: How many there will be.
        num_parameters: P.
    """

    def __init__(self, folder: Path, name: str, num_segments: int, num_parameters: int) -> None:
        self._num_points = min(num_segments, max(MIN_POINTS, MAX_POINT_VALUES // num_parameters))
        self._means_MP, self._points_MP = (
            np.lib.format.open_memmap(folder / f"{name}-{kind}.npy", "w+", np.float32, (length, num_parameters))
            for kind, length in (("means", num_segments), ("points", self._num_points))
        )
        self.losses: list[float] = []

    def add(self, mean_P: Tensor, point_P: Tensor, loss: float) -> None:
        """Keep the next segment."""
        m = len(self.losses)
        self._means_MP[m] = mean_P.numpy()
        if (place := m - len(self._means_MP) + self._num_points) >= 0:
            self._points_MP[place] = point_P.numpy()
        self.losses.append(round(loss, 4))


def train(run: Run) -> None:
    """Train a run and its twin, unless they are there."""
    if run.is_trained:
        return
    start = time.monotonic()
    # Two processes may train the same run: the first to end counts.
    folder = run.directory.with_name(f"{run.directory.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    training = Training(run)
    num_parameters = len(training.weights())
    trail = Trail(folder, "trail", NUM_SEGMENTS, num_parameters)
    num_last = round(BRANCH_SHARE * NUM_SEGMENTS)
    training.fill(trail, NUM_SEGMENTS - num_last)
    if run.how.has_twin:
        twin = copy.deepcopy(training)
        twin.fill(Trail(folder, "branch", num_last, num_parameters), num_last, decay_from=twin.step)
        del twin
    training.fill(trail, num_last)
    moments_P = training.second_moments()
    if moments_P is not None:
        np.save(folder / "second-moments.npy", moments_P.numpy())
    about = {
        "model": run.model,
        "regime": run.regime,
        "seed": run.seed,
        "num_steps": run.num_steps,
        "segment_steps": run.num_steps // NUM_SEGMENTS,
        "num_parameters": num_parameters,
        "seconds": round(time.monotonic() - start, 1),
        "train_losses": trail.losses,
    }
    (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    # A run that is there is whole.
    if run.is_trained:
        shutil.rmtree(folder)
    else:
        folder.rename(run.directory)


class Trained(Case):
    """A trained run as the methods see it.

    Args:
        run: Which one; of cell ``wsd`` it is the twin that is merged, at its end.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.directory, run.task())
        self.run = run
        if run.cell == "wsd":
            self.become_twin()

    def become_twin(self) -> None:
        """Take the decayed twin's trail for the run's own."""
        before_MP = self._trail["means_MP"][: -len(self._branch["means_MP"])]
        means_MP = torch.cat([before_MP, self._branch["means_MP"]])
        self._trail, self._branch = {**self._branch, "means_MP": means_MP}, {}
        self.latest_P = self.points_MP[-1]

    @staticmethod
    def _read(directory: Path) -> list[dict[str, Tensor]]:
        # Copied on write: what is not read stays on the disk.
        return [
            {
                f"{kind}_MP": torch.from_numpy(np.load(path, mmap_mode="c"))
                for kind in ("means", "points")
                if (path := directory / f"{name}-{kind}.npy").exists()
            }
            for name in ("trail", "branch", "further")
        ]
