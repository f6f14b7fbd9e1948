"""Spaces: families of coefficients, and the coordinates that describe them."""

from typing import Literal

from lightning_ckmerge.core.spaces.auto import Auto
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space, near
from lightning_ckmerge.core.spaces.by_tensor import ByTensor
from lightning_ckmerge.core.spaces.decay import Decay
from lightning_ckmerge.core.spaces.grouped import Grouped
from lightning_ckmerge.core.spaces.kernels import (
    KernelName,
    exponential_kernel,
    kernel,
    minus_sqrt_kernel,
    normalised,
    power_kernel,
)
from lightning_ckmerge.core.spaces.mixtures import Affine, Simplex
from lightning_ckmerge.core.spaces.tail import Tail
from lightning_ckmerge.core.spaces.windows import Pairwise, Window

SpaceName = Literal["grouped", "decay", "pairwise", "window", "simplex", "affine", "auto", "tail"]

__all__ = [
    "Affine",
    "Auto",
    "ByTensor",
    "Coordinates",
    "Decay",
    "Grouped",
    "Interval",
    "KernelName",
    "Pairwise",
    "Simplex",
    "Space",
    "SpaceName",
    "Tail",
    "Window",
    "exponential_kernel",
    "kernel",
    "make_space",
    "minus_sqrt_kernel",
    "near",
    "normalised",
    "power_kernel",
]


def make_space(space: SpaceName | Space) -> Space:
    """Return the space that a name stands for; a ``Space`` object passes through."""
    return SPACES[space]() if isinstance(space, str) else space


SPACES: dict[SpaceName, type[Space]] = {
    "grouped": Grouped,
    "decay": Decay,
    "pairwise": Pairwise,
    "window": Window,
    "simplex": Simplex,
    "affine": Affine,
    "auto": Auto,
    "tail": Tail,
}
