"""Opens artifacts, and loads merged weights into a module. Nothing is unpickled; everything is checked before use."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from lightning_ckmerge.artifact.remote import address, fetch_pending, local_copy, pending_sizes
from lightning_ckmerge.artifact.runs import BEST_NAME, POINTER_NAME, find_run, is_first, run_of, tell_choice
from lightning_ckmerge.artifact.standing import read_standing
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.checks import TORCH_SUFFIXES
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.tensorfiles.durable import file_record
from lightning_ckmerge.tensorfiles.untrusted import inside, parse_json, read_json
from lightning_ckmerge.tensorfiles.writer import WEIGHTS_NAME

if TYPE_CHECKING:
    from torch import nn

    from lightning_ckmerge.tensorfiles.reader import StoredWeights


ARTIFACT_NAME = re.compile(r"step=(\d{9,})(?:-v(\d+))?")
RECIPE_NAME = "recipe.json"
RECIPE_KEY = "ckmerge_recipe"  # in a file's header
COLOURS = {"accepted": "#17713f", "rejected": "#b3261e"}
OPEN = "#8a5a00"
SMALL_BYTES = 1 << 16
# It takes the notebook's own letters and background, dark or light.
CARD = """\
<div style="border:1px solid #8886;border-radius:8px;padding:.6em 1em;max-width:46em">
<span style="background:{colour};color:#fff;border-radius:999px;padding:.1em .7em">{status}</span>
<b>Merge at step {step}</b>
<div style="margin:.5em 0">{sentence}</div>
<code>{use}</code>
</div>"""


@dataclass(frozen=True, repr=False)
class Artifact:
    """A directory that a search published.

    Args:
        path: The directory.
        manifest: Its checked ``manifest.json``.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Artifact:
        """Return the artifact at ``path``, its files checked.

        Args:
            path: The artifact's directory, a run's ``best``, or the run's ``dirpath``, which stands for its best; where
                several runs share it, for that of the newest, which began or was resumed last (``dirpath/run=1`` names
                the first). Or the URL of one: its files are copied to a cache, without ``verify`` the small ones alone.
            verify: Compare each file's SHA-256. Sizes, names and the manifest's schema are checked in any case.

        Raises:
            ArtifactError: There is no artifact, or it is damaged.
        """
        directory = locate(local_copy(path)).resolve()
        artifact = cls(directory, read_manifest(directory))
        artifact.check_files(verify=verify)
        return artifact

    def __repr__(self) -> str:
        return describe(self.path, self.manifest)

    def _repr_html_(self) -> str:
        return notebook_card(self.path, self.manifest, has_weights=self.has_weights)

    @property
    def has_weights(self) -> bool:
        """Whether it holds weights, or is a record of a search only."""
        return any(WEIGHTS_NAME.fullmatch(name) for name in self.manifest["files"])

    @property
    def caveat(self) -> str | None:
        """The newer weights that beat this best artifact of its run, as far as that was measured."""
        standing = read_standing(self.path.parent)
        own = (self.manifest.get("run_id", ""), self.path.name)
        is_stale = standing is not None and standing.is_stale and (standing.run_id, standing.best) == own
        return standing.advice if standing is not None and is_stale else None

    def tensors(self) -> StoredWeights:
        """Return the weights by name, tied ones under each of their names; a tensor is read when it is asked for.

        Raises:
            ArtifactError: The artifact holds no weights.
        """
        if not self.has_weights:
            verdict = self.manifest["verdict"]
            why = "its search was rejected" if verdict["status"] == "rejected" else "`save_top_k` did not keep them"
            raise ArtifactError(
                f"an artifact must hold weights to be loaded, got the record {address(self.path)}: {why} "
                f"({verdict['sentence'].rstrip('.')}). Load another artifact, or continue with the latest weights."
            )
        # Reviewing artifacts needs no torch, which takes seconds to import.
        from lightning_ckmerge.tensorfiles.reader import StoredWeights

        fetch_pending(self.path)
        names = sorted(name for name in self.manifest["files"] if WEIGHTS_NAME.fullmatch(name))
        return StoredWeights([inside(self.path, name) for name in names])

    def check_files(self, *, verify: bool = True) -> None:
        """Raise ``ArtifactError`` unless every listed file lies inside the directory, whole; ``verify`` hashes them."""
        if verify:
            fetch_pending(self.path)
        pending = pending_sizes(self.path)
        for name, recorded in self.manifest["files"].items():
            path = inside(self.path, name)
            size = path.stat().st_size if path.is_file() else pending.get(name)
            if size is None:
                found: object = "no such file"
            elif size != recorded["bytes"]:
                found = f"{size} bytes instead of {recorded['bytes']}"
            elif verify and file_record(path) != recorded:
                found = "another SHA-256"
            else:
                continue
            raise ArtifactError(
                f"an artifact's files must be those that its manifest lists, got {found} for {name!r} in "
                f"{address(self.path)}. Restore the file from a copy, or use another artifact."
            )


@dataclass(frozen=True, repr=False)
class MergedFiles:
    """The output of ``ckmerge merge``: weights that no search has chosen.

    Args:
        path: The directory, or a ``.safetensors`` file.
        manifest: The recipe, with the files that it lists, where the path is a directory; of a file that ``ckmerge
            merge`` did not write, empty.
    """

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        parts = [repr(str(self.path))]
        if self.manifest:
            inputs = self.manifest.get("inputs", [])
            parts += [str(self.manifest.get("schedule") or self.manifest.get("method")), f"{len(inputs)} checkpoints"]
        return f"MergedFiles({', '.join(parts)})"

    def tensors(self) -> StoredWeights:
        """Return the weights by name, tied ones under each of their names; a tensor is read when it is asked for."""
        from lightning_ckmerge.tensorfiles.reader import StoredWeights

        if self.path.is_file():
            return StoredWeights([self.path])
        names = sorted(name for name in self.manifest["files"] if WEIGHTS_NAME.fullmatch(name))
        return StoredWeights([inside(self.path, name) for name in names])


def _opened(path: Path, verify: bool) -> Artifact | MergedFiles:
    """Return the artifact or merge at ``path``, its files checked as far as hashes are known."""
    if path.is_file() and path.suffix == ".safetensors":
        return MergedFiles(path.resolve(), _recipe_of(path))
    if path.is_file() and path.suffix in TORCH_SUFFIXES:
        raise ArtifactError(
            f"`load_merged` reads safetensors alone, got the checkpoint {path}. Load it with `load_from_checkpoint`, "
            "or test it with `trainer.test(model, ckpt_path=...)`."
        )
    recipe = path / RECIPE_NAME
    if (path / MANIFEST_NAME).is_file() or not recipe.is_file():
        return Artifact.open(path, verify=verify)
    try:
        manifest = _recipe(read_json(recipe, allow_nan=True))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"a merge's {RECIPE_NAME} must list its files, got {recipe}. Merge again.") from error
    Artifact(path, manifest).check_files(verify=verify)
    return MergedFiles(path.resolve(), manifest)


def _recipe(value: Any) -> Manifest:
    """Return a merge's recipe, whose files are listed as a manifest lists them; else raise ``ValueError``."""
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        raise ValueError("it lists no files")
    for record in value["files"].values():
        if not isinstance(record, dict) or record.keys() != {"bytes", "sha256"}:
            raise ValueError("a file has bytes and sha256")
    return value


def _recipe_of(path: Path) -> Manifest:
    """Return the recipe in a file's header; none if there is no such thing."""
    from lightning_ckmerge.tensorfiles.reader import read_metadata

    try:
        recipe = parse_json(read_metadata(path).get(RECIPE_KEY, "{}"), allow_nan=True)
    except ValueError as error:
        raise ArtifactError(f"a merge's header must hold its recipe, got {path}. Merge again.") from error
    return recipe if isinstance(recipe, dict) else {}


def load_merged(
    source: str | os.PathLike[str] | Artifact | MergedFiles,
    model: nn.Module,
    *,
    strict: bool = True,
    verify: bool = True,
) -> Artifact | MergedFiles:
    """Load an artifact's weights into ``model``, in place, and return the artifact.

    Everything is checked before the first weight changes. The model keeps its device, dtype and tied weights. Its extra
    state (``_extra_state``) is not demanded.

    The artifact of a run with PEFT's adapters does not hold their frozen base, which stays as the model has it. Where
    products were merged, LoRA layers get the merge's rank. Nor does an artifact hold sparse and quantised tensors.

    Args:
        source: An artifact, its directory, a run's ``best``, or the run's ``dirpath``, which stands for its best: of
            several runs in it, for that of the newest, which began or was resumed last, and a warning says how to name
            another. Or the URL of one. Also the directory or the ``.safetensors`` file that ``ckmerge merge`` wrote.
        model: The LightningModule that was trained, or one with the same ``state_dict`` names.
        strict: Refuse missing and unexpected names. Otherwise matching tensors are loaded, and a warning lists the
            others; no name in common, or another shape, is refused in any case.
        verify: Compare each file's SHA-256 first.

    Raises:
        ArtifactError: There is no artifact, it is damaged, it holds no weights, or they do not fit the model.
        ConfigError: The model is something else.
    """
    # As above: reviewing artifacts needs no torch.
    from torch import nn

    from lightning_ckmerge.core.adapters import fits, give_ranks

    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(f"`model` must be a module, got {found}. Build it as it was for training.")
    if isinstance(source, (Artifact, MergedFiles)):
        artifact = source
    else:
        path = local_copy(source)
        artifact = _opened(path, verify)
        if choice := tell_choice(path):
            warnings.warn(choice, stacklevel=2)
    if isinstance(artifact, Artifact) and (caveat := artifact.caveat):
        warnings.warn(f"Newer weights beat {artifact.path}, the best artifact of its run. {caveat}", stacklevel=2)
    stored = artifact.tensors()
    state = {name: value for name, value in model.state_dict().items() if not _is_extra_state(name)}
    names = {name for name in stored if not _is_extra_state(name)}
    adapters = artifact.manifest.get("adapters", {"merge": "factors", "left_out": []})
    shapes = {name: (stored.spec(name).shape, tuple(state[name].shape)) for name in sorted(names & state.keys())}
    not_dense = artifact.manifest.get("left_out", [])
    at_any_rank = adapters["merge"] == "products"
    faults = {
        "of another shape": [
            f"{name} {theirs} for {own}"
            for name, (theirs, own) in shapes.items()
            if not fits(name, theirs, own, at_any_rank=at_any_rank)
        ],
        "on the meta device": sorted(name for name in names & state.keys() if state[name].is_meta),
    }
    apart = {
        "missing from the artifact": sorted(state.keys() - names - {*adapters["left_out"], *not_dense}),
        "unexpected by the model": sorted(names - state.keys()),
    }
    if strict or not names & state.keys():
        faults.update(apart)
    if found := _described(faults):
        raise ArtifactError(
            f"the weights of {artifact.path} must fit {type(model).__name__}, got names {found}. Build the model with "
            "the hyperparameters of the run (and call its `configure_model()`), or pass `strict=False` for names alone."
        )
    if left_out := _described(apart):
        warnings.warn(
            f"Loaded {len(names & state.keys())} of the {len(state)} tensors of {type(model).__name__} from "
            f"{artifact.path}, as `strict=False` allows ({left_out}). Missing tensors keep their values.",
            stacklevel=2,
        )
    if at_any_rank:
        give_ranks(model, {name: theirs for name, (theirs, _) in shapes.items()})
    model.load_state_dict(stored, strict=False)
    return artifact


def best_target(dirpath: Path) -> Path | None:
    """Return the directory that a run's ``best`` names; ``None`` if no artifact was accepted.

    Raises:
        ArtifactError: ``best.json`` names nothing inside the run's directory.
    """
    link, pointer = dirpath / BEST_NAME, dirpath / POINTER_NAME
    # A later run's, below this one's directory, may have taken the link.
    if link.is_dir() and (target := link.resolve()).parent == dirpath.resolve():
        return target
    if not pointer.is_file():
        return None
    try:
        return inside(dirpath, read_json(pointer, max_bytes=SMALL_BYTES)["artifact"]).resolve()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f'{pointer} must read {{"artifact": NAME}}. Name the artifact by its own directory.'
        ) from error


def locate(path: Path) -> Path:
    """Return the directory of the artifact that ``path`` stands for.

    Raises:
        ArtifactError: There is none.
    """
    # `best` itself does not exist where links are refused.
    run = run_of(path)
    if is_first(path.parent) and run == path:
        path = path.parent.parent / path.name
    if (path / MANIFEST_NAME).is_file():
        return path
    if path.is_file() and run == path:
        told, parent = address(path), address(path.parent)
        raise ArtifactError(f"an artifact must be a directory, got the file {told}. Name the directory, {parent}.")
    dirpath = find_run(run)
    if target := best_target(dirpath):
        return target
    if records := read_timeline(dirpath):
        raise _nothing_accepted(dirpath, records, tell_choice(path))
    if not path.exists():
        published = [r for r in read_timeline(path.parent) if r.get("artifact") == path.name]
        if published:
            raise ArtifactError(
                f"an artifact must still be there, got {address(path)}: its search was {published[-1]['status']}, and "
                "the directory has been removed since, as `save_top_k` does. Name another artifact: `ckmerge list "
                f"{path.parent}` shows them."
            )
    raise ArtifactError(
        f"an artifact must be a directory with a {MANIFEST_NAME}, got {address(path)}. Name an artifact "
        "(`step=...`), a run's `best`, or the callback's `dirpath`."
    )


def _nothing_accepted(dirpath: Path, records: Sequence[Mapping[str, Any]], choice: str | None) -> ArtifactError:
    counts = Counter(record["status"] for record in records)
    found = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    kept = [dirpath / r["artifact"] for r in records if r["status"] == "unconfirmed" and r.get("artifact")]
    such = f", such as {kept[-1]}" if kept else ""
    searches = "1 search" if len(records) == 1 else f"{len(records)} searches"
    return ArtifactError(
        f"a run must have an accepted artifact with weights, got {searches} in {dirpath}: {found}. Name an artifact by "
        f"its own directory{such}, or continue with the latest weights. {choice or ''}".rstrip()
    )


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _described(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what}: {listed(items)}" for what, items in names.items() if items)


def describe(path: Path, manifest: Manifest) -> str:
    """Return an artifact in one line: place, verdict and value."""
    verdict = manifest["verdict"]
    value = "no value" if verdict["value"] is None else f"{verdict['value']:.5g}"
    return f"Artifact({address(path)!r}, {verdict['status']}, {manifest['monitor']} {value})"


def notebook_card(path: Path, manifest: Manifest, *, has_weights: bool) -> str:
    """Return an artifact as a card: its verdict, and how to load its weights. It is HTML, escaped."""
    verdict = manifest["verdict"]
    told = address(path)
    use = f'load_merged("{told}", model)' if has_weights else f"{told} is a record, without weights."
    return CARD.format(
        colour=COLOURS.get(verdict["status"], OPEN),
        status=escape(verdict["status"]),
        step=manifest["step"],
        sentence=escape(verdict["sentence"]),
        use=escape(use),
    )
