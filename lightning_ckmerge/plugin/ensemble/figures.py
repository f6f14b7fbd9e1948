"""What a model or an ensemble comes to on the confirmation half: loss, accuracy, calibration, cost.

Letters: N samples in a batch; B batches; C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.averaging import is_classes, losses
from lightning_ckmerge.search.interval import score_gain

NUM_BINS = 15
# Whether lower (1) or higher (-1) values are better. The calibration error is no mean over batches.
SIGNS = {"loss": 1, "accuracy": -1, "brier": 1}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One contender on the confirmation half.

    Args:
        name: ``latest``, ``merge``, ``snapshots`` or ``ensemble``.
        members: Names of the models that predict.
        forward_passes: Of the model, for one prediction.
        num_bytes: Of weights.
        seconds: That predicting the half took.
        scores: ``loss``, and of classes ``accuracy`` and ``brier``, by batch.
        calibration_error: Of classes: the mean distance of confidence from accuracy, over bins of confidence.
    """

    name: str
    members: tuple[str, ...]
    forward_passes: int
    num_bytes: int
    seconds: float
    scores: dict[str, Score]
    calibration_error: float | None

    def gains_over(self, other: Figures) -> dict[str, dict[str, Any]]:
        """Return how much better each score is than another's, with the 95 % interval, by paired batches."""
        if self.members == other.members:
            return {name: {"gain": 0.0, "interval": None} for name in self.scores}
        found = {n: score_gain(score, other.scores[n], SIGNS[n]) for n, score in self.scores.items()}
        return {
            n: {"gain": gain, "interval": list(interval) if interval else None} for n, (gain, interval) in found.items()
        }

    def record(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return {
            "name": self.name,
            "members": list(self.members),
            "forward_passes": self.forward_passes,
            "weight_bytes": self.num_bytes,
            "seconds": round(self.seconds, 4),
            **{name: score.value for name, score in self.scores.items()},
            **({} if self.calibration_error is None else {"calibration_error": self.calibration_error}),
        }


@dataclass
class Tally:
    """Adds up one contender's predictions, batch by batch.

    Source:
        Expected calibration error: Guo et al. 2017, arXiv:1706.04599, with 15 bins. Brier score: Brier 1950.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    sizes_B: list[float] = field(default_factory=list)
    _calibration: MulticlassCalibrationError | None = None

    def take(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in one batch.

        Args:
            outputs: ``(N, C)`` logits, or values.
            targets: ``(N,)`` classes, or ``(N, C)`` values.
        """
        if not len(targets):
            return
        self.sizes_B.append(float(len(targets)))
        self._add("loss", losses(outputs, targets))
        if not is_classes(targets):
            return
        p_NC = outputs.float().softmax(-1)
        self._add("accuracy", (outputs.argmax(-1) == targets).float())
        # Without the one-hot targets, which for a vocabulary are large: |p|^2 - 2 p_y + 1.
        self._add("brier", p_NC.square().sum(-1) - 2 * p_NC.gather(-1, targets[:, None])[:, 0] + 1)
        if self._calibration is None:
            self._calibration = calibration_error(outputs.shape[-1]).to(outputs.device)
        self._calibration.update(p_NC, targets)

    def scores(self) -> dict[str, Score]:
        """Return the scores by batch."""
        total = math.fsum(self.sizes_B)
        return {
            name: Score(
                value=math.fsum(v * n for v, n in zip(values_B, self.sizes_B, strict=True)) / total,
                values_B=tuple(values_B),
                sizes_B=tuple(self.sizes_B),
                num_batches=len(values_B),
            )
            for name, values_B in self.values.items()
        }

    def calibration(self) -> float | None:
        """Return the calibration error; ``None`` of values."""
        return None if self._calibration is None else float(self._calibration.compute())

    def _add(self, name: str, values_N: Tensor) -> None:
        self.values.setdefault(name, []).append(float(values_N.double().mean()))


def calibration_error(num_classes: int) -> MulticlassCalibrationError:
    """Return torchmetrics' expected calibration error."""
    return MulticlassCalibrationError(num_classes, n_bins=NUM_BINS, norm="l1")
