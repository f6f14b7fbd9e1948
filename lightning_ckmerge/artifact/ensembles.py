"""Ensembles on disk: a directory a member, of safetensors, and ``ensemble.json``. Published by one rename.

Nothing is unpickled; every file is checked, by size and SHA-256, before use.

Letters: M members.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonschema.exceptions import best_match

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import Manifest, software, with_whole_numbers
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import FileRecord, file_record, new_directory
from lightning_ckmerge.tensorfiles.untrusted import inside, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_ckmerge.core.specs import TensorSpec
    from lightning_ckmerge.search.averaging import Averaging
    from lightning_ckmerge.tensorfiles.reader import StoredWeights

ENSEMBLE_NAME = "ensemble.json"
PAGE_NAME = "ensemble.html"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EnsembleArtifact:
    """A published ensemble.

    Args:
        path: The directory.
        manifest: Its checked ``ensemble.json``.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> EnsembleArtifact:
        """Return the ensemble at ``path``, its members' files checked.

        The page for people is no part of it: one that is lost or changed is for ``ckmerge verify`` to find.

        Args:
            path: Its directory.
            verify: Compare each file's SHA-256. Sizes, names and the manifest are checked in any case.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        found = cls.read(path)
        needed = {name: record for name, record in found.manifest["files"].items() if name != PAGE_NAME}
        Artifact(found.path, {"files": needed}).check_files(verify=verify)
        return found

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> EnsembleArtifact:
        """Return the ensemble at ``path``, of which the manifest alone is checked.

        Raises:
            ArtifactError: There is none, or its manifest is damaged.
        """
        directory = Path(path).resolve()
        return cls(directory, _read(directory))

    @property
    def weights(self) -> tuple[float, ...]:
        """The M members' weights in the average."""
        return tuple(member["weight"] for member in self.manifest["members"])

    @property
    def averaging(self) -> Averaging:
        """How outputs are averaged."""
        averaging: Averaging = self.manifest["averaging"]
        return averaging

    def tensors(self, member: int) -> StoredWeights:
        """Return a member's weights by name; a tensor is read when it is asked for."""
        from lightning_ckmerge.tensorfiles.reader import StoredWeights

        return StoredWeights([inside(self.path, name) for name in self.weights_files(member)])

    def weights_files(self, member: int) -> list[str]:
        """Return the names of the files that hold a member's weights."""
        return _weights_files(self.manifest, self.manifest["members"][member])


def is_ensemble(path: Path) -> bool:
    """Whether a directory holds an ensemble, damaged or not."""
    return (path / ENSEMBLE_NAME).is_file()


def publish_ensemble(
    out: Path,
    states_M: Sequence[Mapping[str, Tensor]],
    manifest: Manifest,
    max_shard_size: int,
    render: Callable[[Manifest], str | None] = lambda manifest: None,
) -> EnsembleArtifact:
    """Write an ensemble, and return it; a crash leaves nothing at ``out``.

    Args:
        out: What there will be; must not exist.
        states_M: M members' weights.
        manifest: All but ``schema_version``, ``created``, ``files``, ``software`` and the members' ``directory``.
        max_shard_size: Bytes above which a member is split over several files.
        render: Called with the manifest, complete but for the page; returns the page for people, or ``None``.

    Raises:
        ArtifactError: ``out`` exists, or safetensors cannot hold one of the tensors.
    """
    from lightning_ckmerge.artifact.weights import write_weights

    with new_directory(out) as staging:
        files: dict[str, FileRecord] = {}
        members = []
        for m, (state, member) in enumerate(zip(states_M, manifest["members"], strict=True)):
            directory = f"member-{m}"
            (staging / directory).mkdir()
            written = write_weights(staging / directory, _StateWeights(state), max_shard_size)
            files.update({f"{directory}/{name}": record for name, record in written.items()})
            members.append({**member, "directory": directory})
        complete = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **_finite(manifest),
            "members": members,
            "files": files,
            "software": software(),
        }
        _check(complete, ENSEMBLE_NAME)
        if (page := render(complete)) is not None:
            (staging / PAGE_NAME).write_text(page, encoding="utf-8")
            files[PAGE_NAME] = file_record(staging / PAGE_NAME)
        text = json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (staging / ENSEMBLE_NAME).write_text(text, encoding="utf-8")
    return EnsembleArtifact(out.resolve(), complete)


class _StateWeights:
    """Weights at hand, to be written."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        from lightning_ckmerge.core.layout import tensor_spec

        self._state = state
        self.specs: Mapping[str, TensorSpec] = {n: tensor_spec(t.shape, t.dtype) for n, t in sorted(state.items())}
        self.aliases: Mapping[str, str] = {}

    def gather(self, name: str) -> Tensor:
        return self._state[name]


def _read(directory: Path) -> Manifest:
    path = directory / ENSEMBLE_NAME
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"an ensemble must be a directory with a readable {ENSEMBLE_NAME}, got {directory}: {error}. Name the "
            "directory that `build_ensemble` or `ckmerge ensemble` wrote."
        ) from error
    _check(manifest, str(path))
    return dict(manifest)


def _check(manifest: Any, source: str) -> None:
    error = best_match(_validator().iter_errors(manifest))
    fault = None if error is None else (error.json_path, error.message)
    if fault is None and abs(math.fsum(m["weight"] for m in manifest["members"]) - 1) > 1e-6:
        fault = "$.members", "the members' weights sum to 1"
    if fault is None and (bare := [m["directory"] for m in manifest["members"] if not _weights_files(manifest, m)]):
        fault = "$.files", f"it lists no weights in {bare[0]}"
    if fault is not None:
        path, rule = fault
        raise ArtifactError(
            f"{source}: `{path}` must follow the schema of ensembles, got another value ({rule[:160]}). Build the "
            "ensemble again, and do not edit it by hand."
        )


def _weights_files(manifest: Manifest, member: Mapping[str, Any]) -> list[str]:
    start = f"{member['directory']}/"
    return sorted(n for n in manifest["files"] if n.startswith(start) and n.endswith(".safetensors"))


@cache
def _validator() -> Any:
    schema = resources.files("lightning_ckmerge.artifact").joinpath("ensemble.schema.json").read_text(encoding="utf-8")
    return with_whole_numbers(json.loads(schema))


def _finite(node: Any) -> Any:
    """JSON has no infinities and no NaN."""
    if isinstance(node, float):
        return node if math.isfinite(node) else None
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return [_finite(value) for value in node] if isinstance(node, (list, tuple)) else node
