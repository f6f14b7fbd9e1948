"""Checkpoint merging during pretraining: a Lightning callback that finds the best merge of the recent weights.

Names are loaded when they are first used, so that code without a Trainer starts without Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ckmerge.artifact.load import Artifact, load_merged
    from lightning_ckmerge.config import ArtifactConfig, BufferConfig, Constraint, EvaluationConfig, SearchConfig
    from lightning_ckmerge.core.spaces import Decay, Grouped, Interval, Pairwise, Space, Window
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback
    from lightning_ckmerge.plugin.ensemble.build import build_ensemble
    from lightning_ckmerge.plugin.ensemble.module import MergedEnsemble, load_ensemble
    from lightning_ckmerge.plugin.offline.search import search_checkpoints
    from lightning_ckmerge.plugin.offline.study import study_checkpoints

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact.load",
    "ArtifactConfig": "config",
    "BufferConfig": "config",
    "CheckpointMergeCallback": "plugin.callback",
    "Constraint": "config",
    "Decay": "core.spaces",
    "EvaluationConfig": "config",
    "Grouped": "core.spaces",
    "Interval": "core.spaces",
    "MergedEnsemble": "plugin.ensemble.module",
    "Pairwise": "core.spaces",
    "SearchConfig": "config",
    "Space": "core.spaces",
    "Window": "core.spaces",
    "build_ensemble": "plugin.ensemble.build",
    "load_ensemble": "plugin.ensemble.module",
    "load_merged": "artifact.load",
    "search_checkpoints": "plugin.offline.search",
    "study_checkpoints": "plugin.offline.study",
}

__all__ = [
    "Artifact",
    "ArtifactConfig",
    "BufferConfig",
    "CheckpointMergeCallback",
    "Constraint",
    "Decay",
    "EvaluationConfig",
    "Grouped",
    "Interval",
    "MergedEnsemble",
    "Pairwise",
    "SearchConfig",
    "Space",
    "Window",
    "build_ensemble",
    "load_ensemble",
    "load_merged",
    "search_checkpoints",
    "study_checkpoints",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
