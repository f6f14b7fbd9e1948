"""Logs a search to the Trainer's loggers: numbers, a picture, and the artifact in each logger's own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.plugin.evaluate.lightning_loop import uploads_checkpoints
from lightning_ckmerge.plugin.progress import say
from lightning_ckmerge.report.figure import draw_search
from lightning_ckmerge.tensorfiles.writer import WEIGHTS_NAME

KEY = "merge/search"
ARTIFACT_TYPE = "merge"


class Announcer:
    """Tells a Trainer's loggers of searches. A failing logger causes one warning and leaves the others alone."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._warned: set[int] = set()

    def announce(self, artifact: Artifact, searched_s: float) -> None:
        """Log one search, on rank 0.

        Args:
            artifact: The published artifact.
            searched_s: Seconds that all searches have taken, this one included.
        """
        if not self._trainer.is_global_zero:
            return
        values, step = scalars(artifact.manifest, searched_s), artifact.manifest["step"]
        with isolate_rng():  # a logger's random draws must not reach training
            for logger in self._trainer.loggers:
                try:
                    logger.log_metrics(values, step=step)
                    if (log := _own_way(logger)) is not None:
                        log(logger, artifact, step)
                except Exception as error:
                    self._warn(logger, error)

    def _warn(self, logger: Any, error: Exception) -> None:
        if id(logger) in self._warned:
            return
        self._warned.add(id(logger))
        told = (
            f"{type(logger).__name__} could not log a merge search: {type(error).__name__}: {error}. The artifact is "
            "published. This warning appears once."
        )
        say(self._trainer, told, rank_zero_warn)


def scalars(manifest: Manifest, searched_s: float) -> dict[str, float]:
    """Return the numbers that a search logs."""
    verdict, cost = manifest["verdict"], manifest["cost"]
    candidates = [*manifest["anchors"], *manifest["trials"]]
    values = {c["name"]: (c["confirm"] or c["search"])["value"] for c in candidates}
    found = {
        f"merge/{manifest['monitor']}": values[verdict["winner"]],
        **{f"merge/{other['monitor']}": other["value"] for other in verdict.get("others", ())},
        "merge/latest": values["latest"],
        "merge/best_anchor": values[verdict["best_anchor"]],
        "merge/gain": verdict["gain"],
        **dict(zip(("merge/gain_low", "merge/gain_high"), verdict["interval"] or (), strict=False)),
        "merge/seconds": sum(cost["seconds"].values()),
        "merge/seconds_total": searched_s,
        **{f"merge/{name}": value for name, value in (manifest["coordinates"] or {}).items()},
    }
    if cost["share_of_training"] is not None:
        found["merge/share_of_training"] = cost["share_of_training"]
    # JSON knows no such number.
    return {name: math.nan if value is None else value for name, value in found.items()}


def _own_way(logger: Any) -> Callable[[Any, Artifact, int], None] | None:
    """By name: `pytorch_lightning` has classes of its own. Other loggers, CSVLogger too, take numbers alone."""
    ways = {"TensorBoardLogger": _to_tensorboard, "WandbLogger": _to_wandb, "MLFlowLogger": _to_mlflow}
    return next((ways[cls.__name__] for cls in type(logger).__mro__ if cls.__name__ in ways), None)


def _to_tensorboard(logger: Any, artifact: Artifact, step: int) -> None:
    verdict = artifact.manifest["verdict"]
    logger.experiment.add_text(
        "merge/verdict", f"**{verdict['status']}**: {verdict['sentence']} `{artifact.path}`", step
    )
    if (figure := draw_search(artifact.manifest)) is not None:
        logger.experiment.add_figure(KEY, figure, step, close=False)


def _to_wandb(logger: Any, artifact: Artifact, step: int) -> None:
    import wandb

    verdict = artifact.manifest["verdict"]
    if (figure := draw_search(artifact.manifest)) is not None:
        logger.log_image(KEY, [figure], step=step)
    entry = wandb.Artifact(
        f"merge-{logger.experiment.id}",
        ARTIFACT_TYPE,
        metadata={"step": step, **verdict},
        description=verdict["sentence"],
    )
    for name in _files(artifact):
        if _is_weights(name) and not uploads_checkpoints(logger):
            entry.add_reference((artifact.path / name).as_uri(), name=name, checksum=False)
        else:
            entry.add_file(str(artifact.path / name), name=name)
    logger.experiment.log_artifact(entry, aliases=["latest", f"step-{step}", verdict["status"]])


def _to_mlflow(logger: Any, artifact: Artifact, step: int) -> None:
    client, run_id, folder = logger.experiment, logger.run_id, f"merges/{artifact.path.name}"
    if (figure := draw_search(artifact.manifest)) is not None:
        client.log_figure(run_id, figure, f"{folder}/search.png")
    for name in _files(artifact):
        if uploads_checkpoints(logger) or not _is_weights(name):
            parent = name.rpartition("/")[0]
            client.log_artifact(run_id, str(artifact.path / name), f"{folder}/{parent}" if parent else folder)
    client.set_tag(run_id, "merge.artifact", str(artifact.path))


def _files(artifact: Artifact) -> list[str]:
    return ["manifest.json", *artifact.manifest["files"]]


def _is_weights(name: str) -> bool:
    return bool(WEIGHTS_NAME.fullmatch(name.rpartition("/")[2])) or name == "model.ckpt" or name.startswith("hf/")
