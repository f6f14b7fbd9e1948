"""Commands that read the user's LightningCLI config: ``plan``, ``search``, ``study``."""

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

from lightning_ckmerge.cli.console import FOUND, console, print_json, progress, table, verdict_text
from lightning_ckmerge.cli.options import Json, Key

if TYPE_CHECKING:
    from lightning_ckmerge.config import MergeSettings
    from lightning_ckmerge.plugin.offline.config import Configured
    from lightning_ckmerge.plugin.plan import Plan

ModelClass = Annotated[
    str | None, typer.Option("--model-class", help="Import path of the module, where the config leaves it out.")
]
DataClass = Annotated[
    str | None, typer.Option("--data-class", help="Import path of the datamodule, where the config leaves it out.")
]

Monitor = Annotated[str | None, typer.Option("--monitor", help="Metric, in place of the config's.")]
ModeOption = Annotated[
    str | None, typer.Option("--mode", help="min if lower is better, max if higher is; in place of the config's.")
]
Last = Annotated[int | None, typer.Option("--last", help="Use the newest so many checkpoints.")]


def plan(
    config: Annotated[Path, typer.Argument(metavar="YAML", help="A LightningCLI config, as `fit --config` takes it.")],
    model_class: ModelClass = None,
    data_class: DataClass = None,
    as_json: Json = False,
) -> None:
    """Show a run's costs, before an allocation is spent: memory, disk, evaluations, strategy support.

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
    monitor: Monitor = None,
    mode: ModeOption = None,
    n_trials: Annotated[
        int | None, typer.Option("--n-trials", help="Number of sampler trials, in place of the config's.")
    ] = None,
    last: Last = None,
    model_class: ModelClass = None,
    data_class: DataClass = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Search for the best merge of checkpoints on disk, as the callback does during training, and publish it.

    Model, data and arguments of the search come from the config; the newest checkpoint is the latest weights. Stopped
    and started again, it continues. Several processes share one search over --storage, each with its own device
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
        from lightning_ckmerge.plugin.offline.scoring import ALONE
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
                on_scored=lambda scored, total: advance(1, total),
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
    with _quietly():
        from lightning_ckmerge.checkpoints.formats import run_sources
        from lightning_ckmerge.plugin.offline.scoring import ALONE
        from lightning_ckmerge.plugin.offline.study import PAGE_NAME, STUDY_NAME, planned, study_sources

        configured = _build(config, model_class, data_class, ALONE)
        settings = replace(_monitoring(_settings(configured, config)[0], monitor, mode), on_error="raise")
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
    from lightning_ckmerge.plugin.offline.config import build

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
    """Name the YAML error and its line, in few words."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return str(error) if mark is None or problem is None else f"{problem} in line {mark.line + 1}"


def _settings(configured: Configured, config: Path) -> list[MergeSettings]:
    """Return the settings of the config's callbacks, or of one with the default arguments."""
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback

    if not configured.callbacks:
        typer.echo(f"note: {config} has no CheckpointMergeCallback; using its defaults.", err=True)
    return [callback.settings for callback in configured.callbacks or [CheckpointMergeCallback()]]


def _monitoring(settings: MergeSettings, monitor: str | None, mode: str | None) -> MergeSettings:
    """Return the settings with the metric and the mode that the command line names."""
    from lightning_ckmerge.core.objectives import make_objectives

    modes = [o.mode for o in settings.objectives]
    if monitor is not None:
        modes = modes[:1]
    return replace(settings, objectives=make_objectives(monitor or settings.monitors, cast("Any", mode) or modes))


def _adapted(settings: MergeSettings, storage: str | None, n_trials: int | None, worker: bool) -> MergeSettings:
    """Return the settings with the command line's values; errors are raised."""
    own = settings.search
    search = replace(
        own,
        storage=storage or own.storage,
        n_trials=own.n_trials if n_trials is None else n_trials,
        # Equal seeds would propose equal candidates at the same moment.
        seed=own.seed + (os.getpid() if worker else 0),
    )
    return replace(settings, search=search, on_error="raise")


def _print_plan(p: Plan) -> None:
    from lightning_ckmerge.plugin.plan import plan_rows

    out = console()
    out.print(table(("", ""), plan_rows(p)))
    for warning in p.warnings:
        out.print(f"warning: {warning}", style="yellow")
    for fault in p.faults:
        out.print(f"fault: {fault}", style="bold red")
