"""The command that writes weights for others: ``export``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lightning_ckmerge.cli.console import console, print_json, progress, tell_choice
from lightning_ckmerge.cli.options import Json, Key, MaxShardSize, Out, local
from lightning_ckmerge.tensorfiles.durable import require_absent

if TYPE_CHECKING:
    from lightning_ckmerge.checkpoints.formats import Source

NUM_LISTED = 5


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            parser=local,
            help="An artifact, a run's `best`, or any checkpoint that merge reads; or the URL of an artifact.",
        ),
    ],
    out: Out,
    to: Annotated[Literal["hf"], typer.Option("--to", help="Hugging Face, for `from_pretrained`.")] = "hf",
    config_from: Annotated[
        Path | None,
        typer.Option("--config-from", help="Directory with the model's config.json, and its tokenizer if it has one."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="Prefix of the pretrained model's names, such as `model.`")
    ] = None,
    key: Key = None,
    max_shard_size: MaxShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Write a directory that Hugging Face's `from_pretrained` opens: weights, config, tokenizer, model card.

    The model is found among the LightningModule's names by its config (with transformers installed), or by --prefix.
    An artifact of PEFT's adapters needs neither: it becomes a directory that `PeftModel.from_pretrained` opens.

    \b
    Examples:
      ckmerge export runs/gpt/merges/best --to hf --config-from gpt2-small/ --out exported
      ckmerge export last.ckpt --to hf --config-from gpt2-small/ --prefix model. --out exported
    """
    from lightning_ckmerge.checkpoints.formats import SourceWeights, open_source
    from lightning_ckmerge.checkpoints.hugging_face import HubWeights, side_files, write_hub
    from lightning_ckmerge.checks import parse_size
    from lightning_ckmerge.tensorfiles.durable import list_files, new_directory

    shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    require_absent(out)
    opened = open_source(_resolved(source), key)
    choice = tell_choice(source, as_json=as_json)
    if adapters := _adapters_of(opened):
        _export_adapters(opened, adapters, out, choice, as_json)
        return
    config_dir = _config_directory(opened, config_from)
    found, kept = _find_model(opened, config_dir, _checked_prefix(opened, prefix))
    with progress("Exporting", sum(s.nbytes for s in opened.specs.values()), is_bytes=True) as advance:
        weights = HubWeights(SourceWeights(opened, advance), found, kept)
        with new_directory(out) as staging:
            write_hub(staging, weights, _card(opened), shard_bytes)
            for path in side_files(config_dir):
                shutil.copyfile(path, staging / path.name)
    num, left_out = len(weights.specs), len(opened.specs) - len(weights.specs)
    summary = {"out": str(out), "prefix": found, "config_from": str(config_dir), "tensors": num, "left_out": left_out}
    summary.update(choice)
    if as_json:
        print_json({**summary, "verdict": _verdict(opened), "files": list_files(out)})
        return
    rest = f", {left_out} others left out" if left_out else ""
    console().print(f"{out}: {num} tensors under {found!r}{rest}, config from {config_dir}")
    if (verdict := _verdict(opened)) not in (None, "accepted"):
        console().print(f"note: the search that made these weights ended {verdict}", style="yellow")


def _checked_prefix(source: Source, prefix: str | None) -> str | None:
    """Return the prefix with its dot; names must start with it."""
    from lightning_ckmerge.errors import ArtifactError

    if not prefix:
        return prefix
    whole = prefix if prefix.endswith(".") else f"{prefix}."
    if any(name.startswith(whole) for name in source.specs):
        return whole
    tops = sorted({f"{name.partition('.')[0]}." for name in source.specs if "." in name})
    raise ArtifactError(
        f"--prefix must start at least one weight's name, got {prefix!r}. The names start with "
        f"{', '.join(tops[:NUM_LISTED]) or 'no prefix'}; leave --prefix out where there is none."
    )


def _verdict(source: Source) -> str | None:
    """Return how the search ended whose artifact this is; ``None`` if no search made it."""
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, read_manifest

    if not (source.path / MANIFEST_NAME).is_file():
        return None
    status: str = read_manifest(source.path)["verdict"]["status"]
    return status


def _adapters_of(source: Source) -> dict[str, Any] | None:
    """The manifest's entry for adapters, where the source is an artifact that holds them alone."""
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, read_manifest

    return read_manifest(source.path).get("adapters") if (source.path / MANIFEST_NAME).is_file() else None


def _export_adapters(
    source: Source, adapters: dict[str, Any], out: Path, choice: dict[str, str], as_json: bool
) -> None:
    """Config and names are in the manifest."""
    from lightning_ckmerge.checkpoints.formats import SourceWeights
    from lightning_ckmerge.checkpoints.hugging_face import write_adapters
    from lightning_ckmerge.errors import ArtifactError
    from lightning_ckmerge.tensorfiles.durable import list_files, new_directory

    exported = adapters["peft"]
    if not exported:
        raise ArtifactError(
            f"the manifest must say how PEFT saves the adapters, got none of its names in {source.path}. Load the "
            "artifact with `load_merged`, and save the model with PEFT."
        )
    with new_directory(out) as staging:
        write_adapters(staging, SourceWeights(source), exported, _card(source))
    num_tensors = sum(len(parts["tensors"]) for parts in exported.values())
    if as_json:
        summary = {"out": str(out), "adapters": list(exported), "tensors": num_tensors, **choice}
        print_json({**summary, "files": list_files(out)})
    else:
        console().print(f"{out}: {num_tensors} tensors of {', '.join(exported)}, for `PeftModel.from_pretrained`")


def _resolved(path: Path) -> Path:
    """A run, or its `best` where links are refused, stands for its best artifact."""
    from lightning_ckmerge.artifact.load import locate
    from lightning_ckmerge.artifact.runs import is_first, list_runs, run_of

    return locate(path) if list_runs(run_of(path)) or is_first(path.parent) else path


def _config_directory(source: Source, given: Path | None) -> Path:
    from lightning_ckmerge.checkpoints.hugging_face import CONFIG_NAME, find_config
    from lightning_ckmerge.errors import ConfigError

    found = given if given is not None else find_config(source.path)
    if found is None or not (found / CONFIG_NAME).is_file():
        raise ConfigError(
            f"a model's {CONFIG_NAME} must be there to export it, got {found or 'none beside the weights'}. Name its "
            "directory with --config-from; `config.save_pretrained(DIR)` writes one."
        )
    return found


def _find_model(source: Source, config_dir: Path, prefix: str | None) -> tuple[str, Sequence[str] | None]:
    """Return the prefix, and the names that the file must hold, where the config's model is known."""
    from lightning_ckmerge.checkpoints.hugging_face import CONFIG_NAME, find_prefix
    from lightning_ckmerge.cli.pretrained import expected_tensors
    from lightning_ckmerge.errors import ArtifactError, ConfigError

    expected = expected_tensors(config_dir)
    if expected is None:
        if prefix is None:
            named = _read_mapping(config_dir / CONFIG_NAME).get("architectures")
            raise ConfigError(
                f"`architectures` in {config_dir / CONFIG_NAME} must name a model of an installed transformers, got "
                f"{named}. Install it, correct the entry, or pass --prefix, such as `model.`"
            )
        return prefix, None
    found = find_prefix([n for n in source.specs if prefix is None or n.startswith(prefix)], expected.kept)
    for name in expected.kept:
        if source.specs[f"{found}{name}"].shape != expected.shapes[name]:
            raise ArtifactError(
                f"the weights must have the shapes of the config's model, got {source.specs[found + name].shape} for "
                f"{expected.shapes[name]} in {name!r}. Name the config of the model that was trained."
            )
    return found, expected.kept


def _read_mapping(path: Path) -> dict[str, Any]:
    from lightning_ckmerge.errors import ArtifactError
    from lightning_ckmerge.tensorfiles.untrusted import read_json

    try:
        found = read_json(path, allow_nan=True)
    except ValueError as error:
        raise ArtifactError(f"{path.name} must be JSON, got {path}: {error}. Restore it from a copy.") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path.name} must hold a mapping, got {type(found).__name__} in {path}. Restore it.")
    return found


def _card(source: Source) -> str:
    from lightning_ckmerge.artifact.load import RECIPE_NAME
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, read_manifest
    from lightning_ckmerge.report.card import render_card, render_merge_card, render_source_card

    if (source.path / MANIFEST_NAME).is_file():
        return render_card(read_manifest(source.path))
    if (source.path / RECIPE_NAME).is_file():
        return render_merge_card(_read_mapping(source.path / RECIPE_NAME))
    return render_source_card(source.path.name, source.step)
