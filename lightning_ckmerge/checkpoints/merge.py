"""Merges checkpoints on disk into a new directory, block by block, and records how.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ckmerge.artifact.load import RECIPE_KEY, RECIPE_NAME
from lightning_ckmerge.artifact.manifest import software
from lightning_ckmerge.checkpoints.formats import Source, read_torch
from lightning_ckmerge.core.blockwise import mix_blocks, prepare_to_mix
from lightning_ckmerge.core.specs import TENSOR_TYPES, TensorSpec
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.tensorfiles.durable import FileRecord, file_record, new_directory, records
from lightning_ckmerge.tensorfiles.writer import SINGLE_NAME, write_blocks

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 20
# Keys of a Lightning checkpoint without meaning for a merge: they belong to the newest weights alone.
STATE_OF_TRAINING = {"optimizer_states", "lr_schedulers", "callbacks", "loops", "MixedPrecision", "amp_scaling_state"}
AVERAGED_STATISTICS = ("running_mean", "running_var")

Recipe = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to merge.

    Args:
        name: ``linear``, or ``slerp``, which takes two checkpoints and the weights ``1 - t`` and ``t``.
        weights_K: One number a checkpoint, not 0 in sum.
        schedule: The published schedule that they come from, as the user wrote it.
    """

    name: str
    weights_K: tuple[float, ...]
    schedule: str | None = None


class MergedWeights:
    """The merge of K checkpoints; a block is computed when it is asked for.

    Integer and boolean tensors are the newest checkpoint's. Names that share a tensor in every checkpoint still do.

    Args:
        sources_K: K checkpoints of one model, oldest first.
        method: How to merge.
        on_tensor: Called with the bytes of each merged tensor.

    Raises:
        ArtifactError: Names or shapes differ.
        ConfigError: The weights do not fit the checkpoints.
    """

    def __init__(
        self, sources_K: Sequence[Source], method: Method, on_tensor: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        self._sources_K = sources_K
        self._method = method
        self._on_tensor = on_tensor
        _check_weights(method, len(sources_K))
        _check_order(sources_K)
        newest = sources_K[-1]
        for source in sources_K[:-1]:
            _check_alike(source, newest)
        self.specs = {name: self._spec(name) for name in newest.specs}
        shared = [set(s.aliases.items()) for s in sources_K]
        self.aliases = dict(sorted(set.intersection(*shared)))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(spec.nbytes for name, spec in self.specs.items() if name not in self.aliases)

    def prepare(self) -> None:
        """Load the libraries for the arithmetic: a tenth of a second to two, in which something else can be done."""
        floating = {
            s.specs[name].dtype for s in self._sources_K for name, spec in self.specs.items() if spec.is_floating
        }
        if self._method.name == "linear" and len(self._sources_K) > 1:
            prepare_to_mix(floating)

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield a merged tensor's bytes; asking for the next block overwrites the last one."""
        spec = self.specs[name]
        if spec.is_complex or (spec.is_floating and self._method.name == "slerp"):
            yield self._whole(name)
        else:
            sources_K = self._sources_K if spec.is_floating else self._sources_K[-1:]
            yield from self._mixed(name, sources_K)
        self._on_tensor(spec.nbytes)

    def tensor(self, name: str) -> Tensor:
        """Return a merged tensor whole."""
        import torch

        from lightning_ckmerge.core.layout import DTYPES

        spec = self.specs[name]
        if spec.dtype not in TENSOR_TYPES:  # it cannot be averaged
            return self._sources_K[-1].weights[name]
        merged = torch.empty(spec.nbytes, dtype=torch.uint8)
        start = 0
        for block in self.blocks(name):
            merged[start : start + len(block)] = torch.frombuffer(block, dtype=torch.uint8)
            start += len(block)
        return merged.view(DTYPES[spec.dtype]).reshape(spec.shape)

    def _mixed(self, name: str, sources_K: Sequence[Source]) -> Iterator[memoryview]:
        """Yield the weighted mean of a tensor over some checkpoints; over one, its own bytes."""
        specs_K = [s.specs[name] for s in sources_K]
        spec = self.specs[name]
        numel = spec.nbytes // spec.itemsize
        step = BLOCK_BYTES // max(s.itemsize for s in specs_K)
        for start in range(0, numel, step):
            num = min(step, numel - start)
            blocks_K = [m[: num * s.itemsize] for m, s in zip(self._memory_K, specs_K, strict=False)]
            for source, block, s in zip(sources_K, blocks_K, specs_K, strict=True):
                source.reader.read_into(name, start * s.itemsize, block)
            if len(blocks_K) == 1:
                yield blocks_K[0]
                continue
            target = self._memory_K[-1][: num * spec.itemsize]
            mix_blocks(blocks_K, [s.dtype for s in specs_K], self._method.weights_K, target, spec.dtype)
            yield target

    @functools.cached_property
    def _memory_K(self) -> list[memoryview]:
        """A block a checkpoint, and one for their mean: fresh memory for each tensor would take longer to get."""
        return [memoryview(bytearray(BLOCK_BYTES)) for _ in range(len(self._sources_K) + 1)]

    def _whole(self, name: str) -> memoryview:
        import torch

        from lightning_ckmerge.core.layout import DTYPES, raw_bytes
        from lightning_ckmerge.core.mixing import mix_tensors, slerp_tensors

        tensors_K = [s.weights[name] for s in self._sources_K]
        if self.specs[name].is_complex:
            dtype = DTYPES[self.specs[name].dtype]
            tensors_K = [torch.view_as_real(t.to(dtype).resolve_conj()) for t in tensors_K]
        if self._method.name == "slerp":
            return raw_bytes(slerp_tensors(tensors_K[0], tensors_K[1], self._method.weights_K[1]))
        return raw_bytes(mix_tensors(tensors_K, self._method.weights_K))

    def _spec(self, name: str) -> TensorSpec:
        specs = [s.specs[name] for s in self._sources_K]
        newest = specs[-1]
        if len({s.dtype for s in specs}) == 1 or not (newest.is_floating or newest.is_complex):
            return newest
        if unknown := [s for s in specs if s.dtype not in TENSOR_TYPES]:
            return unknown[0]  # writing refuses it
        import torch

        from lightning_ckmerge.core.layout import DTYPES, tensor_spec

        return tensor_spec(newest.shape, functools.reduce(torch.promote_types, [DTYPES[s.dtype] for s in specs]))


def write_merge(
    out: Path, merged: MergedWeights, recipe: Recipe, *, max_shard_size: int, copies: Sequence[Path] = ()
) -> Recipe:
    """Write a merge as a new directory, whole or not at all, and return its recipe with the ``files``.

    Args:
        out: The directory; must not exist.
        merged: The weights.
        recipe: As returned by ``build_recipe``. It goes into each file's header too.
        max_shard_size: Bytes above which the weights are split over several files.
        copies: Files to copy beside them, such as a model's config and tokenizer.

    Raises:
        ArtifactError: ``out`` exists, or a tensor cannot be stored.
    """
    header = {RECIPE_KEY: json.dumps(recipe, separators=(",", ":"))}
    if out.suffix == ".safetensors":
        with new_directory(out, only=SINGLE_NAME) as staging:
            files = write_blocks(staging, merged, sys.maxsize, header)
        return {**recipe, "files": {out.name: files[SINGLE_NAME]}}
    with new_directory(out) as staging:
        files = write_blocks(staging, merged, max_shard_size, header)
        for path in copies:
            shutil.copyfile(path, staging / path.name)
        complete = {**recipe, "files": records(staging, files)}
        text = json.dumps(complete, indent=1, ensure_ascii=False) + "\n"
        (staging / RECIPE_NAME).write_text(text, encoding="utf-8")
    return complete


def write_checkpoint(out: Path, merged: MergedWeights, recipe: Recipe, like: Source) -> Recipe:
    """Write a merge as a weights-only Lightning checkpoint, and return its recipe with the ``files``.

    The merged weights are held in memory.

    Args:
        out: The file; must not exist.
        merged: The weights.
        recipe: As returned by ``build_recipe``. The checkpoint holds it, as text, under ``ckmerge_recipe``.
        like: A Lightning checkpoint, for hyper-parameters and all else that is no weight and no state of training.

    Raises:
        ArtifactError: ``out`` exists.
    """
    import torch

    content = read_torch(like.path)
    kept = {key: value for key, value in content.items() if key not in STATE_OF_TRAINING}
    tensors = {name: merged.tensor(name) for name in merged.specs if name not in merged.aliases}
    tensors |= {name: tensors[first] for name, first in merged.aliases.items()}
    weights = type(content["state_dict"])({name: tensors.get(name, v) for name, v in content["state_dict"].items()})
    with new_directory(out, only=out.name) as staging:
        torch.save({**kept, "state_dict": weights, RECIPE_KEY: json.dumps(recipe)}, staging / out.name)
    return {**recipe, "files": {out.name: file_record(out)}}


def newest_lightning(sources_K: Sequence[Source]) -> Source:
    """Return the newest checkpoint that a ``.ckpt`` can be modelled on.

    Raises:
        ConfigError: There is none.
    """
    for source in reversed(sources_K):
        if source.kind == "torch" and source.is_lightning:
            return source
    raise ConfigError(
        "a .ckpt takes its hyper-parameters from the newest Lightning .ckpt among the checkpoints, got "
        f"{listed([source.path.name for source in sources_K])}. Write a .safetensors file or a directory."
    )


def build_recipe(sources_K: Sequence[Source], method: Method, inputs_K: Sequence[Mapping[str, FileRecord]]) -> Recipe:
    """Return how a merge is made: inputs with their hashes, and their coefficients.

    Args:
        sources_K: K checkpoints, oldest first.
        method: How they are merged.
        inputs_K: Bytes and SHA-256 of each one's files.
    """
    total = sum(method.weights_K)
    return {
        "schema_version": 1,
        # Checkpoints that do not all tell their step stand as they were given.
        "order": "step" if all(s.step is not None for s in sources_K) else "given",
        "notes": _notes(sources_K[-1]) if len(sources_K) > 1 else [],
        "method": method.name,
        "schedule": method.schedule,
        "weights": list(method.weights_K),
        "coefficients": [w / total for w in method.weights_K],
        "inputs": [
            {"path": str(source.path), "kind": source.kind, "step": source.step, "files": dict(files)}
            for source, files in zip(sources_K, inputs_K, strict=True)
        ],
        "software": software(),
    }


def _notes(source: Source) -> list[str]:
    """Return the caveats of a merge for its user."""
    averaged = [name for name in source.specs if name.rpartition(".")[2] in AVERAGED_STATISTICS]
    layers = {name.rpartition(".")[0] for name in averaged}
    if not layers:
        return []
    return [
        f"The statistics of {len(layers)} normalization {'layer' if len(layers) == 1 else 'layers'}, such as "
        f"{averaged[0]}, were averaged too: they are not those of the merged weights. Recalibrate them before use: "
        "`torch.optim.swa_utils.update_bn(train_dataloader, model)`, or forward passes over training batches in "
        "`model.train()`."
    ]


def _check_weights(method: Method, num_checkpoints: int) -> None:
    if len(method.weights_K) != num_checkpoints:
        raise ConfigError(
            f"there must be one weight a checkpoint, got {len(method.weights_K)} weights for {num_checkpoints} "
            "checkpoints. Give as many, or name a schedule."
        )
    if sum(method.weights_K) == 0:
        raise ConfigError(f"the weights must not sum to 0, got {', '.join(map(str, method.weights_K))}. Change one.")


def _check_order(sources_K: Sequence[Source]) -> None:
    steps = [s.step for s in sources_K if s.step is not None]
    if steps != sorted(steps):
        raise ConfigError(
            f"checkpoints must be given oldest first, got steps {', '.join(map(str, steps))}. Sort them: the last one "
            "gives the tensors that cannot be averaged."
        )


def _check_alike(source: Source, newest: Source) -> None:
    faults = {
        f"only in {newest.path.name}": newest.specs.keys() - source.specs.keys(),
        f"only in {source.path.name}": source.specs.keys() - newest.specs.keys(),
        "of another shape or kind": {
            name
            for name in source.specs.keys() & newest.specs.keys()
            if source.specs[name].shape != newest.specs[name].shape
            or source.specs[name].is_floating != newest.specs[name].is_floating
        },
    }
    found = [f"{listed(names)} {fault}" for fault, names in faults.items() if names]
    if found:
        raise ArtifactError(
            f"checkpoints must hold the same tensors, got {'; '.join(found)}. Merge checkpoints of one model."
        )
