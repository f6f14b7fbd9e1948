"""Commands over a config, with what the callback does in training: ``plan``, ``search``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from lightning_ckmerge.cli.console import FOUND, console, print_json, progress, table, verdict_text
from lightning_ckmerge.cli.options import Json, Key

if TYPE_CHECKING:
    from lightning_ckmerge.plugin.plan import Plan


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
    with quietly():
        from lightning_ckmerge.plugin.plan import forecast

        configured = build_config(config, model_class, data_class)
        run = (configured.trainer, configured.module, configured.datamodule)
        plans = [forecast(settings, *run) for settings in settings_of(configured, config)]
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
    with quietly():
        from lightning_ckmerge.checkpoints.formats import run_sources
        from lightning_ckmerge.plugin.offline.scoring import ALONE
        from lightning_ckmerge.plugin.offline.search import search_sources

        configured = build_config(config, model_class, data_class, ALONE)
        settings = monitoring(settings_of(configured, config)[0], monitor, mode)
        settings = adapted(settings, storage, n_trials, worker)
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


def _print_plan(p: Plan) -> None:
    from lightning_ckmerge.plugin.plan import plan_rows

    out = console()
    out.print(table(("", ""), plan_rows(p)))
    for warning in p.warnings:
        out.print(f"warning: {warning}", style="yellow")
    for fault in p.faults:
        out.print(f"fault: {fault}", style="bold red")
