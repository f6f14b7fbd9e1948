"""A run's whole history of merges, read from its ``dirpath``, for the report of the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.accounts import has_page
from lightning_ckmerge.artifact.load import best_target
from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from lightning_ckmerge.artifact.runs import find_run
from lightning_ckmerge.artifact.standing import Standing, read_standing
from lightning_ckmerge.artifact.timeline import SKIPPED, check_whole, no_searches, read_timeline
from lightning_ckmerge.tensorfiles.untrusted import inside


@dataclass(frozen=True, kw_only=True)
class History:
    """The searches of one run.

    Args:
        dirpath: Directory of the run's artifacts.
        timeline: A record a search, oldest first; at least one.
        manifests: Name of each artifact that is still there, and its checked manifest.
        best: Name of the best accepted artifact; ``None`` if there is none.
        standing: How it stands against the newest weights; ``None`` where that is not known.
        explained: Names of the artifacts that have the page of an account.
    """

    dirpath: Path = Path()
    timeline: list[dict[str, Any]]
    manifests: dict[str, Manifest]
    best: str | None
    standing: Standing | None = None
    explained: frozenset[str] = frozenset()


def read_history(dirpath: str | os.PathLike[str]) -> History:
    """Return the history of the run with artifacts in ``dirpath``: of several, of the one that started last.

    Raises:
        ArtifactError: There was no search, or a file is damaged.
    """
    return history_of(find_run(Path(os.path.abspath(dirpath))))


def history_of(dirpath: Path) -> History:
    """Return the history of the run whose own directory ``dirpath`` is, whatever other runs lie below it.

    Raises:
        ArtifactError: There was no search, or a file is damaged.
    """
    dirpath = Path(os.path.abspath(dirpath))  # the page's code must run anywhere
    timeline = read_timeline(dirpath)
    if not timeline:
        raise no_searches(
            str(dirpath),
            "Name the callback's `dirpath`, which is `merges/` in the logger's directory unless it was set.",
        )
    check_whole(dirpath, timeline)
    timeline = [record for record in timeline if record.get("run_id") == timeline[-1].get("run_id")]
    names = {r["artifact"] for r in timeline if r["status"] != SKIPPED and r["artifact"] is not None}
    target = best_target(dirpath)
    if target is not None and target.name not in names:
        target = None  # another run's, which shares the directory
    present = sorted(name for name in names if (inside(dirpath, name) / MANIFEST_NAME).is_file())
    return History(
        dirpath=dirpath,
        timeline=timeline,
        manifests={name: read_manifest(dirpath / name) for name in present},
        best=target.name if target is not None else None,
        standing=read_standing(dirpath) if target is not None else None,
        explained=frozenset(name for name in present if has_page(dirpath / name)),
    )
