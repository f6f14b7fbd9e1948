"""Builds an artifact's weights again from the snapshots that it names, and compares them bit for bit.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import coefficients_of
from lightning_ckmerge.buffer.sharded_snapshot import Shapes, SnapshotParts
from lightning_ckmerge.checkpoints.formats import Source
from lightning_ckmerge.core.adapters import fits, side_of, stack
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.core.specs import whole
from lightning_ckmerge.errors import SnapshotError
from lightning_ckmerge.tensorfiles.durable import file_record


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """How a rebuilt model compares with the artifact.

    Args:
        num_compared: Tensors that were built again.
        different: Tensors that are not equal, bit for bit.
        not_compared: Tensors that are no merge: they are the latest weights' (integers), or in no snapshot.
    """

    num_compared: int
    different: tuple[str, ...]
    not_compared: tuple[str, ...]


def rebuild(
    artifact: Artifact,
    buffer: Path,
    latest: Mapping[str, Tensor] | None = None,
    checkpoints: Sequence[Source] = (),
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Rebuilt:
    """Merge the kept snapshots with the artifact's coefficients, and compare, a tensor at a time.

    On another kind of device than the search ran on, sums may differ in the last bit.

    Args:
        artifact: Holds weights.
        buffer: The run's snapshots, of all ranks; found by their SHA-256.
        latest: The latest weights at that step, which no buffer keeps.
        checkpoints: The inputs of an offline search; found by their SHA-256.
        on_tensor: Called with the number of tensors done and their total.

    Raises:
        SnapshotError: A snapshot with a coefficient other than 0 is not there.
    """
    stored = artifact.tensors()
    kept_K = _kept(artifact, buffer, latest, checkpoints)
    coefficients = coefficients_of(artifact.manifest)
    names = [n for n in stored if all(n in kept for kept in kept_K.values()) and stored.spec(n).is_floating]
    _require_whole(artifact, names, list(kept_K.values()))
    different = []
    for done, name in enumerate(names, start=1):
        expected = stored[name]
        c_K = [coefficients(name)[k] for k in kept_K]
        built = _merged(name, [kept[name] for kept in kept_K.values()], c_K, expected)
        if not _same_bits(built, expected):
            different.append(name)
        on_tensor(done, len(names))
    # A tied tensor has one name in the snapshots.
    covered = {stored.aliases.get(name, name) for name in names}
    rest = sorted(name for name in stored if stored.aliases.get(name, name) not in covered)
    return Rebuilt(num_compared=len(names), different=tuple(different), not_compared=tuple(rest))


def _merged(name: str, tensors_K: Sequence[Tensor], c_K: Sequence[float], like: Tensor) -> Tensor:
    """Return one tensor of the merge, in the shape and precision of ``like``."""
    side = side_of(name)
    if side is not None and like.shape != tensors_K[0].shape:
        # Products were merged: in the model's precision first, as it held each snapshot.
        return stack(side, [t.to(like.dtype) for t in tensors_K], c_K)
    built = torch.empty_like(like, memory_format=torch.contiguous_format)
    # As for a buffer: parameters are finite, so that for them it makes no difference.
    merge_tensor(built, tensors_K, c_K, "buffer")
    return built


def _kept(
    artifact: Artifact, buffer: Path, latest: Mapping[str, Tensor] | None, checkpoints: Sequence[Source]
) -> dict[int, Mapping[str, Tensor]]:
    """Return the snapshots that count, by their place. Leaving out zeros changes no bit of a merge.

    Products that were merged have been stacked from just these.
    """
    manifest, stored = artifact.manifest, artifact.tensors()
    shapes = {name: stored.spec(name).shape for name in stored}
    rows = [group["coefficients"] for group in manifest.get("groups", {}).values()] or [manifest["coefficients"]]
    largest_K = [max(c_G, key=abs) for c_G in zip(*rows, strict=True)]
    kept_K: dict[int, Mapping[str, Tensor]] = {}
    missing = []
    for k, (snapshot, c) in enumerate(zip(manifest["snapshots"][:-1], largest_K, strict=False)):
        if c == 0:
            continue
        hashes = snapshot.get("files_sha256", [snapshot["sha256"]])
        found = find_snapshot(buffer, checkpoints, snapshot["last_step"], hashes, shapes)
        if isinstance(found, int):
            files = f", {found} of {len(hashes)} files" if found else ""
            missing.append(f"steps {snapshot['first_step']}-{snapshot['last_step']} (coefficient {c:.4g}{files})")
        else:
            kept_K[k] = found
    if largest_K[-1] != 0:
        if latest is not None:
            kept_K[len(largest_K) - 1] = latest
        else:
            missing.append(f"the latest weights (coefficient {largest_K[-1]:.4g})")
    if missing:
        raise SnapshotError(
            f"a rebuild needs every snapshot that counts, but these are not kept in {buffer}: {'; '.join(missing)}. "
            "Name a checkpoint of that step with `--latest` where the latest weights are missing, and an offline "
            "search's checkpoints with `--checkpoints`; the buffer of a run rolls on, so rebuild soon after a search."
        )
    return kept_K


def find_snapshot(
    buffer: Path, checkpoints: Sequence[Source], last_step: int, hashes: Sequence[str | None], shapes: Shapes
) -> Mapping[str, Tensor] | int:
    """Return the weights of the files with these hashes, else how many of them are there.

    A file's name, or a checkpoint's step, only narrows the search.

    Args:
        buffer: A run's snapshots, of all ranks.
        checkpoints: Other places to look.
        last_step: The snapshot's.
        hashes: SHA-256 of each of its files, as the manifest names them.
        shapes: Of each of the model's tensors.
    """
    for source in checkpoints:
        if source.step == last_step and [file_record(path)["sha256"] for path in source.files] == hashes:
            return source.weights
    candidates = sorted(buffer.rglob(f"*-{last_step:09d}-*.safetensors")) if any(hashes) else []
    by_hash = {file_record(path)["sha256"]: path for path in candidates}
    paths = [by_hash[h] for h in hashes if h in by_hash]
    return _Whole(paths, shapes) if len(paths) == len(hashes) else len(paths)


class _Whole(Mapping[str, Tensor]):
    """A snapshot's tensors, each put together from the parts in its files when it is asked for."""

    def __init__(self, paths: Sequence[Path], shapes: Shapes) -> None:
        self._parts = SnapshotParts(paths, None, shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._parts.assemble(name, whole(self._parts.shape(name)), self._parts.dtype(name))

    def __contains__(self, name: object) -> bool:
        return name in self._parts.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts.names)

    def __len__(self) -> int:
        return len(self._parts.names)


def _require_whole(artifact: Artifact, names: list[str], kept_K: list[Mapping[str, Tensor]]) -> None:
    stored = artifact.tensors()
    adapters = artifact.manifest.get("adapters", {"merge": "factors", "left_out": []})
    at_any_rank = adapters["merge"] == "products"

    def is_whole(name: str, tensor: Tensor) -> bool:
        return fits(name, tuple(tensor.shape), stored.spec(name).shape, at_any_rank=at_any_rank)

    partial = [n for n in names if not all(is_whole(n, kept[n]) for kept in kept_K)]
    # A checkpoint holds the base of adapters too.
    known = {*stored, *adapters["left_out"], *artifact.manifest.get("left_out", [])}
    others = [n for kept in kept_K for n in kept if n not in known]
    if partial or others or not names:
        raise SnapshotError(
            "a rebuild needs whole tensors of the artifact's model in the snapshots, got "
            f"{(partial or others or ['none of its names'])[0]!r}. Check the hashes alone."
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
