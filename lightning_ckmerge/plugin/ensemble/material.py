"""What an ensemble is made of: checkpoints on disk, or a run's kept snapshots and published merges.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, read_manifest
from lightning_ckmerge.artifact.runs import find_run, run_of
from lightning_ckmerge.checkpoints.formats import Source, WholeReader, open_source
from lightning_ckmerge.checkpoints.rebuild import find_snapshot
from lightning_ckmerge.core.layout import tensor_spec
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.specs import TensorSpec
from lightning_ckmerge.errors import ArtifactError, SnapshotError
from lightning_ckmerge.plugin.offline.search import find_sources

FRONT = "front"
BUFFER = "buffer"


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is merged, and what has been merged already.

    Args:
        sources: K checkpoints or snapshots; the last one is the latest weights.
        segments: What each but the last stands for; ``None``: the weights at its step.
        artifacts: A run's published merges that hold weights, by name.
        notes: What people should know.
    """

    sources: list[Source]
    segments: list[Segment] | None
    artifacts: dict[str, Artifact]
    notes: tuple[str, ...] = ()


def find_material(
    source: str | Path | Sequence[str | Path],
    module: LightningModule,
    *,
    latest: str | Path | None = None,
    key: str | None = None,
    last: int | None = None,
) -> Material:
    """Return what ``source`` names.

    Args:
        source: Checkpoints, directories of them or patterns; or the directory of a run that the callback has written,
            one of its artifacts, or its ``best``.
        module: Of a run: its weights are the latest, unless ``latest`` is given.
        latest: Of a run: a checkpoint of the latest weights.
        key: The entry that holds the weights in a torch file, where it is not Lightning's.
        last: Use the newest so many.

    Raises:
        ArtifactError: Nothing can be read there.
        SnapshotError: The run keeps no snapshots of its newest search.
    """
    run = _run_at(Path(source)) if isinstance(source, (str, os.PathLike)) else None
    if run is None:
        return Material(sources=find_sources(source, key, last), segments=None, artifacts={})
    return _run_material(run, module, latest, key, last)


def _run_at(path: Path) -> Path | None:
    """Return the directory of the run that a path names, if it names one."""
    found = path.resolve().parent if (path / MANIFEST_NAME).is_file() else find_run(run_of(path))
    return found if any(found.glob(f"step=*/{MANIFEST_NAME}")) else None


def _run_material(
    run: Path, module: LightningModule, latest: str | Path | None, key: str | None, last: int | None
) -> Material:
    artifacts = _artifacts(run)
    newest = max(artifacts.values(), key=lambda a: int(a.manifest["step"]))
    own = latest_source(module, newest) if latest is None else open_source(Path(latest), key)
    shapes = {name: spec.shape for name, spec in own.specs.items()}
    kept, missing = list[tuple[Segment, Source]](), 0
    for record in newest.manifest["snapshots"][:-1]:
        hashes = record.get("files_sha256", [record["sha256"]])
        weights = find_snapshot(run / BUFFER, (), record["last_step"], hashes, shapes)
        if isinstance(weights, int):
            missing += 1
            continue
        segment = Segment(**{n: record[n] for n in ("kind", "first_step", "last_step", "num_updates")})
        specs = {name: tensor_spec(weights[name].shape, weights[name].dtype) for name in weights}
        place = run / BUFFER / f"step={segment.last_step:09d}"
        kept.append((segment, _source(place, "safetensors", weights, specs, segment.last_step)))
    if last is not None:
        kept = kept[-last + 1 :]
    if not kept:
        raise SnapshotError(
            f"an ensemble of a run needs snapshots of its newest search, of step {newest.manifest['step']}, got none "
            f'in {run / BUFFER}. Name its checkpoints instead: the buffer is kept with `buffer.storage` "disk".'
        )
    notes = [f"{missing} snapshots of the newest search are no longer kept."] if missing else []
    with_weights = {name: a for name, a in artifacts.items() if a.has_weights}
    for artifact in with_weights.values():
        artifact.check_files()
    return Material(
        sources=[*(source for _, source in kept), own],
        segments=[segment for segment, _ in kept],
        artifacts=with_weights,
        notes=tuple(notes),
    )


def _artifacts(run: Path) -> dict[str, Artifact]:
    """Return the run's artifacts, and those of their Pareto fronts, by name, oldest first."""
    paths = sorted(run.glob(f"step=*/{MANIFEST_NAME}")) + sorted(run.glob(f"step=*/{FRONT}/*/{MANIFEST_NAME}"))
    found = {p.parent.relative_to(run).as_posix(): p.parent for p in paths if not p.parent.is_symlink()}
    return {name: Artifact(path.resolve(), read_manifest(path)) for name, path in found.items()}


def latest_source(module: LightningModule, newest: Artifact) -> Source:
    """Return a copy of the module's weights, which count as those of the newest search's step.

    Raises:
        ArtifactError: They are not on a device.
    """
    state = {n: t.detach().clone() for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    if any(t.is_meta for t in state.values()):
        raise ArtifactError("the latest weights must be at hand, got a module on the meta device. Pass `latest`.")
    specs = {name: tensor_spec(t.shape, t.dtype) for name, t in state.items()}
    return _source(newest.path.parent / "latest", "module", state, specs, int(newest.manifest["step"]))


def _source(
    path: Path, kind: str, weights: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], step: int
) -> Source:
    return Source(
        path=path, kind=kind, weights=weights, reader=WholeReader(weights), specs=specs, aliases={}, files=(), step=step
    )
