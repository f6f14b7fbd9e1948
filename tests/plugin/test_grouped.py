"""Searches with coefficients of each group's own, and with whole numbers among the coordinates, under a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from lightning_ckmerge import Artifact, BufferConfig, CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.checkpoints.rebuild import rebuild
from lightning_ckmerge.core.spaces import Grouped, Space, SpaceName
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.markdown import render_markdown
from tests.support.models import Noisy
from tests.support.trainers import make_trainer


def train(root: Path, space: Space | SpaceName) -> tuple[Noisy, Artifact]:
    """Train, search once at the end, and return what was accepted."""
    seed_everything(0)
    callback = CheckpointMergeCallback(
        dirpath=root / "merges",
        every_n_train_steps=80,
        on_error="raise",
        buffer=BufferConfig(every_n_train_steps=4, update_every_n_steps=1),
        search=SearchConfig(space=space, anchors=[], n_trials=6, max_fraction_of_training=None),
    )
    module = Noisy()
    trainer = make_trainer(root, callback, max_steps=80)
    batches = DataLoader(torch.randint(16, (2048,)), batch_size=8)
    trainer.fit(module, batches, DataLoader(torch.arange(16).repeat(12), batch_size=12))
    artifact = callback.best_artifact
    assert artifact is not None, "no merge was accepted: the test needs a run that merging helps"
    return module, artifact


def test_groups_merge_apart_are_recorded_and_are_rebuilt_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    module, artifact = train(tmp_path, Grouped(factors={"embeddings": 2.0, "mlp": 0.25}))
    assert "embeddings: 1 tensor, such as embed.weight; mlp: 2 tensors" in caplog.text
    groups = artifact.manifest["groups"]
    assert {name: group["tensors"] for name, group in groups.items()} == {
        "embeddings": ["embed.weight"],
        "mlp": ["mlp.weight", "mlp.bias"],
        "norms": ["norm.weight", "norm.bias"],
        "head": ["head.weight", "head.bias"],
        "other": ["unused", "frozen"],
    }
    assert groups["norms"]["coefficients"] == groups["head"]["coefficients"] == artifact.manifest["coefficients"]
    assert groups["mlp"]["coefficients"] != groups["embeddings"]["coefficients"]
    check_rebuilt_and_rendered(tmp_path, module, artifact)


def test_choices_among_the_coordinates_are_recorded_as_whole_numbers(tmp_path: Path) -> None:
    module, artifact = train(tmp_path, "auto")
    assert artifact.manifest["space"] == "auto"
    for trial in artifact.manifest["trials"]:
        z_D = trial["coordinates"]
        assert list(z_D) == ["tau", "beta", "kernel", "window", "pool", "groups"]
        assert all(isinstance(z_D[name], int) for name in ("kernel", "window", "pool", "groups"))
    assert "Along window" in render_html(artifact.manifest)
    check_rebuilt_and_rendered(tmp_path, module, artifact)


def check_rebuilt_and_rendered(root: Path, module: Noisy, artifact: Artifact) -> None:
    latest = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    rebuilt = rebuild(artifact, root / "merges" / "buffer", latest)
    assert rebuilt.num_compared == 9
    assert rebuilt.different == ()
    for render in (render_markdown, render_html):
        shown = render(artifact.manifest).lower()
        assert "embeddings" in shown or "groups" not in artifact.manifest
