"""The pilot study of checkpoints on disk: which to merge, how many, and how, on the user's own run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_ckmerge.artifact.manifest import software
from lightning_ckmerge.checkpoints.formats import Source
from lightning_ckmerge.config import BufferConfig, EvaluationConfig, MergeSettings
from lightning_ckmerge.core.geometry import measure_geometry
from lightning_ckmerge.core.objectives import Mode, make_objectives
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.dirpath import find_fault, local_root_of
from lightning_ckmerge.plugin.evaluate.scorer import CandidateScorer
from lightning_ckmerge.plugin.offline.scoring import CheckpointScoring, at_train_start, data_of, make_trainer
from lightning_ckmerge.plugin.offline.search import find_sources
from lightning_ckmerge.report.study import render_study_html
from lightning_ckmerge.search.problem import Half
from lightning_ckmerge.studies.pilot.advice import advise
from lightning_ckmerge.studies.pilot.findings import find
from lightning_ckmerge.studies.pilot.ledger import Ledger
from lightning_ckmerge.studies.pilot.plan import Merge, StudyPlan, make_plan
from lightning_ckmerge.studies.pilot.study import run_study
from lightning_ckmerge.tensorfiles.durable import file_record, replace_text

STUDY_NAME, PAGE_NAME = "study.json", "study.html"
SCHEMA_VERSION = 1

OnPlanned = Callable[[StudyPlan, int], None]
OnEvaluated = Callable[[int, int], None]


def study_checkpoints(
    module: LightningModule,
    val_dataloaders: Any,
    paths: str | Path | Sequence[str | Path],
    *,
    monitor: str = "val_loss",
    mode: Mode = "min",
    dirpath: str | Path = "study",
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 - frozen
    max_evaluations: int | None = None,
    train_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    key: str | None = None,
    last: int | None = None,
) -> dict[str, Any]:
    """Return which checkpoints of a run to merge, how many, and how, as its own validation answers.

    ``dirpath`` gets the answers as ``study.json``, a page, ``study.html``, and the evaluations, one by one. Called
    again after an interruption, it goes on. The number of evaluations is logged once the newest
    checkpoint has been scored, which tells whether earlier evaluations still hold.

    Args:
        module: The LightningModule that was trained, built as it was; it gets the newest checkpoint's weights.
        val_dataloaders: The loaders that merges are scored on, as ``Trainer.fit`` takes them.
        paths: Checkpoints, as ``search_checkpoints`` takes them.
        monitor: The metric, as the callback's.
        mode: As the callback's.
        dirpath: Where the study goes.
        evaluation: On what merges are scored. ``staged`` has no say: all merges see all batches of their half.
        max_evaluations: The most evaluations; the map then takes fewer checkpoints, denser towards the newest.
            ``None``: all pairs, about the square of the number of checkpoints.
        train_dataloaders: Training loaders, which ``evaluation.recalibrate_batches`` needs.
        trainer: Arguments for the Trainer, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``; one device.
        key: The entry that holds the weights in a torch file, where it is not Lightning's.
        last: Use the newest so many checkpoints.

    Returns:
        The content of ``study.json``; ``["advice"]["text"]`` is a paragraph, ``["advice"]["yaml"]`` the config to use.

    Raises:
        ArtifactError: The checkpoints cannot be read, or do not fit the module.
        ConfigError: An argument is outside its range.
        MonitorError: Validation does not log ``monitor``.

    Source:
        The pilot experiments of Liu et al. 2024, arXiv:2403.19390.
    """
    settings = MergeSettings(
        objectives=make_objectives(monitor, mode),
        dirpath=dirpath,
        buffer=BufferConfig(snapshot="point"),
        evaluation=evaluation,
        on_error="raise",
    )
    sources = find_sources(paths, key, last)
    data = data_of(module, train_dataloaders, val_dataloaders, settings.evaluation)
    made = make_trainer(trainer)
    return study_sources(
        made,
        module,
        data,
        settings,
        sources,
        local_root_of(made, dirpath),
        max_evaluations=max_evaluations,
        on_planned=lambda plan, num_known: rank_zero_info(planned(plan, num_known)),
    )


def study_sources(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    settings: MergeSettings,
    sources: Sequence[Source],
    dirpath: Path,
    *,
    max_evaluations: int | None = None,
    on_planned: OnPlanned = lambda plan, num_known: None,
    on_evaluated: OnEvaluated = lambda amount, total: None,
) -> dict[str, Any]:
    """Study checkpoints, the newest being the latest weights, and return the content of ``study.json``.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: Gets the newest checkpoint's weights.
        data: What ``fit`` takes beside the module.
        settings: On what is scored, and by which metric: the first.
        sources: Checkpoints, oldest first, each with its step.
        dirpath: Where the study goes.
        max_evaluations: The most evaluations.
        on_planned: Told of the plan, and of how many evaluations are there already, once the newest checkpoint has been
            scored and before anything else is.
        on_evaluated: Told of each evaluation, and of how many there are in all.

    Raises:
        ConfigError: Nothing can be written to ``dirpath``.
    """
    if fault := find_fault(dirpath):
        raise ConfigError(fault)
    # Before the data are set up, which may take long.
    make_plan(len(sources), max_evaluations)

    def study(trainer: Trainer, callback: Callback) -> dict[str, Any]:
        own = OfflineStudy(settings, trainer, callback, sources, dirpath, max_evaluations)
        return own.run(on_planned, on_evaluated)

    return at_train_start(trainer, module, data, study)


def planned(plan: StudyPlan, num_known: int) -> str:
    """Return what a study will take, in a line.

    Args:
        plan: Its plan.
        num_known: Evaluations that are there from before.
    """
    # The newest checkpoint has been scored by now: it tells whether the data are the same.
    before = f" {num_known} are there from before." if num_known > 1 else ""
    return f"A study of {plan.told()}{before}"


class OfflineStudy:
    """One study of checkpoints on disk.

    Args:
        settings: On what is scored, and by which metric: the first.
        trainer: The Trainer, inside ``fit``, before the first step.
        callback: Told of batches in place of the muted others.
        sources: Checkpoints, oldest first, each with its step.
        dirpath: Where the study goes.
        max_evaluations: The most evaluations.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        sources: Sequence[Source],
        dirpath: Path,
        max_evaluations: int | None,
    ) -> None:
        self._objective = settings.objectives[0]
        self._settings = settings
        self._sources = sources
        self._dirpath = dirpath
        self._offline = CheckpointScoring(settings, trainer, callback, sources)
        # The sum of low-rank products has no tensors of which a great circle could be taken.
        self._has_circles = self._offline.model.adapter_merge != "products"
        self._plan = make_plan(len(sources), max_evaluations, slerp=self._has_circles)

    def run(self, on_planned: OnPlanned, on_evaluated: OnEvaluated) -> dict[str, Any]:
        """Score, write and return the study."""
        start = time.monotonic()
        with self._offline.paused() as scorer:
            checkpoints = self._checkpoints(scorer)
            ledger = self._open_ledger(scorer, checkpoints)
            scores = run_study(
                self._plan,
                lambda merge, half: self._evaluate(scorer, merge, half),
                self._objective.sign,
                ledger,
                can_confirm=scorer.can_confirm,
                tolerance=scorer.tolerance,
                on_begun=lambda: on_planned(self._plan, len(ledger)),
                on_scored=on_evaluated,
            )
            is_parameter = [slot.role == "parameter" for slot in self._offline.model.layout.slots]
            geometry = measure_geometry(
                [
                    [t for t, counts in zip(s.tensors, is_parameter, strict=True) if counts]
                    for s in scorer.merger.snapshots_K
                ]
            )
            halves = {half: list(scorer.num_batches(half)) for half in ("search", "confirm")}
            notes = list(scorer.notes())
        steps_K = [c["step"] for c in checkpoints]
        found = find(scores, steps_K)
        document = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "monitor": self._objective.monitor,
            "mode": self._objective.mode,
            "checkpoints": checkpoints,
            "evaluation": {
                "search_batches": halves["search"],
                "confirm_batches": halves["confirm"],
                "num_evaluations": scores.num_evaluations,
                "most_evaluations": self._plan.num_evaluations,
                "seconds": time.monotonic() - start,
            },
            **found,
            "geometry": asdict(geometry),
            "advice": advise(found, steps_K, self._objective.monitor, self._objective.mode),
            "notes": notes,
            "software": software(),
        }
        replace_text(self._dirpath / STUDY_NAME, json.dumps(document, indent=1, allow_nan=False) + "\n")
        replace_text(self._dirpath / PAGE_NAME, render_study_html(document))
        return document

    def _evaluate(self, scorer: CandidateScorer, merge: Merge, half: Half) -> Score:
        if merge.path == "linear":
            return scorer.score(merge.coefficients(len(self._sources)), half)
        older, newer = merge.places
        return scorer.score_written(
            lambda: self._offline.model.slerp(scorer.merger, older, newer, merge.lam),
            half,
        )

    def _checkpoints(self, scorer: CandidateScorer) -> list[dict[str, Any]]:
        """The checkpoints by what they hold; the newest one's files are the only ones that nobody has hashed yet."""
        records = scorer.merger.records()
        hashes: list[list[str | None]] = [list(r.files_sha256) or [r.sha256] for r in records[:-1]]
        hashes.append([file_record(path)["sha256"] for path in self._sources[-1].files])
        return [
            {"path": str(source.path), "step": source.step, "sha256": found}
            for source, found in zip(self._sources, hashes, strict=True)
        ]

    def _open_ledger(self, scorer: CandidateScorer, checkpoints: Sequence[Mapping[str, Any]]) -> Ledger:
        config = self._settings.evaluation
        identity = {
            "checkpoints": [[c["step"], c["sha256"]] for c in checkpoints],
            "monitor": asdict(self._objective),
            "evaluation": [
                config.limit_batches,
                config.dataloader,
                config.confirm_fraction,
                config.recalibrate_batches,
            ],
            "batches": [scorer.num_batches(half) for half in ("search", "confirm")],
            "adapters": self._offline.model.adapter_merge,
        }
        sha256 = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return Ledger(self._dirpath / f"evaluations-{sha256[:8]}.jsonl", sha256)
