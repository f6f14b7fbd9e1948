"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ArtifactPath = Annotated[
    Path,
    typer.Argument(metavar="ARTIFACT", help="An artifact (step=...), a run's `best`, or a run, for its best."),
]
RunPath = Annotated[Path, typer.Argument(metavar="DIR", help="The callback's dirpath.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.")]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weights file.")]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Entry of a checkpoint that holds the weights, where it is not Lightning's."),
]
