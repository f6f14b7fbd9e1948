"""Writes the results of a search: the winner, merged into the module for that, and others of its Pareto front."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.artifact.history import history_of
from lightning_ckmerge.artifact.load import Artifact, best_target
from lightning_ckmerge.artifact.manifest import Manifest, build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore, Extra
from lightning_ckmerge.artifact.runs import Place
from lightning_ckmerge.artifact.standing import Standing, read_standing, write_standing
from lightning_ckmerge.artifact.timeline import Validated, skip_record
from lightning_ckmerge.artifact.upload import Uploader
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import MergeSettings
from lightning_ckmerge.core.outcome import SearchOutcome
from lightning_ckmerge.distributed.comm import on_rank_zero
from lightning_ckmerge.distributed.gather import GatheredWeights
from lightning_ckmerge.errors import CkmergeError
from lightning_ckmerge.pipeline import SearchJob
from lightning_ckmerge.plugin.evaluate.lightning_loop import dump_weights, write_checkpoint
from lightning_ckmerge.plugin.progress import harmless, say
from lightning_ckmerge.plugin.publish.loggers import Announcer
from lightning_ckmerge.plugin.publish.pretrained import Pretrained
from lightning_ckmerge.plugin.publish.reports import summarize_run, write_search_report
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.report.run import write_run_report
from lightning_ckmerge.report.text import ReportPlace

FRONT_NAME = "front"


class Publisher:
    """Publishes the searches of one ``fit``.

    Args:
        settings: The callback's settings.
        trainer: The Trainer.
        place: Where artifacts go.
        model: Where merges are, as all ranks publish them.
        keeps_newest: Whether the newest accepted merge keeps its weights beside better ones: somebody waits for it.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        place: Place,
        model: RankModel,
        *,
        keeps_newest: bool = False,
    ) -> None:
        config, objective = settings.artifact, settings.objectives[0]
        self._trainer = trainer
        self._module: LightningModule = trainer.lightning_module
        self._model = model
        self._is_sharded = model.ownership.is_sharded
        self._comm = model.comm
        self._dirpath = place.dirpath
        self._run_id = place.run_id
        self._writes_checkpoint = "ckpt" in config.formats
        self._pretrained = (
            Pretrained(trainer, config, has_adapters=model.adapters is not None) if "hf" in config.formats else None
        )
        self._monitor = objective.monitor
        self._announcer = Announcer(trainer)
        self._applies_last = settings.save_top_k == 0 and settings.apply == "on_train_end"
        self._store = ArtifactStore(
            place.dirpath,
            mode=objective.mode,
            # The artifact to apply has to stay until then.
            save_top_k=max(settings.save_top_k, 1) if self._applies_last else settings.save_top_k,
            max_shard_size=parse_size(config.max_shard_size),
            keeps_newest=keeps_newest,
        )
        self._uploader = None
        if self._comm.rank == 0 and place.url is not None:
            warn = partial(say, trainer, tell=rank_zero_warn)
            self._uploader = Uploader(place.dirpath, place.url, warn)
            self._uploader.sync()
        if self._comm.rank == 0 and place.source == place.dirpath:
            with contextlib.suppress(CkmergeError, OSError):  # the next accepted merge tries again
                self._store.show_best(place.run_id, objective.monitor)

    def publish(self, outcome: SearchOutcome, job: SearchJob, validation: Sequence[Validated]) -> Artifact:
        """Publish the winner, or the record alone of a rejected search, and return its artifact.

        Args:
            outcome: The search.
            job: It merges into the module, which is left so.
            validation: The run's own validations since the search before, for the timeline.
        """
        artifact = self._publish(self._manifest(outcome), outcome, job, validation)
        if self._comm.rank == 0:
            with contextlib.suppress(CkmergeError, OSError):  # the artifact stands
                self._store.compare(artifact.manifest)
        return artifact

    def _publish(
        self, manifest: Manifest, outcome: SearchOutcome, job: SearchJob, validation: Sequence[Validated]
    ) -> Artifact:
        publish = partial(self._store.publish, manifest, validation=validation, comm=self._comm)
        if not on_rank_zero(self._comm, lambda: self._store.keeps_weights(manifest)):
            return publish(None, extras=[self._write_report])
        weights = self._merged(outcome, job)
        extras: list[Extra] = [self._write_checkpoint] if self._writes_checkpoint else []
        if self._pretrained is not None:
            extras.append(partial(self._pretrained.write, weights=weights, comm=self._comm))
        # Other merges take the winner's place in the module, and the report lists the files.
        extras += [partial(self._check, outcome, job), partial(self._write_front, outcome, job), self._write_report]
        return publish(weights, extras=extras)

    def best(self) -> Artifact | None:
        """Return the run's best accepted artifact, on all ranks."""
        target = on_rank_zero(self._comm, lambda: best_target(self._dirpath))
        return Artifact.open(target, verify=False) if target is not None else None

    def standing(self) -> Standing | None:
        """Return how it stood at the last search, on all ranks."""
        return on_rank_zero(self._comm, lambda: read_standing(self._dirpath))

    def record(self, standing: Standing) -> None:
        """Write down how it stands."""
        on_rank_zero(self._comm, lambda: write_standing(self._dirpath, standing))

    def forget(self) -> None:
        """Keep records alone, where that was asked for: the artifact to apply has been applied."""
        if self._applies_last:
            on_rank_zero(self._comm, self._store.keep_records)

    def announce(self, outcome: SearchOutcome, artifact: Artifact, searched_s: float) -> None:
        """Tell people and loggers of a search that has been published.

        Args:
            outcome: The search.
            artifact: The published artifact.
            searched_s: Seconds that all searches of the run have taken, this one included.
        """
        verdict = outcome.verdict
        with harmless("Announcing the search", self._trainer):
            found = f"Merge search at step {outcome.step}: {verdict.sentence} {whereabouts(artifact, self._store)}"
            say(self._trainer, "\n".join([found, *(f"  Note: {warning}" for warning in verdict.warnings)]))
        self.show_run()
        with harmless("Logging the search", self._trainer):
            self._announcer.announce(outcome, artifact, searched_s)

    def show_run(self) -> None:
        """Show the run's searches so far. A failure here never affects a published artifact."""
        if self._comm.rank == 0:
            with harmless("The run's report", self._trainer):
                write_run_report(self._dirpath, history_of(self._dirpath))
            self._upload()

    def record_skip(self, step: int, reason: str, seconds: float, *, may_fail: bool = False) -> None:
        """Enter a search that did not take place, or was given up, into the run's history.

        Args:
            step: When it was due.
            reason: Why there is no merge.
            seconds: The time that it took anyway.
            may_fail: Say nothing if it cannot be written: the fault that is to be recorded may be the disk's.
        """
        if self._comm.rank == 0:
            guard = contextlib.suppress(Exception) if may_fail else harmless("A skipped search's record", self._trainer)
            with guard:
                record = skip_record(step, self._monitor, self._store.mode, reason, seconds)
                self._store.append_skip({**record, "run_id": self._run_id})
                write_run_report(self._dirpath, history_of(self._dirpath))
            self._upload()

    def sum_up(self) -> None:
        """Announce the findings of the run's searches."""
        if self._comm.rank == 0:
            with harmless("The summary of the run's searches", self._trainer):
                if text := summarize_run(self._dirpath):
                    say(self._trainer, text)

    def close(self) -> None:
        """Wait for uploads. On rank 0, which has them."""
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None

    def _upload(self) -> None:
        if self._uploader is not None:
            self._uploader.sync()

    def _manifest(self, outcome: SearchOutcome) -> Manifest:
        manifest = {
            **build_manifest(outcome),
            "run_id": self._run_id,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if self._model.ownership.not_dense:
            manifest["left_out"] = self._model.ownership.not_dense
        if self._model.adapters is not None:
            manifest["adapters"] = self._model.adapters.describe(outcome.winner.candidate.coefficients)
        return manifest

    def _merged(self, outcome: SearchOutcome, job: SearchJob) -> GatheredWeights:
        job.scorer.load(outcome.winner.candidate.coefficients)
        return GatheredWeights(self._module, self._comm)

    def _check(self, outcome: SearchOutcome, job: SearchJob, path: Path, manifest: Manifest) -> None:
        """Read the weights back from the disk, and let validation confirm that they are the measured ones."""
        artifact = Artifact(path, manifest)
        # Without a shared file system rank 0 alone has the files.
        if artifact.has_weights and all(self._comm.exchange(path.is_dir())):
            job.scorer.check(outcome.winner, partial(self._model.read, artifact))

    def _write_front(self, outcome: SearchOutcome, job: SearchJob, path: Path, _: Manifest) -> None:
        """Write the other merges of the front, each an artifact of its own, except rejected ones."""
        members = outcome.members()
        kept = on_rank_zero(self._comm, lambda: [m.verdict.status != "rejected" for m in members])
        for member, keep in zip(members, kept, strict=True):
            if keep:
                self._store.write_member(
                    path / FRONT_NAME / member.winner.candidate.name,
                    self._manifest(member),
                    self._merged(member, job),
                    extras=[partial(self._check, member, job), self._write_report],
                    comm=self._comm,
                )

    def _write_checkpoint(self, path: Path, _: Manifest) -> None:
        checkpoint = dump_weights(self._trainer)  # in which the user's hooks may fail
        self._comm.exchange(None)
        write_checkpoint(self._trainer, checkpoint, path / "model.ckpt", is_sharded=self._is_sharded)

    def _write_report(self, path: Path, manifest: dict[str, Any]) -> None:
        if self._comm.rank == 0:
            with harmless("The search's report", self._trainer):
                write_search_report(path, manifest, self._lies(path, manifest))

    def _lies(self, path: Path, manifest: Manifest) -> ReportPlace:
        """The place, once published, of the artifact being written at ``path``."""
        place = self._store.free_path(f"step={manifest['step']:09d}")
        if path.parent.name == FRONT_NAME:
            return ReportPlace(path=place / FRONT_NAME / path.name, up="../../report.html")
        return ReportPlace(path=place)


def whereabouts(artifact: Artifact, store: ArtifactStore) -> str:
    """Return where the artifact just published is, by its own name, since ``best`` moves, and which ones it displaced.

    Of a record without weights it says why they were not kept.
    """
    gone = f"; `save_top_k` has removed {', '.join(store.removed)}" if store.removed else ""
    if artifact.has_weights:
        return f"Artifact: {artifact.path}{gone}"
    if artifact.manifest["verdict"]["status"] == "rejected":
        why = "the search was rejected"
    else:
        why = f"`save_top_k` is {store.save_top_k}" + ", and better merges are kept" * (store.save_top_k > 0)
    return f"Record: {artifact.path} (weights not kept: {why}){gone}"
