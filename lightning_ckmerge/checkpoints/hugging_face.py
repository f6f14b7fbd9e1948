"""Directories that ``from_pretrained`` of Hugging Face's transformers and PEFT opens, written without them."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ckmerge.core.specs import TensorSpec
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import FileRecord
from lightning_ckmerge.tensorfiles.untrusted import inside

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_ckmerge.artifact.weights import Weights
    from lightning_ckmerge.distributed.comm import Comm

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Small files that belong to a model and hold no weights: config, tokenizer, processor, chat template, remote code.
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
NOT_COPIED = {"recipe.json", "manifest.json"}


class HubWeights:
    """The part of a model's weights that one pretrained model holds, under its own names.

    Args:
        weights: All weights.
        prefix: Prefix of the pretrained model's names, such as ``"model."``; may be empty.
        kept: The names to write of tensors that share memory, as the model's own order has them; ``None``: all of them,
            each written out.
    """

    def __init__(self, weights: Weights, prefix: str, kept: Sequence[str] | None = None) -> None:
        self._weights = weights
        self._prefix = prefix
        self.specs: Mapping[str, TensorSpec] = {
            name.removeprefix(prefix): spec for name, spec in weights.specs.items() if name.startswith(prefix)
        }
        self.aliases = self._find_aliases(kept) if kept is not None else {}

    def gather(self, name: str) -> Tensor:
        """Return a whole tensor. A collective: all ranks ask for the same names in the same order."""
        return self._weights.gather(f"{self._prefix}{name}")

    def _find_aliases(self, kept: Sequence[str]) -> dict[str, str]:
        """Of names that share a tensor, the model's first one is written: ``from_pretrained`` ties the others to it."""
        first: dict[str, str] = {}
        for name in (*kept, *self.specs):
            if name in self.specs:
                first.setdefault(self._shared(name), name)
        return {name: first[self._shared(name)] for name in self.specs if first[self._shared(name)] != name}

    def _shared(self, name: str) -> str:
        full = f"{self._prefix}{name}"
        return self._weights.aliases.get(full, full)


def write_hub(
    directory: Path, weights: HubWeights, card: str, max_shard_size: int, comm: Comm | None = None
) -> dict[str, FileRecord]:
    """Write weights, with their index if there are several files, and a model card. A collective.

    Returns:
        Bytes and SHA-256 of each file of weights.
    """
    # Merging checkpoints of this kind needs no torch.
    from lightning_ckmerge.artifact.weights import write_weights

    if comm is None or comm.rank == 0:
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
    return write_weights(directory, weights, max_shard_size, comm)


class RenamedWeights:
    """Some of a model's weights under other names.

    Args:
        weights: All weights.
        names: New name of each -> its present name. Tied ones are written once a name.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._names = names
        self.specs: Mapping[str, TensorSpec] = {new: weights.specs[old] for new, old in names.items()}
        self.aliases: Mapping[str, str] = {}

    def gather(self, name: str) -> Tensor:
        """Return a whole tensor. A collective: all ranks ask for the same names in the same order."""
        return self._weights.gather(self._names[name])


def write_adapters(
    directory: Path, weights: Weights, exported: Mapping[str, Any], card: str, comm: Comm | None = None
) -> None:
    """Write the files for ``PeftModel.from_pretrained``: each adapter's weights and config, and a card. A collective.

    As in PEFT, the adapter ``default`` lies in the directory itself, others in one of their name.

    Args:
        directory: Exists where rank 0 is.
        weights: Hold the adapters.
        exported: By adapter its ``config``, and its ``tensors``: PEFT's names, each with that in ``weights``.
        card: The model card's text.
        comm: The ranks; ``None``: a process alone.
    """
    # As above: merging checkpoints needs no torch.
    from lightning_ckmerge.artifact.weights import write_weights
    from lightning_ckmerge.distributed.comm import Alone

    comm = comm or Alone()
    for adapter, parts in exported.items():
        out = directory if adapter == "default" else inside(directory, adapter)
        if comm.rank == 0:
            out.mkdir(exist_ok=True)
            text = json.dumps(parts["config"], indent=2, sort_keys=True) + "\n"
            (out / ADAPTER_CONFIG_NAME).write_text(text, encoding="utf-8")
        comm.exchange(None)
        renamed = RenamedWeights(weights, parts["tensors"])
        write_weights(out, renamed, sys.maxsize, comm, single_name=ADAPTER_WEIGHTS_NAME)
    if comm.rank == 0:
        (directory / CARD_NAME).write_text(card, encoding="utf-8")


def find_prefix(names: Collection[str], required: Collection[str]) -> str:
    """Return the prefix of a pretrained model's names in a LightningModule's.

    Args:
        names: The LightningModule's.
        required: The pretrained model's, tied ones once.

    Raises:
        ArtifactError: There is no such model in it, or there are several.

    >>> find_prefix(["net.model.a", "net.model.b", "scale"], ["a", "b"])
    'net.model.'
    """
    names = set(names)
    anchor = max(required, key=len)
    prefixes = {n.removesuffix(anchor) for n in names if n == anchor or n.endswith(f".{anchor}")}
    found = sorted(p for p in prefixes if all(f"{p}{name}" in names for name in required))
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtifactError(
            f"the weights must hold one pretrained model, got it under {', '.join(map(repr, found))}. "
            "Choose one with `--prefix`."
        )
    missing = min((sorted(r for r in required if f"{p}{r}" not in names) for p in {*prefixes, ""}), key=len)
    raise ArtifactError(
        f"the weights must hold every tensor of the config's model, got none called {listed(missing)}. "
        "Name the config of the model that was trained."
    )


def find_config(path: Path) -> Path | None:
    """Return a directory with the model's config: beside the weights, or in the ``hf`` of this or another artifact."""
    candidates = [path, path / "hf", *sorted(path.resolve().parent.glob("step=*/hf"), reverse=True)]
    return next((c for c in candidates if (c / CONFIG_NAME).is_file()), None)


def side_files(directory: Path) -> list[Path]:
    """Return the files beside a model's weights that ``from_pretrained`` reads: its config, tokenizer and code."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in SIDE_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in NOT_COPIED
    ]
