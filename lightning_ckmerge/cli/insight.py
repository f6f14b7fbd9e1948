"""Commands that tell more of a run's checkpoints and merges: ``study``, ``ensemble``, ``explain``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lightning_ckmerge.cli.configs import (
    DataClass,
    Last,
    ModelClass,
    ModeOption,
    Monitor,
    adapted,
    build_config,
    monitoring,
    quietly,
    settings_of,
)
from lightning_ckmerge.cli.console import FOUND, console, print_json, progress, table, tell_choice, verdict_text
from lightning_ckmerge.cli.options import ArtifactPath, Json, Key
from lightning_ckmerge.tensorfiles.durable import require_absent


def study(
    checkpoints: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with the run's checkpoints.")],
    config: Annotated[Path, typer.Option("--config", help="The LightningCLI config of the run.")],
    out: Annotated[Path, typer.Option("--out", help="Where the study goes; one that is there goes on.")] = Path(
        "study"
    ),
    max_evaluations: Annotated[
        int | None, typer.Option("--max-evaluations", help="Most evaluations; without, all pairs are scored.")
    ] = None,
    monitor: Monitor = None,
    mode: ModeOption = None,
    last: Last = None,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Find out which checkpoints of a run to merge, how many, and how, by its own validation.

    Scores all pairs of checkpoints, uniform means of the newest, and places along pairs, also past their ends and on
    great circles (SLERP). Writes study.json and study.html, and names a config of the callback. The number of
    evaluations is told before it begins. Stopped and started again, it goes on.

    \b
    Examples:
      ckmerge study checkpoints/ --config run.yaml
      ckmerge study checkpoints/ --config run.yaml --last 20 --max-evaluations 100 --out study-20
    """
    with quietly():
        from lightning_ckmerge.checkpoints.formats import run_sources
        from lightning_ckmerge.plugin.offline.scoring import ALONE
        from lightning_ckmerge.plugin.offline.study import PAGE_NAME, STUDY_NAME, planned, study_sources

        configured = build_config(config, model_class, data_class, ALONE)
        settings = replace(monitoring(settings_of(configured, config)[0], monitor, mode), on_error="raise")
        sources = run_sources([checkpoints], key, last)
        with progress("Studying", None) as advance:
            found = study_sources(
                configured.trainer,
                configured.module,
                {"datamodule": configured.datamodule},
                settings,
                sources,
                out.absolute(),
                max_evaluations=max_evaluations,
                on_planned=lambda plan, num_known: typer.echo(planned(plan, num_known), err=True),
                on_evaluated=advance,
            )
    if as_json:
        print_json({"study": str(out / STUDY_NAME), "page": str(out / PAGE_NAME), **found})
        return
    shown = console()
    for name in ("what", "which", "how_many", "how", "limits"):
        if found["advice"][name]:
            shown.print(found["advice"][name] + "\n")
    shown.print(found["advice"]["yaml"])
    shown.print(f"\npage: {out / PAGE_NAME}")


def ensemble(
    config: Annotated[Path, typer.Option("--config", help="The LightningCLI config of the run.")],
    source: Annotated[
        Path, typer.Option("--source", help="Directory with the run's checkpoints, or its merges (with --latest).")
    ],
    out: Annotated[Path, typer.Option("--out", help="What to write; must not exist.")],
    size: Annotated[int, typer.Option("--size", help="Most members: forward passes for a prediction.")] = 4,
    averaging: Annotated[
        str | None, typer.Option("--averaging", help="probabilities or logits; outputs, where targets are no classes.")
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option("--predict", help="Import path of a function of module and batch: outputs and targets."),
    ] = None,
    weight_trials: Annotated[
        int, typer.Option("--weight-trials", help="Weights that Optuna proposes; 0: equal ones.")
    ] = 16,
    merges_only: Annotated[
        bool, typer.Option("--merges-only", help="Leave out checkpoints as they are, which may be members too.")
    ] = False,
    latest: Annotated[
        Path | None, typer.Option("--latest", help="A checkpoint of the latest weights, where --source is merges.")
    ] = None,
    monitor: Monitor = None,
    mode: ModeOption = None,
    n_trials: Annotated[int | None, typer.Option("--n-trials", help="Trials of the search for merges.")] = None,
    last: Last = None,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Build an ensemble of merges, and tell whether it is worth its forward passes.

    Members and their weights are chosen on one half of the validation batches; the other half compares the ensemble
    with the single merge, the latest weights and an ensemble of the checkpoints. It is written in any case. Exit code
    1: it does not beat the single merge beyond doubt.

    \b
    Example:
      ckmerge ensemble --config run.yaml --source checkpoints/ --out ensemble --size 4
    """
    require_absent(out)
    if averaging not in (None, "probabilities", "logits"):
        raise typer.BadParameter(f"must be probabilities or logits, got {averaging}.", param_hint="--averaging")
    with quietly():
        from lightning_ckmerge.plugin.ensemble.build import EnsembleConfig, make_ensemble
        from lightning_ckmerge.plugin.ensemble.material import find_material
        from lightning_ckmerge.plugin.offline.config import imported
        from lightning_ckmerge.plugin.offline.scoring import ALONE

        wanted = EnsembleConfig(
            size=size,
            averaging=cast("Any", averaging),
            weight_trials=weight_trials,
            with_snapshots=not merges_only,
        )
        configured = build_config(config, model_class, data_class, ALONE)
        settings = monitoring(settings_of(configured, config)[0], monitor, mode)
        settings = adapted(settings, None, n_trials, worker=False)
        material = find_material(source, configured.module, latest=latest, key=key, last=last)
        with progress("Predicting", None) as advance:
            made = make_ensemble(
                configured.trainer,
                configured.module,
                {"datamodule": configured.datamodule},
                settings,
                material,
                wanted,
                predict=None if predict is None else imported(predict),
                out=out,
                on_step=lambda done, total: advance(1, total),
            )
    if as_json:
        print_json({"ensemble": str(out), **made.manifest})
    else:
        _print_ensemble(made.manifest, out)
    if made.verdict["status"] != "accepted":
        raise typer.Exit(FOUND)


def _print_ensemble(manifest: dict[str, Any], out: Path) -> None:
    """Print the verdict, the members and the comparison."""
    from lightning_ckmerge.artifact.ensembles import PAGE_NAME

    to = console()
    to.print(verdict_text(manifest["verdict"]))
    names = ("accuracy", "calibration_error", "brier")
    columns = ["loss", *(n for n in names if n in manifest["comparison"][0])]
    rows = [
        (
            c["name"],
            str(c["forward_passes"]),
            *(f"{c[n]:.4f}" for n in columns),
            _gain_told(c["gain_over_merge"]["loss"]),
        )
        for c in manifest["comparison"]
    ]
    header = ("", "passes", *(n.replace("_", " ") for n in columns), "gain over merge, 95 % interval")
    to.print(table(header, rows, title="On the confirmation half"))
    members = [
        (m["name"], f"{m['weight']:.3f}", f"{m['loss']:.4f}", f"{m['disagreement_with_merge']:.4f}")
        for m in manifest["members"]
    ]
    to.print(table(("member", "weight", "loss, search half", "disagreement with merge"), members))
    for note in manifest["verdict"]["notes"]:
        to.print(f"note: {note}", style="yellow")
    to.print(f"ensemble: {out}")
    if PAGE_NAME in manifest["files"]:
        to.print(f"page: {out / PAGE_NAME}")


def _gain_told(gain: dict[str, Any]) -> str:
    ends = gain["interval"]
    return f"{gain['gain']:+.4f}" + (f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else "")


def explain(
    artifact: ArtifactPath,
    config: Annotated[Path, typer.Option("--config", help="The LightningCLI config of the run.")],
    checkpoints: Annotated[
        list[Path],
        typer.Option("--checkpoints", help="A checkpoint of the artifact's step, or a directory that holds one."),
    ],
    buffer: Annotated[
        Path | None, typer.Option("--buffer", help="The run's buffer; `buffer/` beside the artifact without.")
    ] = None,
    half: Annotated[str, typer.Option("--half", help="confirm, which the search did not see, or search.")] = "confirm",
    max_evaluations: Annotated[
        int | None, typer.Option("--max-evaluations", help="Leave figures out that need more.")
    ] = None,
    curvature_batches: Annotated[
        int, typer.Option("--curvature-batches", help="Batches for the Hessian; 0 leaves it out.")
    ] = 4,
    predict: Annotated[
        str | None,
        typer.Option("--predict", help="Import path of a function of module and batch: logits, or a pair with labels."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Explain why a merge works or not: what it gains by, and how the loss lies around it.

    Leaves out one snapshot at a time, takes groups and layers from the merge one at a time, scores the line and a plane
    through latest and merge, and measures the curvature at both. Writes `explain.json` and `explain.html` beside the
    artifact's files, which stay as they are. The number of evaluations is told first. Stopped and started again, it
    goes on.

    \b
    Examples:
      ckmerge explain runs/gpt/merges --config run.yaml --checkpoints runs/gpt/checkpoints
      ckmerge explain merges/step=000002000 --config run.yaml --checkpoints last.ckpt --max-evaluations 40
    """
    from lightning_ckmerge.artifact.load import Artifact

    opened = Artifact.open(artifact)
    choice = tell_choice(artifact, as_json=as_json)
    with quietly():
        from lightning_ckmerge.checkpoints.formats import open_sources
        from lightning_ckmerge.plugin.offline.config import imported
        from lightning_ckmerge.plugin.offline.explain import Forecast, Wishes, explain_artifact
        from lightning_ckmerge.plugin.offline.scoring import ALONE

        def announce(forecast: Forecast) -> None:
            typer.echo(f"{opened.path.name}: {forecast}.", err=True)
            if dry_run:
                raise typer.Exit

        configured = build_config(config, model_class, data_class, ALONE)
        settings = monitoring(settings_of(configured, config)[0], opened.manifest["monitor"], opened.manifest["mode"])
        with progress("Explaining", None) as advance:
            account = explain_artifact(
                configured.trainer,
                configured.module,
                {"datamodule": configured.datamodule},
                replace(settings, on_error="raise"),
                opened,
                open_sources(checkpoints, key),
                buffer or opened.path.parent / "buffer",
                Wishes(
                    half=cast("Any", half),
                    max_evaluations=max_evaluations,
                    curvature_batches=curvature_batches,
                    predict=imported(predict),
                    on_forecast=announce,
                    on_scored=lambda done, total: advance(1, total),
                ),
            )
    if as_json:
        print_json({**account, **choice})
        return
    _print_account(account, opened.path)


def _print_account(account: dict[str, Any], path: Path) -> None:
    from lightning_ckmerge.artifact.accounts import PAGE_NAME
    from lightning_ckmerge.report.account import TITLES

    out = console()
    for note in account["notes"]:
        out.print(f"note: {note}", style="yellow")
    for key, title in TITLES.items():
        if key in account["figures"]:
            out.print(title, style="bold")
            out.print(f"  {account['figures'][key]['sentence']}")
    for key, reason in account["left_out"].items():
        out.print(f"left out: {TITLES[key]}: {reason}")
    out.print(f"page: {path / PAGE_NAME}")
