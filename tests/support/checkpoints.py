"""One small model's weights at three steps, written in every format that ``merge`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from tests.support.outcomes import TiedModel, tensors_of
from tests.support.warnings import only_expected

STEPS = (100, 200, 300)


def model_at(step: int) -> TiedModel:
    torch.manual_seed(step)
    model = TiedModel()
    model.norm.num_batches_tracked.fill_(step)
    model.norm.running_var.uniform_()
    return model


def write_lightning(path: Path, step: int, **extra: Any) -> Path:
    """A checkpoint with all that Lightning keeps beside the weights."""
    model = model_at(step)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"width": 4},
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def write_torch(path: Path, step: int) -> Path:
    torch.save(tensors_of(model_at(step)), path)
    return path


def write_safetensors(path: Path, step: int) -> Path:
    """Tied weights are left out and named in the header."""
    model = model_at(step)
    model.__class__ = _WithoutExtraState
    save_model(model, str(path))
    return path


def write_hub(path: Path, step: int) -> Path:
    """Two shards, an index, and what ``from_pretrained`` wants."""
    tensors = {n: t.clone() for n, t in tensors_of(model_at(step)).items()}
    path.mkdir(parents=True)
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[:3],
        "model-00002-of-00002.safetensors": names[3:],
    }
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, path / file, metadata={"format": "pt"})
    weight_map = {n: file for file, held in files.items() for n in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"model_type": "tied"}')
    (path / "tokenizer.json").write_text("{}")
    return path


def write_distributed(path: Path, step: int, *, key: str = "state_dict", lightning: bool = True) -> Path:
    tensors = tensors_of(model_at(step))
    content: Mapping[str, Any] = {key: tensors} if key else tensors
    with only_expected():
        dcp.save({**content, "optimizer_0": {"lr": 0.1, "m": torch.ones(2)}}, checkpoint_id=path, no_dist=True)
    if lightning:
        torch.save({"global_step": step}, path / "meta.pt")
    return path


WRITERS = {
    "lightning": (write_lightning, "step={}.ckpt"),
    "torch": (write_torch, "step={}.pt"),
    "safetensors": (write_safetensors, "step={}.safetensors"),
    "hub": (write_hub, "checkpoint-{}"),
    "distributed": (write_distributed, "step={}.ckpt"),
}


def write_all(root: Path, kind: str) -> list[Path]:
    """Write the three checkpoints in one format, oldest first."""
    write, name = WRITERS[kind]
    root.mkdir(parents=True, exist_ok=True)
    return [write(root / name.format(step), step) for step in STEPS]


class _WithoutExtraState(TiedModel):
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state
