"""Checkpoints of several formats, opened for merging: names and shapes at once, a tensor when it is asked for.

Lightning's and torch's files are mapped by ``torch.load(weights_only=True)``, which builds tensors and plain data only.
PyTorch is imported only where a format needs it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
from lightning_ckmerge.checks import TORCH_SUFFIXES
from lightning_ckmerge.core.specs import TensorSpec
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import FileRecord
from lightning_ckmerge.tensorfiles.reader import METADATA_NAME, StoredWeights
from lightning_ckmerge.tensorfiles.untrusted import inside, read_json
from lightning_ckmerge.tensorfiles.writer import INDEX_NAME, SINGLE_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from torch import Tensor

STEP = re.compile(r"(?:step|iter|checkpoint)[=_-]?(\d+)", flags=re.IGNORECASE)
# Where Lightning's two kinds of checkpoints keep the weights; its directories say `model` under FSDP.
LIGHTNING_KEYS = ("state_dict", "model")
FORMATS = (
    "a Lightning .ckpt, a torch file, a .safetensors file, a Hugging Face directory, a distributed checkpoint "
    "directory, or an artifact"
)


class Reader(Protocol):
    """Gives out tensors' bytes."""

    def read_into(self, name: str, start: int, block: memoryview) -> None:
        """Fill a block with a tensor's bytes from ``start`` on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One checkpoint.

    Args:
        path: The file or directory.
        kind: ``torch``, ``safetensors``, ``huggingface``, ``distributed`` or ``artifact``.
        weights: Its tensors by name, read when asked for.
        reader: The same as bytes.
        specs: Shapes and dtypes by name.
        aliases: Names that share another name's tensor.
        files: The files that hold the weights.
        step: Optimizer steps, as the file or its name says; ``None``: neither does.
        is_lightning: Whether Lightning wrote it, as far as it tells.
    """

    path: Path
    kind: str
    weights: Mapping[str, Tensor]
    reader: Reader
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    files: tuple[Path, ...]
    step: int | None
    is_lightning: bool = False

    def named(self, records: Mapping[Path, FileRecord]) -> dict[str, FileRecord]:
        """Return the facts about its files, by their names in the checkpoint's directory."""
        return {path.name: records[path] for path in self.files}


class SourceWeights:
    """A checkpoint's weights, to be written elsewhere.

    Args:
        source: The checkpoint.
        on_tensor: Called with the bytes of each tensor that was read.
    """

    def __init__(self, source: Source, on_tensor: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._weights = source.weights
        self._on_tensor = on_tensor
        self.specs = source.specs
        self.aliases = source.aliases

    def gather(self, name: str) -> Tensor:
        """Return a tensor."""
        self._on_tensor(self.specs[name].nbytes)
        return self._weights[name]


class WholeReader:
    """Bytes of tensors that are loaded whole; the last one is kept.

    Args:
        weights: The tensors.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._last: tuple[str, memoryview] | None = None

    def read_into(self, name: str, start: int, block: memoryview) -> None:
        """Fill a block with a tensor's bytes from ``start`` on."""
        if self._last is None or self._last[0] != name:
            from lightning_ckmerge.core.layout import raw_bytes

            self._last = None
            self._last = name, raw_bytes(self._weights[name])
        block[:] = self._last[1][start : start + len(block)]


def open_source(path: Path, key: str | None = None) -> Source:
    """Open one checkpoint.

    Args:
        path: A file or directory of any supported format.
        key: The entry that holds the weights in a torch file or distributed checkpoint, where it is not Lightning's.

    Raises:
        ArtifactError: The format is none of these, or the checkpoint is damaged or needs code to be loaded.
    """
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        return _open_torch(path, key)
    if path.is_file() and path.suffix == ".safetensors":
        return _open_safetensors(path, "safetensors", [path])
    if (path / METADATA_NAME).is_file():
        return _open_distributed(path, key)
    if (path / MANIFEST_NAME).is_file():
        from lightning_ckmerge.artifact.load import Artifact

        artifact = Artifact.open(path)
        artifact.tensors()  # refuses a record without weights
        names = sorted(name for name in artifact.manifest["files"] if WEIGHTS_NAME.fullmatch(name))
        return _open_safetensors(path, "artifact", [artifact.path / n for n in names], artifact.manifest["step"])
    if (path / INDEX_NAME).is_file():
        return _open_safetensors(path, "huggingface", _shards(path))
    if (path / SINGLE_NAME).is_file():
        return _open_safetensors(path, "huggingface", [path / SINGLE_NAME])
    found = "nothing" if not path.exists() else "another directory" if path.is_dir() else "another file"
    raise ArtifactError(f"a checkpoint must be {FORMATS}, got {found} at {path}. Check the path, or convert it.")


def find_sources(directory: Path) -> list[Path]:
    """Return the checkpoints directly in ``directory``, by their names' steps, then by name.

    Raises:
        ArtifactError: There is none.
    """
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    found = [p for p in entries if not p.name.startswith(".") and not p.is_symlink() and _looks_like_one(p)]
    if not found:
        raise ArtifactError(
            f"a directory of checkpoints must hold at least one, got none in {directory}. A checkpoint is {FORMATS}."
        )
    return sorted(found, key=lambda p: (_named_step(p) is None, _named_step(p) or 0, p.name))


def open_sources(paths: Sequence[Path], key: str | None = None) -> list[Source]:
    """Open checkpoints in the order given.

    A directory that is no checkpoint stands for the checkpoints that lie in it, oldest first; of those with equal steps
    one is taken, since Lightning keeps copies of the last; they must hold the same weights.

    Args:
        paths: Checkpoints, and directories of them.
        key: As ``open_source``.

    Raises:
        ArtifactError: One of them is neither.
    """
    found: list[Source] = []
    for path in paths:
        if path.is_dir() and not _looks_like_one(path) and not (path / MANIFEST_NAME).is_file():
            inside_it = _distinct(open_source(each, key) for each in find_sources(path))
            found += [inside_it[i] for i in oldest_first(inside_it)]
        else:
            found.append(open_source(path, key))
    return found


def run_sources(paths: Sequence[Path], key: str | None = None, last: int | None = None) -> list[Source]:
    """Open the checkpoints of a run, oldest first, one a step.

    Args:
        paths: Checkpoints, and directories of them.
        key: As ``open_source``.
        last: Use the newest so many.

    Raises:
        ArtifactError: One of them does not tell its step, two of one step hold different weights, or there are fewer
            than two.
    """
    opened = open_sources(paths, key)
    for source in opened:
        if source.step is None:
            raise ArtifactError(
                f"a checkpoint must tell its step, got {source.path}, which holds none and has none in its name. "
                "Rename it, such as `step=1000.safetensors`, or move it away."
            )
    sources = _distinct(opened[i] for i in oldest_first(opened))
    sources = sources[-last:] if last is not None else sources
    if len(sources) < 2:
        places = ", ".join(map(str, paths))
        found = f"{len(sources) or 'none'} in {places}" if places else "none"
        raise ArtifactError(f"a search needs two checkpoints or more, got {found}. Name more, or a directory of them.")
    return sources


def oldest_first(sources: Sequence[Source]) -> list[int]:
    """Return the places of the sources in the order of their steps; in their own, unless each tells its step."""
    places = range(len(sources))
    steps = [s.step for s in sources if s.step is not None]
    return sorted(places, key=lambda i: steps[i]) if len(steps) == len(sources) else list(places)


def _distinct(sources: Iterable[Source]) -> list[Source]:
    """Return one source a step; sources without a step stay."""
    by_step: dict[int | Path, Source] = {}
    for source in sources:
        first = by_step.setdefault(source.path if source.step is None else source.step, source)
        if first is not source and (name := _difference(first, source)):
            raise ArtifactError(
                f"checkpoints of one step must hold the same weights, got {first.path} and {source.path}, both of step "
                f"{source.step}, which differ in {name}. Name the checkpoints of one run."
            )
    return list(by_step.values())


def _difference(one: Source, other: Source) -> str | None:
    """Return the first name that stands for other bits in the one than in the other."""
    from lightning_ckmerge.core.layout import raw_bytes

    names = () if one.path.resolve() == other.path.resolve() else sorted(one.specs.keys() & other.specs.keys())
    for name in names:
        if one.specs[name] != other.specs[name] or raw_bytes(one.weights[name]) != raw_bytes(other.weights[name]):
            return name
    return None


def _looks_like_one(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (*TORCH_SUFFIXES, ".safetensors")
    return any((path / name).is_file() for name in (METADATA_NAME, INDEX_NAME, SINGLE_NAME))


def read_torch(path: Path) -> Any:
    """Return the contents of a torch file, tensors mapped.

    Raises:
        ArtifactError: It is damaged, or needs code to be loaded.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"a checkpoint must hold tensors and plain data alone, got {_refused(error)} in {path}. Save it again with "
            "`save_weights_only=True` and plain hyperparameters, or write its `state_dict` to safetensors where you "
            "trust the file."
        ) from error
    except Exception as error:  # whatever damage makes of the parts that are read first
        raise ArtifactError(
            f"a checkpoint must be a file that `torch.save` wrote (torch 1.6 or newer), got {path}: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}. Restore it from a copy."
        ) from error


def _open_torch(path: Path, key: str | None) -> Source:
    import torch

    from lightning_ckmerge.core.layout import find_aliases, tensor_spec

    content = read_torch(path)
    state = _entry(content, key, path)
    weights = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    step = content.get("global_step") if isinstance(content, Mapping) else None
    return Source(
        path=path,
        kind="torch",
        weights=weights,
        reader=WholeReader(weights),
        specs={name: tensor_spec(t.shape, t.dtype) for name, t in weights.items()},
        aliases=find_aliases(weights),
        files=(path,),
        step=step if isinstance(step, int) else _named_step(path),
        is_lightning=isinstance(content, Mapping) and "pytorch-lightning_version" in content,
    )


def _entry(content: Any, key: str | None, path: Path) -> Mapping[str, Any]:
    """Return the part of a torch file that holds the weights."""
    import torch

    if isinstance(content, Mapping):
        keys = [key] if key else [LIGHTNING_KEYS[0]]
        for name in keys:
            if isinstance(content.get(name), Mapping):
                return {n: t for n, t in content[name].items() if isinstance(n, str)}
        if key is None and any(isinstance(t, torch.Tensor) for t in content.values()):
            return {n: t for n, t in content.items() if isinstance(n, str)}
    entries = (
        ", ".join(k for k in content if isinstance(k, str))[:200]
        if isinstance(content, Mapping)
        else type(content).__name__
    )
    raise ArtifactError(
        f"a checkpoint must hold its weights under {key or LIGHTNING_KEYS[0]!r}, got {entries} in {path}. "
        "Name the entry with `--key`."
    )


def _open_safetensors(path: Path, kind: str, files: Sequence[Path], step: int | None = None) -> Source:
    weights = StoredWeights(files)
    return Source(
        path=path,
        kind=kind,
        weights=weights,
        reader=weights,
        specs={name: weights.spec(name) for name in weights},
        aliases=weights.aliases,
        files=tuple(files),
        step=_named_step(path) if step is None else step,
    )


def _open_distributed(path: Path, key: str | None) -> Source:
    from lightning_ckmerge.checkpoints.distributed import DistributedWeights

    # Lightning writes everything but tensors beside the shards.
    is_lightning = (path / "meta.pt").is_file()
    weights = DistributedWeights(path, (key,) if key else LIGHTNING_KEYS if is_lightning else ("",))
    return Source(
        path=path,
        kind="distributed",
        weights=weights,
        reader=WholeReader(weights),
        specs=weights.specs,
        aliases={},
        files=tuple(sorted(p for p in path.iterdir() if p.suffix == ".distcp" or p.name == METADATA_NAME)),
        step=_lightning_step(path / "meta.pt") if is_lightning else _named_step(path),
    )


def _lightning_step(meta: Path) -> int | None:
    """Return the step that Lightning keeps beside the shards, else the one in the directory's name."""
    import torch

    try:
        content = torch.load(meta, map_location="cpu", weights_only=True)
    except Exception:  # its contents need code, or are damaged: the name must do
        content = None
    step = content.get("global_step") if isinstance(content, Mapping) else None
    return step if isinstance(step, int) else _named_step(meta.parent)


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    try:
        names = sorted(set(read_json(index, allow_nan=True)["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"an index must map tensors to files under `weight_map`, got {index}. Restore it from a copy."
        ) from error
    return [inside(directory, name) for name in names]


def _named_step(path: Path) -> int | None:
    """The last number in a name that follows ``step``, ``iter`` or ``checkpoint``: ``epoch=0-step=200.ckpt``."""
    steps = STEP.findall(path.name)
    return int(steps[-1]) if steps else None


def _refused(error: Exception) -> str:
    """The object that the restricted unpickler refused, as far as its message tells."""
    match = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
    return f"`{match[1]}`" if match else "something else"
