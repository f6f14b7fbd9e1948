"""Runs for the buffer's tests: weights that move, and a buffer that watches them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import Storage
from lightning_ckmerge.config import BufferConfig
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout

RUN_ID = "0123abcd"


def make_owned(seed: int = 0) -> list[OwnedTensor]:
    """Return tensors of every kind that a model may own: precisions, a scalar, an empty one, complex, a mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    mask = torch.full((3, 3), -torch.inf).triu(1)
    return [
        OwnedTensor(name="z.weight", role="parameter", tensor=normal(5, 7).requires_grad_()),
        OwnedTensor(name="half.weight", role="parameter", tensor=normal(3, 5).bfloat16()),
        OwnedTensor(name="a.double", role="parameter", tensor=normal(4, dtype=torch.float64)),
        OwnedTensor(name="scale", role="parameter", tensor=normal()),
        OwnedTensor(name="empty", role="parameter", tensor=torch.empty(0, 3)),
        OwnedTensor(name="phase", role="parameter", tensor=normal(3, dtype=torch.complex64)),
        OwnedTensor(name="transposed", role="parameter", tensor=normal(4, 6).T),
        OwnedTensor(name="mask", role="buffer", tensor=mask),
    ]


class Run:
    """Weights after each step, the same whenever a step is asked for, in memory that is overwritten by every step."""

    def __init__(self) -> None:
        owned = make_owned()
        self.layout = TensorLayout(owned)
        self.live = self.layout.order(owned)

    @torch.no_grad()
    def at(self, step: int) -> list[Tensor]:
        """Overwrite the live weights with those of ``step``, and return them."""
        for live, new in zip(self.live, self.layout.order(make_owned(seed=step)), strict=True):
            live.copy_(new)
        return self.live

    def buffer(self, storage: Storage, **overrides: Any) -> RollingBuffer:
        """Return a buffer for this model, with short segments and every step in their means."""
        options = {"segment_steps": 5, "double_segments": False, "run_id": RUN_ID}
        names = options.keys() & overrides.keys()
        options |= {name: overrides.pop(name) for name in names}
        overrides.setdefault("update_every_n_steps", 1)
        return RollingBuffer(BufferConfig(**overrides), self.layout, storage, device="cpu", **options)

    def train(self, buffer: RollingBuffer, steps: Iterable[int]) -> None:
        """Let ``buffer`` see the weights after each of ``steps``."""
        for step in steps:
            buffer.update(self.at(step), step)

    def mean(self, steps: Iterable[int]) -> list[Tensor]:
        """Return the exact mean of the weights over ``steps``, in float64; masks as they are."""
        weights_N = [[w.detach().double().clone() for w in self.at(step)] for step in steps]
        means = [torch.stack(states).mean(0) for states in zip(*weights_N, strict=True)]
        return [torch.where(m.isfinite(), m, w) for m, w in zip(means, weights_N[-1], strict=True)]


def spans(snapshots: Iterable[Snapshot]) -> list[tuple[int, int]]:
    """Return first and last steps."""
    return [(s.segment.first_step, s.segment.last_step) for s in snapshots]


def assert_same(actual: list[Snapshot], expected: list[Snapshot]) -> None:
    """Assert equality to the bit, of places, hashes, precisions and weights."""
    assert actual == expected
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.tensors, [t.clone() for t in e.tensors], rtol=0, atol=0, equal_nan=True)


def files(dirpath: Path) -> set[str]:
    """Return the names of everything in ``dirpath``."""
    return {path.name for path in dirpath.iterdir()}
