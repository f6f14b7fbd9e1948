"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def local(path: str) -> Path:
    """Return a local path, or that of a copy where the argument is a URL."""
    from lightning_ckmerge.artifact.remote import local_copy

    return local_copy(path)


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ArtifactPath = Annotated[
    Path,
    typer.Argument(
        metavar="ARTIFACT",
        parser=local,
        help="An artifact (step=...), a run's `best`, or a run, for its best; or the URL of one.",
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="DIR", parser=local, help="The callback's dirpath, or its URL.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.")]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weights file.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Entry of a checkpoint that holds the weights, where it is not Lightning's."),
]
