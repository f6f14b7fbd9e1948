"""The command that merges: ``merge``."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckmerge.cli.console import console, hash_files, print_json, progress, table
from lightning_ckmerge.cli.options import Json, Key, MaxShardSize, Out
from lightning_ckmerge.tensorfiles.durable import require_absent

if TYPE_CHECKING:
    from lightning_ckmerge.checkpoints.formats import Source
    from lightning_ckmerge.checkpoints.merge import MergedWeights, Method, Recipe

OUTPUT_SUFFIXES = (".safetensors", ".ckpt")
# Not a version's or a number's, as in `merged.v2` and `gpt-1.3b`, which directories may have.
FILE_ENDING = re.compile(r"\.(?!v\d)[A-Za-z]\w*")


def merge(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Lightning .ckpt, torch or .safetensors files, Hugging Face or distributed checkpoint directories, "
            "artifacts, or a directory of these. Taken by their steps, where each tells one, else oldest first.",
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
    """Merge checkpoints on disk, block by block: into a new directory, or the one file that --out names.

    A name in .safetensors is a file that `load_merged` opens, as it opens the directory; one in .ckpt a weights-only
    Lightning checkpoint with the hyper-parameters of the newest input. Memory stays at a few MB (slerp: at a few of the
    largest tensors; .ckpt: at the model). Integers come from the newest checkpoint, shared tensors stay shared. The
    recipe, with the inputs' SHA-256, is written to recipe.json and into each file's header.

    \b
    Examples:
      ckmerge merge runs/gpt/checkpoints/step=*00.ckpt --schedule minus-sqrt --out merged
      ckmerge merge runs/gpt/checkpoints --schedule uniform --out merged.ckpt
      ckmerge merge old/ new/ --weights 0.4,0.6 --out merged.safetensors
      ckmerge merge old.ckpt new.ckpt --schedule slerp:0.5 --out merged
    """
    from lightning_ckmerge.checkpoints.formats import open_sources
    from lightning_ckmerge.checkpoints.merge import MergedWeights, build_recipe
    from lightning_ckmerge.checks import parse_size

    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    require_absent(out)
    _check_suffix(out)
    sources_K, method = _in_order(open_sources(checkpoints, key), weights, schedule)
    # Refuses inputs that do not fit, before anything is hashed.
    preparing = threading.Thread(target=MergedWeights(sources_K, method).prepare)
    preparing.start()
    records = hash_files([file for source in sources_K for file in source.files], "Hashing the checkpoints")
    preparing.join()
    recipe = build_recipe(sources_K, method, [s.named(records) for s in sources_K])
    total = sum(spec.nbytes for spec in sources_K[-1].specs.values())
    with progress("Merging", total, is_bytes=True) as advance:
        merged = MergedWeights(sources_K, method, advance)
        complete = _write(out, merged, recipe, sources_K, shard_bytes)
    if as_json:
        print_json({"out": str(out), **complete})
    else:
        _print_merge(out, merged, complete, sources_K)


def _check_suffix(out: Path) -> None:
    """Raise ``ConfigError`` for the ending of a file that is not written, which would be a directory's name."""
    from lightning_ckmerge.errors import ConfigError

    if FILE_ENDING.fullmatch(out.suffix) and out.suffix not in OUTPUT_SUFFIXES:
        raise ConfigError(
            f"--out must name a directory, a .safetensors or a .ckpt file, got {str(out)!r}. Choose one of these "
            f"endings, or none, such as {out.stem}{OUTPUT_SUFFIXES[0]}."
        )


def _in_order(sources_K: list[Source], weights: str | None, schedule: str | None) -> tuple[list[Source], Method]:
    """Return the checkpoints oldest first, and how they are merged, each with its own weight."""
    from dataclasses import replace

    from lightning_ckmerge.checkpoints.formats import oldest_first

    method = _method(weights, schedule, len(sources_K))
    order = oldest_first(sources_K)
    # A schedule gives its coefficients to places; numbers were given to checkpoints.
    if weights is not None and len(method.weights_K) == len(order):
        method = replace(method, weights_K=tuple(method.weights_K[i] for i in order))
    return [sources_K[i] for i in order], method


def _write(out: Path, merged: MergedWeights, recipe: Recipe, sources_K: list[Source], shard_bytes: int) -> Recipe:
    from lightning_ckmerge.checkpoints.merge import newest_lightning, write_checkpoint, write_merge

    if out.suffix == ".ckpt":
        return write_checkpoint(out, merged, recipe, newest_lightning(sources_K))
    return write_merge(out, merged, recipe, max_shard_size=shard_bytes, copies=_side_files(sources_K[-1]))


def _print_merge(out: Path, merged: MergedWeights, complete: Recipe, sources_K: list[Source]) -> None:
    from lightning_ckmerge.report.text import size

    rows = [
        (str(source.path), source.kind, "" if source.step is None else str(source.step), f"{c:+.4f}")
        for source, c in zip(sources_K, complete["coefficients"], strict=True)
    ]
    console().print(table(("checkpoint", "kind", "step", "coefficient"), rows))
    by = "by step" if complete["order"] == "step" else "as given, since not every checkpoint tells its step"
    console().print(f"order: {by}, oldest first")
    for note in complete["notes"]:
        console().print(f"note: {note}", style="yellow")
    console().print(f"{out}: {len(merged.specs)} tensors, {size(merged.num_bytes)}")


def _method(weights: str | None, schedule: str | None, num_checkpoints: int) -> Method:
    from lightning_ckmerge.checkpoints.merge import Method
    from lightning_ckmerge.core.coefficient_schedules import parse_schedule
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
    """The files that `from_pretrained` wants beside the weights, where the newest checkpoint has them."""
    from lightning_ckmerge.checkpoints.hugging_face import side_files

    return side_files(source.path) if source.kind == "huggingface" else []
