"""The pretrained model inside a LightningModule, or its adapters, written for the users of transformers and PEFT.

Both are found without importing these libraries.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.artifact.weights import Weights
from lightning_ckmerge.checkpoints.hugging_face import HubWeights, write_adapters, write_hub
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import ArtifactConfig
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.flat_shards import clean_name
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.progress import harmless
from lightning_ckmerge.report.card import render_card

DIRECTORY_NAME = "hf"
PROCESSORS = ("tokenizer", "processor", "image_processor", "feature_extractor")


class Pretrained:
    """The one pretrained model that the Trainer's module holds.

    Args:
        trainer: The Trainer, inside ``fit``.
        config: For the size of shards.
        has_adapters: Write the adapters that the manifest describes, not the model.

    Raises:
        ConfigError: There is none, or there are several side by side.
    """

    def __init__(self, trainer: Trainer, config: ArtifactConfig, *, has_adapters: bool) -> None:
        self._owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
        self._max_shard_size = parse_size(config.max_shard_size)
        self._found = None if has_adapters else _find(trainer.lightning_module)

    def write(self, directory: Path, manifest: Manifest, *, weights: Weights, comm: Comm) -> None:
        """Write ``hf/``: weights, config, tokenizer or processor, model card. A collective.

        Args:
            directory: The artifact's.
            manifest: For the card and the adapters.
            weights: All of the LightningModule's.
            comm: The ranks.
        """
        out = directory / DIRECTORY_NAME
        if comm.rank == 0:
            out.mkdir()
            self._write_processors(out)
            if self._found is not None:
                _write_config(self._found[1], out)
        comm.exchange(None)
        if self._found is None:
            write_adapters(out, weights, manifest["adapters"]["peft"], _card(manifest), comm)
            return
        path, model = self._found
        # The model's own order: of tied names it lists the one that it loads first.
        kept = [clean_name(name) for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        hub = HubWeights(weights, f"{path}." if path else "", kept)
        write_hub(out, hub, _card(manifest), self._max_shard_size, comm)

    def _write_processors(self, out: Path) -> None:
        for owner in self._owners:
            for name in PROCESSORS:
                processor: Any = getattr(owner, name, None)
                if hasattr(processor, "save_pretrained"):
                    processor.save_pretrained(out)


def _card(manifest: Manifest) -> str:
    card = ""
    with harmless("The model card"):
        card = render_card(manifest)
    return card


def _write_config(model: Any, out: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [_class_name(model)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    config.save_pretrained(out)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(out)


def _find(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the outermost pretrained model, with its place in ``state_dict`` names."""
    found: dict[str, nn.Module] = {}
    for path, submodule in module.named_modules():
        # Looked up on the class: wrappers such as torch.compile's forward every attribute.
        is_model = hasattr(type(submodule), "save_pretrained") and hasattr(submodule, "config")
        if is_model and not any(path == p or path.startswith(f"{p}." if p else "") for p in found):
            found[clean_name(path)] = submodule
    if len(found) != 1:
        held = ", ".join(f"{path or 'itself'} ({_class_name(m)})" for path, m in found.items()) or "none"
        raise ConfigError(
            f'`artifact.formats` with "hf" needs one transformers model in the module, got {held}. Leave the format '
            "out, and use `ckmerge export --prefix` after training."
        )
    return next(iter(found.items()))


def _class_name(model: nn.Module) -> str:
    """The name of the user's class: FSDP2 puts a class of its own before it."""
    return next(c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("torch."))
