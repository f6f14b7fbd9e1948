"""``manifest.json``: how an artifact was made. Checked by ``manifest.schema.json`` when written and when read."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import best_match

from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.core.outcome import Score, Scored, SearchOutcome, SnapshotRecord, Verdict
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.untrusted import parse_json, read_bytes

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
# Of 32 bytes each.
MAX_REMEMBERED = 1 << 14

Manifest = dict[str, Any]
DISTRIBUTIONS = {
    "lightning_ckmerge": "lightning-ckmerge",
    "torch": "torch",
    "lightning": "lightning",
    "optuna": "optuna",
    "safetensors": "safetensors",
}


def build_manifest(outcome: SearchOutcome) -> Manifest:
    """Return the manifest of a search, all but ``files``, which publishing fills in.

    JSON has no infinities and no NaN: a score or gain that is not finite becomes ``null``.
    """
    winner = outcome.winner

    def record(t: Scored) -> dict[str, Any]:
        return _scored(t, outcome.anchors[0], sign_of(outcome.mode))

    manifest: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": outcome.step,
        "monitor": outcome.monitor,
        "mode": outcome.mode,
        "verdict": _verdict(outcome.verdict, winner),
        "space": outcome.space,
        "coordinates": winner.candidate.coordinates,
        "snapshots": [_snapshot(s) for s in outcome.snapshots_K],
        "coefficients": list(winner.candidate.coefficients_K),
        "anchors": [record(t) for t in outcome.anchors],
        "trials": [record(t) for t in outcome.trials],
        "evaluation": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(outcome.evaluation).items()},
        "cost": dict(vars(outcome.cost), seconds=dict(outcome.cost.seconds)),
        "software": software(),
    }
    if by_group := winner.candidate.by_group:
        manifest["groups"] = {
            group: {"coefficients": list(c_K), "tensors": [n for n, g in outcome.group_of.items() if g == group]}
            for group, c_K in by_group.items()
        }
    return manifest


def coefficients_of(manifest: Manifest) -> Callable[[str], list[float]]:
    """Return a function from a tensor's name to its K coefficients."""
    shared: list[float] = manifest["coefficients"]
    own: dict[str, list[float]] = {
        name: group["coefficients"] for group in manifest.get("groups", {}).values() for name in group["tensors"]
    }
    return lambda name: own.get(name, shared)


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write ``manifest.json`` into ``directory``, and return its path.

    Raises:
        ArtifactError: It does not follow the schema.
    """
    check_manifest(manifest, MANIFEST_NAME)
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_manifest(directory: Path) -> Manifest:
    """Return the checked manifest of an artifact.

    Raises:
        ArtifactError: It is missing, is no JSON, or does not follow the schema.
    """
    path = directory / MANIFEST_NAME
    try:
        data = read_bytes(path)
        manifest = parse_json(data)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"an artifact must hold a readable {MANIFEST_NAME}, got {path}: {error}. Restore it from a copy, or use "
            "another artifact."
        ) from error
    # A run reads the manifests of all its artifacts at every search, and checking one takes as long as a batch.
    digest, sound = hashlib.sha256(data).digest(), _sound()
    if digest not in sound:
        check_manifest(manifest, str(path))
        if len(sound) >= MAX_REMEMBERED:
            sound.clear()
        sound.add(digest)
    return dict(manifest)


@cache
def _sound() -> set[bytes]:
    """The SHA-256 of the manifests that this process has found sound."""
    return set()


def check_manifest(manifest: object, source: str) -> None:
    """Raise ``ArtifactError``, naming ``source`` and the JSON path, unless ``manifest`` follows the schema."""
    if (fault := _find_fault(manifest)) is not None:
        path, value, rule = fault
        raise ArtifactError(
            f"{source}: `{path}` must follow the manifest's schema, got {_shorten(repr(value))} ({_shorten(rule)}). "
            "Read it with the version of lightning-ckmerge that its `software` names, and do not edit it by hand."
        )


def _find_fault(manifest: object) -> tuple[str, object, str] | None:
    """Return the JSON path, the value and the rule of the most telling fault, if there is one."""
    error = best_match(_validator().iter_errors(manifest))
    if error is not None:
        return error.json_path, error.instance, error.message
    if not_finite := _find_not_finite(manifest, "$"):
        return *not_finite, "JSON has no such number"
    if isinstance(manifest, dict) and (uneven := _find_uneven(manifest)):
        return *uneven, f"one for each of {len(manifest['snapshots'])} snapshots"
    return None


@cache
def _validator() -> Any:
    schema = resources.files("lightning_ckmerge.artifact").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    return with_whole_numbers(json.loads(schema))


def with_whole_numbers(schema: dict[str, Any]) -> Any:
    """Return a validator for which 2.0 is no integer, as it is none to Python."""
    whole = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda checker, value: type(value) is int)
    return validators.extend(Draft202012Validator, type_checker=whole)(schema)  # type: ignore[no-untyped-call]


def _verdict(verdict: Verdict, winner: Scored) -> dict[str, Any]:
    return {
        "status": verdict.status,
        "winner": winner.candidate.name,
        "value": _finite(winner.confirm.value) if winner.confirm else None,
        "gain": _finite(verdict.gain),
        "interval": _interval(verdict.interval),
        "num_differences": verdict.num_differences,
        "best_anchor": verdict.best_anchor,
        "gain_over_best_anchor": _finite(verdict.gain_over_best_anchor),
        "interval_over_best_anchor": _interval(verdict.interval_over_best_anchor),
        "equivalent_steps": verdict.equivalent_steps,
        "others": [
            {**vars(g), "value": _finite(g.value), "gain": _finite(g.gain), "interval": _interval(g.interval)}
            for g in verdict.others
        ],
        "front": list(verdict.front),
        "sentence": verdict.sentence,
        "warnings": list(verdict.warnings),
    }


def _scored(scored: Scored, latest: Scored, sign: int) -> dict[str, Any]:
    # Reading manifests needs no SciPy, which takes seconds to import.
    from lightning_ckmerge.search.interval import score_gain

    gain, interval = (None, None) if scored is latest else score_gain(scored.search, latest.search, sign)
    return {
        "name": scored.candidate.name,
        "coefficients": list(scored.candidate.coefficients_K),
        "coordinates": scored.candidate.coordinates,
        "search": _score(scored.search),
        "search_gain": _finite(gain) if gain is not None else None,
        "search_interval": _interval(interval),
        "confirm": _score(scored.confirm) if scored.confirm else None,
        "feasible": scored.feasible,
    }


def _snapshot(snapshot: SnapshotRecord) -> dict[str, Any]:
    record = dict(vars(snapshot))
    files_sha256 = record.pop("files_sha256")
    return {**record, "files_sha256": list(files_sha256)} if files_sha256 else record


def _score(score: Score) -> dict[str, Any]:
    return {
        "value": _finite(score.value),
        "metrics": {name: _finite(value) for name, value in score.metrics.items()},
        "num_batches": score.num_batches,
        "complete": score.complete,
    }


def _interval(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval and all(map(math.isfinite, interval)) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _find_uneven(manifest: Manifest) -> tuple[str, list[float]] | None:
    """Where there are more or fewer coefficients than snapshots."""
    named = {"$.coefficients": manifest["coefficients"]}
    named |= {f"$.groups.{name}.coefficients": g["coefficients"] for name, g in manifest.get("groups", {}).items()}
    return next(((path, c_K) for path, c_K in named.items() if len(c_K) != len(manifest["snapshots"])), None)


def _find_not_finite(node: object, path: str) -> tuple[str, float] | None:
    if isinstance(node, float) and not math.isfinite(node):
        return path, node
    items: list[tuple[str, object]] = []
    if isinstance(node, dict):
        items = [(f"{path}.{key}", value) for key, value in node.items()]
    elif isinstance(node, list):
        items = [(f"{path}[{i}]", value) for i, value in enumerate(node)]
    return next((found for p, value in items if (found := _find_not_finite(value, p))), None)


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def software() -> dict[str, str | None]:
    """Return the versions of an artifact's dependencies; ``None`` for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            # Run from a source tree, or beside the `pytorch_lightning` package instead of `lightning`.
            versions[name] = None
    return versions
