"""The command that merges: ``merge``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckmerge.cli.console import console, hash_files, print_json, progress, table
from lightning_ckmerge.cli.options import Json, Key, MaxShardSize, Out, require_absent

if TYPE_CHECKING:
    from lightning_ckmerge.artifact.offline import Method
    from lightning_ckmerge.artifact.sources import Source


def merge(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Oldest first: Lightning .ckpt, torch or .safetensors files, Hugging Face or distributed checkpoint "
            "directories, artifacts.",
        ),
    ],
    out: Out,
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number a checkpoint, such as 1,1,2; divided by their sum.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", help="uniform, ema:TAU, linear, minus-sqrt, power:P or slerp:T; TAU in checkpoints."
        ),
    ] = None,
    key: Key = None,
    max_shard_size: MaxShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Merge checkpoints on disk into a new directory of safetensors, block by block.

    Memory stays at a few MB (slerp: at a few of the largest tensors). Integers come from the newest checkpoint, shared
    tensors stay shared. The recipe, with the inputs' SHA-256, is written to recipe.json and into each file's header.

    \b
    Examples:
      ckmerge merge runs/gpt/checkpoints/step=*00.ckpt --schedule minus-sqrt --out merged
      ckmerge merge old/ new/ --weights 0.4,0.6 --out merged
      ckmerge merge old.ckpt new.ckpt --schedule slerp:0.5 --out merged
    """
    from lightning_ckmerge.artifact.offline import MergedWeights, build_recipe, write_merge
    from lightning_ckmerge.artifact.sources import open_source
    from lightning_ckmerge.config import parse_size
    from lightning_ckmerge.report.text import size

    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    method = _method(weights, schedule, len(checkpoints))
    require_absent(out)
    sources_K = [open_source(path, key) for path in checkpoints]
    # Refuses what does not fit, before anything is hashed.
    preparing = threading.Thread(target=MergedWeights(sources_K, method).prepare)
    preparing.start()
    records = hash_files([file for source in sources_K for file in source.files], "Hashing the checkpoints")
    preparing.join()
    recipe = build_recipe(sources_K, method, [s.named(records) for s in sources_K])
    total = sum(spec.nbytes for spec in sources_K[-1].specs.values())
    with progress("Merging", total, is_bytes=True) as advance:
        merged = MergedWeights(sources_K, method, advance)
        complete = write_merge(out, merged, recipe, max_shard_size=shard_bytes, copies=_side_files(sources_K[-1]))
    if as_json:
        print_json({"out": str(out), **complete})
        return
    rows = [
        (str(source.path), source.kind, "" if source.step is None else str(source.step), f"{c:+.4f}")
        for source, c in zip(sources_K, complete["coefficients"], strict=True)
    ]
    console().print(table(("checkpoint", "kind", "step", "coefficient"), rows))
    console().print(f"{out}: {len(merged.specs)} tensors, {size(merged.num_bytes)}")


def _method(weights: str | None, schedule: str | None, num_checkpoints: int) -> Method:
    from lightning_ckmerge.artifact.offline import Method
    from lightning_ckmerge.core.schedules import parse_schedule
    from lightning_ckmerge.errors import ConfigError

    if (weights is None) == (schedule is None):
        given = "both" if weights is not None else "neither"
        raise ConfigError(f"one of --weights and --schedule must be given, got {given}. Try --schedule uniform.")
    if schedule is not None:
        parsed = parse_schedule(schedule)
        name = "slerp" if parsed.name == "slerp" else "linear"
        return Method(name=name, weights_K=parsed.coefficients(num_checkpoints), schedule=schedule)
    assert weights is not None
    try:
        return Method(name="linear", weights_K=tuple(float(w) for w in weights.split(",")))
    except ValueError as error:
        raise ConfigError(f"--weights must be numbers with commas between, got {weights!r}.") from error


def _side_files(source: Source) -> list[Path]:
    """What `from_pretrained` wants beside the weights, where the newest checkpoint has it."""
    from lightning_ckmerge.artifact.hub import side_files

    return side_files(source.path) if source.kind == "huggingface" else []
