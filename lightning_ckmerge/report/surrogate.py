"""A Gaussian process for the report's pictures: what the trials say about the coordinates between them.

Letters: N trials, M points, D coordinates; x in the unit cube.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LENGTH_SCALES = np.geomspace(0.05, 2.0, 9)
# Variance of the noise over that of the function. All candidates see the same batches, so it is next to nothing, but a
# value of a candidate that was dropped early is an estimate.
NOISES = (1e-6, 1e-4, 1e-2)
# Standard deviation of the length scales' logarithms around that of the unit cube's half.
PRIOR_WIDTH = 1.0
# Half the width of a 95 % band, in standard deviations.
BAND = 1.96


@dataclass(frozen=True)
class Surrogate:
    """A fitted Gaussian process with a Matérn 5/2 kernel. ``predict`` it.

    Args:
        x_ND: Where it was measured.
        length_D: Length scales.
        weights_N: The kernel's inverse, times the centred values.
        inverse_NN: The kernel's inverse.
        mean: Of the values.
        variance: Of the function.
    """

    x_ND: Array
    length_D: Array
    weights_N: Array
    inverse_NN: Array
    mean: float
    variance: float

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation at M points."""
        k_MN = matern(x_MD / self.length_D, self.x_ND / self.length_D)
        explained_M = np.einsum("mn,nk,mk->m", k_MN, self.inverse_NN, k_MN)
        variance_M = self.variance * np.maximum(0.0, 1.0 - explained_M)
        return self.mean + k_MN @ self.weights_N, np.sqrt(variance_M)


def fit_surrogate(x_ND: Array, y_N: Array) -> Surrogate | None:
    """Return the most probable process on a grid of length scales and noises; ``None`` for too few or equal values.

    Source:
        Rasmussen and Williams 2006, chapter 5.4: the marginal likelihood, with the variance at its optimum.
    """
    num, dims = x_ND.shape
    if num < dims + 3 or np.ptp(y_N) == 0:
        return None
    mean = float(y_N.mean())
    centred_N = y_N - mean
    best: tuple[float, Surrogate] | None = None
    for length in itertools.product(LENGTH_SCALES, repeat=dims):
        length_D = np.array(length)
        k_NN = matern(x_ND / length_D, x_ND / length_D)
        prior = -0.5 * float((np.log(length_D / 0.5) ** 2).sum()) / PRIOR_WIDTH**2
        for noise in NOISES:
            noisy_NN = k_NN + noise * np.eye(num)
            inverse_NN = np.linalg.inv(noisy_NN)
            weights_N = inverse_NN @ centred_N
            variance = float(centred_N @ weights_N) / num
            score = prior - 0.5 * (num * np.log(variance) + np.linalg.slogdet(noisy_NN).logabsdet)
            if best is None or score > best[0]:
                best = score, Surrogate(x_ND, length_D, weights_N, inverse_NN, mean, variance)
    return best[1] if best is not None else None


def matern(a_MD: Array, b_ND: Array) -> Any:
    """Return the Matérn 5/2 kernel between points that are measured in length scales; ``(M, N)``."""
    distance_MN = np.sqrt(5.0 * ((a_MD[:, None, :] - b_ND[None, :, :]) ** 2).sum(-1))
    return (1.0 + distance_MN + distance_MN**2 / 3.0) * np.exp(-distance_MN)
