"""The user's LightningCLI config, for the commands that read it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from lightning_ckmerge.config import MergeSettings
    from lightning_ckmerge.plugin.offline.config import Configured

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


@contextlib.contextmanager
def quietly() -> Iterator[None]:
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


def build_config(
    path: Path, model_class: str | None, data_class: str | None, trainer: dict[str, Any] | None = None
) -> Configured:
    """Return what a config builds.

    Raises:
        ConfigError: It cannot be read, or does not fit the classes.
    """
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


def settings_of(configured: Configured, config: Path) -> list[MergeSettings]:
    """Return the settings of the config's callbacks, or of one with the default arguments."""
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback

    if not configured.callbacks:
        typer.echo(f"note: {config} has no CheckpointMergeCallback; using its defaults.", err=True)
    return [callback.settings for callback in configured.callbacks or [CheckpointMergeCallback()]]


def monitoring(settings: MergeSettings, monitor: str | None, mode: str | None) -> MergeSettings:
    """Return the settings with the metric and the mode that the command line names."""
    from lightning_ckmerge.core.objectives import make_objectives

    modes = [o.mode for o in settings.objectives]
    if monitor is not None:
        modes = modes[:1]
    return replace(settings, objectives=make_objectives(monitor or settings.monitors, cast("Any", mode) or modes))


def adapted(settings: MergeSettings, storage: str | None, n_trials: int | None, worker: bool) -> MergeSettings:
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
