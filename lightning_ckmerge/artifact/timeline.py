"""``timeline.jsonl``: one record a search, appended; the run's history of merges at a glance.

A search that did not take place, or was given up, leaves a record too: its ``status`` is ``SKIPPED``, ``reason`` says
why, and it names no artifact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.core.objectives import Mode
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.untrusted import parse_json, read_bytes

TIMELINE_NAME = "timeline.jsonl"

SKIPPED = "skipped"
# A hundred thousand searches.
MAX_TIMELINE_BYTES = 512 << 20

Validated = tuple[int, float]
Kind = Callable[[Any], bool]
NEEDED = {"step", "monitor", "mode", "gain", "interval", "winner", "values", "artifact", "cost", "validation"}


def no_searches(dirpath: str, remedy: str) -> ArtifactError:
    """Return the error for a directory, as it is shown, without a search."""
    return ArtifactError(f"a run's directory must hold a {TIMELINE_NAME} with a search, got {dirpath}. {remedy}")


def timeline_record(manifest: Manifest, artifact: str, validation: Sequence[Validated] = ()) -> dict[str, Any]:
    """Return a search's record: its verdict, and the confirmation half's value of each candidate measured there.

    Args:
        manifest: The search's manifest.
        artifact: Name of the directory that it published.
        validation: Step and value of the run's own validations since the search before.
    """
    candidates = [*manifest["anchors"], *manifest["trials"]]
    verdict = manifest["verdict"]
    return {
        "run_id": manifest.get("run_id"),
        "step": manifest["step"],
        "monitor": manifest["monitor"],
        "mode": manifest["mode"],
        "status": verdict["status"],
        "gain": verdict["gain"],
        "interval": verdict["interval"],
        "equivalent_steps": verdict.get("equivalent_steps"),
        "winner": verdict["winner"],
        "best_anchor": verdict["best_anchor"],
        "values": {c["name"]: c["confirm"]["value"] for c in candidates if c["confirm"]},
        "artifact": artifact,
        "cost": manifest["cost"],
        "validation": [list(v) for v in validation],
    }


def skip_record(step: int, monitor: str, mode: Mode, reason: str, seconds: float) -> dict[str, Any]:
    """Return the record of a search that has no verdict.

    Args:
        step: When it was due.
        monitor: The metric.
        mode: Its mode.
        reason: Why it was skipped.
        seconds: The time that it took anyway.
    """
    return {
        "step": step,
        "monitor": monitor,
        "mode": mode,
        "status": SKIPPED,
        "reason": reason,
        "gain": None,
        "interval": None,
        "winner": None,
        "best_anchor": None,
        "values": {},
        "artifact": None,
        "cost": {"seconds": {"other": seconds}, "share_of_training": None},
        "validation": [],
    }


def append_timeline(dirpath: Path, record: dict[str, Any]) -> None:
    """Append one record. An unfinished last line, from a crash, is cut off first."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with (dirpath / TIMELINE_NAME).open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_timeline(dirpath: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a run's searches, oldest first; none if there was no search.

    Args:
        dirpath: The run's ``dirpath``, which holds ``timeline.jsonl``.

    Raises:
        ArtifactError: A finished line is no record.
    """
    path = Path(dirpath) / TIMELINE_NAME
    try:
        lines = read_bytes(path, max_bytes=MAX_TIMELINE_BYTES).split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except ValueError as error:
        raise ArtifactError(
            f"a timeline must be a file of one line a search, got {path}: {error}. Restore it from a copy, or remove "
            "it: the artifacts hold the same figures."
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise _bad_line(path, number, line) from error
        if not _is_record(record):
            raise _bad_line(path, number, line)
        records.append(record)
    return records


def check_whole(dirpath: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``ArtifactError`` unless each of a run's records has all that a list or a page shows."""
    for number, record in enumerate(records, start=1):
        if missing := sorted(NEEDED - record.keys()):
            raise ArtifactError(
                f"a record of a search must be whole, got line {number} of {dirpath / TIMELINE_NAME} without "
                f"{', '.join(missing)}. Read it with the version of lightning-ckmerge that wrote it."
            )


def _is_record(record: Any) -> bool:
    """Whether each entry that a record has is of the kind that it must be."""
    if not isinstance(record, dict) or not isinstance(record.get("status"), str):
        return False
    return all(is_kind(record[key]) for key, is_kind in KINDS.items() if key in record)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(is_kind: Kind) -> Kind:
    return lambda value: value is None or is_kind(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_cost(value: Any) -> bool:
    if not isinstance(value, dict) or not _or_none(_is_number)(value.get("share_of_training")):
        return False
    seconds = value.get("seconds")
    return isinstance(seconds, dict) and all(map(_is_number, seconds.values()))


KINDS: dict[str, Kind] = {
    "run_id": _or_none(_is_text),
    "step": _is_count,
    "monitor": _is_text,
    "mode": lambda value: value in ("min", "max"),
    "reason": _or_none(_is_text),
    "gain": _or_none(_is_number),
    "interval": _or_none(_is_pair),
    "equivalent_steps": _or_none(_is_number),
    "winner": _or_none(_is_text),
    "best_anchor": _or_none(_is_text),
    "values": lambda value: isinstance(value, dict) and all(map(_or_none(_is_number), value.values())),
    "artifact": _or_none(_is_text),
    "cost": _is_cost,
    "validation": lambda value: isinstance(value, list) and all(map(_is_pair, value)),
}


def _bad_line(path: Path, number: int, line: bytes) -> ArtifactError:
    return ArtifactError(
        f"each line of a timeline must be one search's record, got {line[:80]!r} in line {number} of {path}. Remove "
        "the line; the artifacts hold the same figures."
    )
