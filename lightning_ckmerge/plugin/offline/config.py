"""The objects that a LightningCLI config builds: Trainer, module, datamodule and merge callbacks."""

from __future__ import annotations

import importlib
import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_ckmerge.errors import CkmergeError, ConfigError
from lightning_ckmerge.plugin.callback import CheckpointMergeCallback

# jsonargparse's lines that name the class, the argument, and neither.
PROBLEM = re.compile(r"Problem with given class_path '([^']+)'")
PARSER_KEY = re.compile(r'^Parser key "([^"]+)":$')
UNTELLING = re.compile(
    r"(- )?(Parser key .*|Does not validate .*|Subtypes: .*|Errors:|Given value type: .*|.*'NoneType'>)$"
)
# Without a class in the config, the arguments of the module are taken for those of Lightning's base class.
MISSING_CLASS = re.compile(
    r"No module named|has no attribute|arguments are required|cannot import|\bLightning(Data)?Module: Option "
)
MAX_TOLD = 160


@dataclass(frozen=True, kw_only=True)
class Configured:
    """The objects that a config builds.

    Args:
        callbacks: The merge callbacks among the Trainer's.
    """

    trainer: Trainer
    module: LightningModule
    datamodule: LightningDataModule | None
    callbacks: list[CheckpointMergeCallback]


def build(
    config: Mapping[str, Any],
    *,
    model_class: str | None = None,
    data_class: str | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Configured:
    """Build Trainer, module and datamodule as LightningCLI does.

    Args:
        config: A config for ``fit``, as YAML or ``SaveConfigCallback`` have it.
        model_class: Import path, where the user's own LightningCLI fixes the class and the config leaves it out.
        data_class: The same for the datamodule.
        trainer: Arguments that take the place of the config's.

    Raises:
        ConfigError: The config does not fit the classes.
    """
    sections = dict(config["fit"] if isinstance(config.get("fit"), Mapping) else config)
    # Arguments of `fit` itself: LightningCLI has no place for them where it only builds.
    for name in ("ckpt_path", "weights_only", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"):
        sections.pop(name, None)
    sections["trainer"] = {**(sections.get("trainer") or {}), **(trainer or {})}
    try:
        with warnings.catch_warnings():
            # It wants no arguments beside a command line, which is ours.
            warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter")
            cli = LightningCLI(
                _imported(model_class),
                _imported(data_class),
                run=False,
                args=sections,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False},
            )
    except (SystemExit, Exception) as error:  # the first is how some parsers refuse
        if (own := _own_error(error)) is not None:
            raise ConfigError(str(own)) from error
        # The name of the parser's own class means nothing to a user.
        kind = "" if type(error).__name__ == "ArgumentError" else f"{type(error).__name__}: "
        told = essence(str(error))
        raise ConfigError(f"the config must be one that `fit` runs with, got {kind}{told}. {_remedy(told)}") from error
    callbacks: list[Callback] = getattr(cli.trainer, "callbacks")  # noqa: B009 - set where mypy cannot see it
    return Configured(
        trainer=cli.trainer,
        module=cli.model,
        datamodule=cli.datamodule,
        callbacks=[c for c in callbacks if isinstance(c, CheckpointMergeCallback)],
    )


def _imported(path: str | None) -> Any:
    return None if path is None else imported(path)


def imported(path: str) -> Any:
    """Return what an import path names.

    Raises:
        ConfigError: There is nothing of that name.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"a class or function must be named by its import path, got {path!r}: {error}.") from error


def _own_error(error: BaseException) -> CkmergeError | None:
    """Return our own error, if a parser has buried one in all the types that an argument could have."""
    innermost: BaseException | None = error
    while innermost is not None and not isinstance(innermost, CkmergeError):
        innermost = innermost.__cause__ or innermost.__context__
    return innermost


def _remedy(told: str) -> str:
    if MISSING_CLASS.search(told):
        return (
            "Run from the directory where training was started, or name classes that the config leaves out with "
            "--model-class and --data-class."
        )
    return "Correct that entry of the config."


def essence(text: str) -> str:
    """Return the line that matters of jsonargparse's account of all the types that an argument could have."""
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines() if line.strip()]
    problems = [i for i, (_, line) in enumerate(lines) if PROBLEM.search(line)]
    where = []
    if problems:
        start, indent = problems[-1], lines[problems[-1]][0]
        where += PROBLEM.findall(lines[start][1])
        lines = list(itertools.takewhile(lambda line: line[0] > indent, lines[start + 1 :]))
    where += [key for _, line in lines for key in PARSER_KEY.findall(line)]
    told = [line.removeprefix("- ") for _, line in lines if not UNTELLING.match(line)]
    return ": ".join([*where, "; ".join(line[:MAX_TOLD] for line in told).rstrip(".") or text.partition("\n")[0]])
