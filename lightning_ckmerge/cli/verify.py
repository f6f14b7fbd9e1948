"""The command that checks: ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightning_ckmerge.cli.console import FOUND, console, hash_files, print_json, progress, table, tell_choice
from lightning_ckmerge.cli.options import Json, Key, local

if TYPE_CHECKING:
    from lightning_ckmerge.artifact.ensembles import EnsembleArtifact
    from lightning_ckmerge.artifact.load import Artifact

STATES = {
    "sound": ("sound", ""),
    "not sound": ("NOT SOUND", "bold red"),
    "cannot be rebuilt": ("the files are sound; the weights cannot be rebuilt", "yellow"),
}


def verify(
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT",
            parser=local,
            help="An artifact (step=...), a run's `best`, a run, for its best, or an ensemble's directory; or a URL.",
        ),
    ],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Merge the kept snapshots again and compare bit for bit.")
    ] = False,
    latest: Annotated[
        Path | None, typer.Option("--latest", help="A checkpoint of the artifact's step, for --rebuild.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option("--checkpoints", help="Inputs of an offline search, for --rebuild.")
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check the files of an artifact, or of an ensemble, against the hashes in its manifest.

    With --rebuild its weights are merged again from the snapshots that the run still keeps, found by their SHA-256, and
    compared bit for bit. Exit code 1: a file or the rebuilt weights differ from the published ones ("NOT SOUND"),
    or a snapshot that counts is no longer kept, so that the files are sound and the rebuild is open ("cannot be
    rebuilt").

    \b
    Examples:
      ckmerge verify runs/gpt/merges/best
      ckmerge verify runs/gpt/merges/step=000002000 --rebuild
      ckmerge verify ensemble
    """
    from lightning_ckmerge.artifact.ensembles import is_ensemble
    from lightning_ckmerge.artifact.load import Artifact, locate
    from lightning_ckmerge.artifact.manifest import read_manifest
    from lightning_ckmerge.artifact.remote import address, fetch_pending

    if is_ensemble(artifact):
        if rebuild:
            raise typer.BadParameter(f"needs a search's artifact, got the ensemble {artifact}.", param_hint="--rebuild")
        _verify_ensemble(artifact, as_json)
        return
    path = locate(artifact).resolve()
    fetch_pending(path)
    opened = Artifact(path, read_manifest(path))
    files = _check_files(opened)
    found: dict[str, Any] = {"artifact": address(path), "files": files, **tell_choice(artifact, as_json=as_json)}
    # A manifest that lists nothing vouches for nothing.
    is_sound = bool(files) and all(state == "ok" for state in files.values())
    if rebuild and is_sound:
        found["rebuild"] = _rebuild(opened, latest, checkpoints, key)
        is_sound = found["rebuild"]["state"] == "equal"
    found["state"] = "sound" if is_sound else "not sound"
    if found.get("rebuild", {}).get("state") == "impossible":
        found["state"] = "cannot be rebuilt"
    if as_json:
        print_json({**found, "ok": is_sound})
    else:
        _print_verification(found)
    if not is_sound:
        raise typer.Exit(FOUND)


def _verify_ensemble(path: Path, as_json: bool) -> None:
    """Check and tell the members, and the page beside them."""
    from rich.text import Text

    from lightning_ckmerge.artifact.ensembles import EnsembleArtifact
    from lightning_ckmerge.artifact.remote import address

    ensemble = EnsembleArtifact.read(path)
    files = _check_files(ensemble)
    members = []
    for m, member in enumerate(ensemble.manifest["members"]):
        faulty = [name for name in ensemble.weights_files(m) if files[name] != "ok"]
        members.append(
            {"name": member["name"], "weight": member["weight"], "state": "not sound" if faulty else "sound"}
        )
    is_sound = all(state == "ok" for state in files.values())
    found: dict[str, Any] = {
        "ensemble": address(ensemble.path),
        "files": files,
        "members": members,
        "state": "sound" if is_sound else "not sound",
        "ok": is_sound,
    }
    if as_json:
        print_json(found)
    else:
        out = console()
        _print_files(files)
        rows = [(m["name"], f"{m['weight']:.3f}", Text(*STATES[m["state"]])) for m in members]
        out.print(table(("member", "weight", "state"), rows))
        if not is_sound and all(m["state"] == "sound" for m in members):
            out.print("note: the members are sound: the ensemble predicts what was published.")
        text, style = STATES[found["state"]]
        out.print(f"{found['ensemble']}: {text}", style=style)
    if not is_sound:
        raise typer.Exit(FOUND)


def _check_files(artifact: Artifact | EnsembleArtifact) -> dict[str, str]:
    """Return the state of each file: ``ok``, ``missing``, ``another size``, ``another SHA-256`` or ``not listed``."""
    from lightning_ckmerge.tensorfiles.untrusted import inside

    listed = artifact.manifest["files"]
    paths = {name: inside(artifact.path, name) for name in listed}
    sized = [p for n, p in paths.items() if p.is_file() and p.stat().st_size == listed[n]["bytes"]]
    hashed = hash_files(sized, "Checking hashes")

    def state(name: str) -> str:
        if not paths[name].is_file():
            return "missing"
        if paths[name] not in hashed:
            return "another size"
        return "ok" if hashed[paths[name]] == listed[name] else "another SHA-256"

    others = {name for name in _list_others(artifact.path) if name not in listed}
    return {**{name: state(name) for name in listed}, **dict.fromkeys(sorted(others), "not listed")}


def _list_others(directory: Path) -> list[str]:
    """Return the files that a manifest should list; not those of the system, whose names begin with a dot."""
    from lightning_ckmerge.artifact.accounts import ACCOUNT_NAME, PAGE_NAME
    from lightning_ckmerge.artifact.ensembles import ENSEMBLE_NAME
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME

    names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()]
    known = (ACCOUNT_NAME, PAGE_NAME, ENSEMBLE_NAME, MANIFEST_NAME)
    return [n for n in names if n not in known and not n.rpartition("/")[2].startswith(".")]


def _rebuild(artifact: Artifact, latest: Path | None, checkpoints: Path | None, key: str | None) -> dict[str, Any]:
    from lightning_ckmerge.checkpoints.formats import find_sources, open_source
    from lightning_ckmerge.checkpoints.rebuild import rebuild
    from lightning_ckmerge.errors import SnapshotError

    weights = open_source(latest, key).weights if latest else None
    others = [open_source(path, key) for path in find_sources(checkpoints)] if checkpoints else []
    buffer = artifact.path.parent / "buffer"
    try:
        with progress("Rebuilding", len(artifact.tensors())) as advance:
            built = rebuild(artifact, buffer, weights, others, lambda done, total: advance(1))
    except SnapshotError as error:
        return {"state": "impossible", "reason": str(error)}
    return {
        "state": "different" if built.different else "equal",
        "compared": built.num_compared,
        "different": list(built.different),
        "not_compared": list(built.not_compared),
    }


def _print_files(files: dict[str, str]) -> None:
    from rich.text import Text

    if not files:
        console().print("note: the manifest lists no files, so there is nothing that it vouches for.")
        return

    rows = [(name, Text(state, style="" if state == "ok" else "bold red")) for name, state in files.items()]
    console().print(table(("file", "state"), rows))


def _print_verification(found: dict[str, Any]) -> None:
    out = console()
    _print_files(found["files"])
    built = found.get("rebuild")
    if built and built["state"] == "impossible":
        out.print(f"rebuild: not possible: {built['reason']}")
    elif built:
        names = ", ".join(built["different"][:5])
        out.print(
            f"rebuild: {built['compared']} tensors compared bit for bit, {len(built['different'])} different"
            f"{': ' + names if names else ''}; {len(built['not_compared'])} skipped (not produced by merging)."
        )
        if built["different"]:
            out.print(
                "note: BatchNorm statistics re-estimated by `evaluation.recalibrate_batches` are not merged, so they "
                "differ."
            )
    text, style = STATES[found["state"]]
    out.print(f"{found['artifact']}: {text}", style=style)
