"""Commands that read the user's LightningCLI config: ``plan``, ``search``, ``explain``."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lightning_ckmerge.cli.console import FOUND, console, print_json, progress, table, tell_choice, verdict_text
from lightning_ckmerge.cli.options import ArtifactPath, Json, Key

if TYPE_CHECKING:
    from lightning_ckmerge.config import MergeSettings
    from lightning_ckmerge.plugin.cli_config import Configured
    from lightning_ckmerge.plugin.plan import Plan

ModelClass = Annotated[
    str | None, typer.Option("--model-class", help="Import path of the module, where the config leaves it out.")
]
DataClass = Annotated[
    str | None, typer.Option("--data-class", help="Import path of the datamodule, where the config leaves it out.")
]


def plan(
    config: Annotated[Path, typer.Argument(metavar="YAML", help="A LightningCLI config, as `fit --config` takes it.")],
    model_class: ModelClass = None,
    data_class: DataClass = None,
    as_json: Json = False,
) -> None:
    """Tell what a run will take, before an allocation is spent: memory, disk, evaluations, strategy support.

    Builds the model and the loaders on this machine's CPU; trains nothing, writes nothing. Run it where training would
    be started. Exit code 1: the run should not be started like this.

    \b
    Example:
      ckmerge plan run.yaml
    """
    with _quietly():
        from lightning_ckmerge.plugin.plan import forecast

        configured = _build(config, model_class, data_class)
        run = (configured.trainer, configured.module, configured.datamodule)
        plans = [forecast(settings, *run) for settings in _settings(configured, config)]
    if as_json:
        print_json({"config": str(config), "ok": not any(p.faults for p in plans), "plans": [asdict(p) for p in plans]})
    else:
        for p in plans:
            _print_plan(p)
    if any(p.faults for p in plans):
        raise typer.Exit(FOUND)


def search(
    config: Annotated[Path, typer.Option("--config", help="The LightningCLI config of the run.")],
    checkpoints: Annotated[Path, typer.Option("--checkpoints", help="Directory with the run's checkpoints.")],
    out: Annotated[Path, typer.Option("--out", help="Where the artifact goes, as the callback's dirpath.")],
    storage: Annotated[
        str | None, typer.Option("--storage", help="Optuna storage URL, for several processes; a journal without.")
    ] = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="Help the process that was started without this, on another device.")
    ] = False,
    monitor: Annotated[str | None, typer.Option("--monitor", help="Metric, in place of the config's.")] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="min if lower is better, max if higher is; in place of the config's.")
    ] = None,
    n_trials: Annotated[int | None, typer.Option("--n-trials", help="Likewise.")] = None,
    last: Annotated[int | None, typer.Option("--last", help="Use the newest so many checkpoints.")] = None,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Search for the best merge of checkpoints on disk, as the callback does during training, and publish it.

    Model, data and arguments of the search come from the config; the newest checkpoint is the latest weights. Stopped
    and started again, it goes on. Several processes share one search over --storage, each with its own device
    (CUDA_VISIBLE_DEVICES): one publishes, the others are started with --worker. Exit code 1: the merge was not
    accepted.

    \b
    Examples:
      ckmerge search --config run.yaml --checkpoints checkpoints/ --out merges
      CUDA_VISIBLE_DEVICES=1 ckmerge search --config run.yaml --checkpoints checkpoints/ --out merges \\
        --storage sqlite:///study.db --worker
    """
    with _quietly():
        from lightning_ckmerge.checkpoints.formats import run_sources
        from lightning_ckmerge.plugin.offline.bench import ALONE
        from lightning_ckmerge.plugin.offline.search import search_sources

        configured = _build(config, model_class, data_class, ALONE)
        settings = _monitoring(_settings(configured, config)[0], monitor, mode)
        settings = _adapted(settings, storage, n_trials, worker)
        sources = run_sources([checkpoints], key, last)
        with progress("Searching", None) as advance:
            found = search_sources(
                configured.trainer,
                configured.module,
                {"datamodule": configured.datamodule},
                settings,
                sources,
                out.absolute(),
                help_only=worker,
                on_scored=lambda trial, total: advance(1, total),
            )
    if isinstance(found, int):
        print_json({"scored": found}) if as_json else console().print(f"scored {found} candidates for the search")
        return
    verdict = found.manifest["verdict"]
    if as_json:
        print_json({"artifact": str(found.path), "verdict": verdict, "checkpoints": [str(s.path) for s in sources]})
    else:
        console().print(verdict_text(verdict))
        console().print(f"artifact: {found.path}")
    if verdict["status"] != "accepted":
        raise typer.Exit(FOUND)


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
    with _quietly():
        from lightning_ckmerge.checkpoints.formats import open_sources
        from lightning_ckmerge.plugin.cli_config import imported
        from lightning_ckmerge.plugin.offline.bench import ALONE
        from lightning_ckmerge.plugin.offline.explain import Forecast, Wishes, explain_artifact

        def announce(forecast: Forecast) -> None:
            typer.echo(f"{opened.path.name}: {forecast}.", err=True)
            if dry_run:
                raise typer.Exit

        configured = _build(config, model_class, data_class, ALONE)
        settings = _monitoring(_settings(configured, config)[0], opened.manifest["monitor"], opened.manifest["mode"])
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


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Import from the working directory as ``python -m`` does, and keep standard output for the command's own words."""
    import warnings

    sys.path.insert(0, os.getcwd())
    # Lightning sets its loggers' levels when it is imported, which is yet to come.
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
            yield
    finally:
        logging.disable(logging.NOTSET)
        sys.path.remove(os.getcwd())


def _build(
    path: Path, model_class: str | None, data_class: str | None, trainer: dict[str, Any] | None = None
) -> Configured:
    import yaml

    from lightning_ckmerge.errors import ConfigError
    from lightning_ckmerge.plugin.cli_config import build

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"the config must be a file that can be read, got {path}: {reason}. Check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config must be YAML, got {_yaml_fault(error)} in {path}. Correct it there.") from error
    if not isinstance(config, dict):
        found = "nothing" if config is None else type(config).__name__
        raise ConfigError(f"the config must be a mapping, got {found} in {path}. Name a config of `fit`.")
    return build(config, model_class=model_class, data_class=data_class, trainer=trainer)


def _yaml_fault(error: Exception) -> str:
    """Say what is no YAML, and where, in few words."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return str(error) if mark is None or problem is None else f"{problem} in line {mark.line + 1}"


def _settings(configured: Configured, config: Path) -> list[MergeSettings]:
    """Return those of the config's callbacks, or of one with the default arguments."""
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback

    if not configured.callbacks:
        typer.echo(f"note: {config} has no CheckpointMergeCallback; its defaults are taken.", err=True)
    return [callback.settings for callback in configured.callbacks or [CheckpointMergeCallback()]]


def _monitoring(settings: MergeSettings, monitor: str | None, mode: str | None) -> MergeSettings:
    """Return the settings with the metric and the mode that the command line names."""
    from lightning_ckmerge.core.objectives import make_objectives

    modes = [o.mode for o in settings.objectives]
    if monitor is not None:
        modes = modes[:1]
    return replace(settings, objectives=make_objectives(monitor or settings.monitors, cast("Any", mode) or modes))


def _adapted(settings: MergeSettings, storage: str | None, n_trials: int | None, worker: bool) -> MergeSettings:
    """Return the settings with what the command line says; what goes wrong is raised."""
    own = settings.search
    search = replace(
        own,
        storage=storage or own.storage,
        n_trials=own.n_trials if n_trials is None else n_trials,
        # Equal seeds would propose equal candidates at the same moment.
        seed=own.seed + (os.getpid() if worker else 0),
    )
    return replace(settings, search=search, on_error="raise")


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


def _print_plan(p: Plan) -> None:
    from lightning_ckmerge.plugin.plan import plan_rows

    out = console()
    out.print(table(("", ""), plan_rows(p)))
    for warning in p.warnings:
        out.print(f"warning: {warning}", style="yellow")
    for fault in p.faults:
        out.print(f"fault: {fault}", style="bold red")
