from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from tests.artifact.outcomes import LocalWeights, make_outcome

Publish = Callable[..., Artifact]


class TiedModel(nn.Module):
    """Tied weights, BatchNorm's buffers (one of them integer), a mask of ``-inf``, and extra state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("a merge holds no extra state")


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Publishes made-up searches of one run, each with a model's weights unless ``weights`` says otherwise."""

    def run(
        *,
        save_top_k: int = -1,
        max_shard_size: int = 1 << 30,
        weights: Any = "default",
        extras: Any = (),
        **kwargs: Any,
    ) -> Artifact:
        store = ArtifactStore(
            tmp_path / "merges", mode=kwargs.get("mode", "min"), save_top_k=save_top_k, max_shard_size=max_shard_size
        )
        if weights == "default":
            weights = tensors_of(TiedModel())
        merged = None if weights is None else LocalWeights(weights)
        return store.publish(build_manifest(make_outcome(**kwargs)), merged, extras=extras)

    return run
