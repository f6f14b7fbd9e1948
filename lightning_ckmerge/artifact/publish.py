"""Publishes artifacts: each by one rename, ``best`` after it, and only then are worse ones removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.load import ARTIFACT_NAME, Artifact, best_target
from lightning_ckmerge.artifact.manifest import Manifest, read_manifest, write_manifest
from lightning_ckmerge.artifact.runs import BEST_NAME, LATER_RUN, POINTER_NAME, find_run, is_alive
from lightning_ckmerge.artifact.standing import STANDING_NAME, Standing, write_standing
from lightning_ckmerge.artifact.timeline import Validated, append_timeline, timeline_record
from lightning_ckmerge.artifact.weights import Weights, write_weights
from lightning_ckmerge.core.objectives import Mode, sign_of
from lightning_ckmerge.distributed.comm import Alone, Comm, on_rank_zero
from lightning_ckmerge.errors import ArtifactError, PeerError
from lightning_ckmerge.tensorfiles.durable import FileRecord, fsync, fsync_tree, records, replace_json, temporary

# A crash may leave these.
TEMPORARY_NAME = re.compile(r"\.tmp-(step=\d{9,}(-v\d+)?|best|(best|run|standing)\.json|report\.(html|md))-[0-9a-f]{8}")
REPORT_NAMES = ("report.html", "report.md")

Extra = Callable[[Path, Manifest], None]


class ArtifactStore:
    """The artifacts of one run.

    Args:
        dirpath: Directory of this run alone; created when needed.
        mode: Whether a lower (``min``) or a higher value is better.
        save_top_k: Artifacts that hold weights, by the winner's value on the confirmation half, accepted ones first;
            -1: all. ``best`` stays in any case, and so does the record of a search without weights. Unless it is 0, a
            newest merge that is unconfirmed stays, too: until a newer one, or until one is accepted.
        max_shard_size: Bytes above which weights are split over several files.
        keeps_newest: Whether the newest merge stays in any case, as though it were unconfirmed.

    Attributes:
        removed: Names of the artifacts that the last ``publish`` has removed, on rank 0.
    """

    def __init__(
        self, dirpath: Path, *, mode: Mode, save_top_k: int, max_shard_size: int, keeps_newest: bool = False
    ) -> None:
        self.dirpath = dirpath
        self.mode: Mode = mode
        self.save_top_k = save_top_k
        self.max_shard_size = max_shard_size
        self.keeps_newest = keeps_newest
        self.removed: list[str] = []

    def keeps_weights(self, manifest: Manifest) -> bool:
        """Whether an artifact of this search would hold its weights, or be a record only.

        A rejected search leaves a record; so does an accepted one that ``save_top_k`` better artifacts outrank, and any
        if that is 0.
        """
        status = manifest["verdict"]["status"]
        if status == "rejected" or self.save_top_k == 0:
            return False
        if status == "unconfirmed" or self.keeps_newest:
            return True
        own_rank = self._rank(manifest, manifest)
        better = [a for a in self._ranked(manifest) if self._rank(a.manifest, manifest) <= own_rank]
        return self.save_top_k == -1 or len(better) < self.save_top_k

    def publish(
        self,
        manifest: Manifest,
        weights: Weights | None,
        *,
        extras: Sequence[Extra] = (),
        validation: Sequence[Validated] = (),
        comm: Comm | None = None,
    ) -> Artifact:
        """Publish one search, and return its artifact, on every rank.

        A crash at any moment leaves the earlier artifacts and ``best`` as they were; staged files are removed by the
        next call.

        Args:
            manifest: As returned by ``build_manifest``; left unchanged. Rank 0's counts.
            weights: The merged model; ``None`` for a record. Not written where ``keeps_weights`` says no.
            extras: Called on every rank, in order, with the staging directory and the manifest, its ``files`` so far
                included. They add files or directories.
            validation: The run's own validations since the search before, for the timeline.
            comm: The ranks; ``None``: a process alone. Only rank 0 makes, moves and removes directories.

        Raises:
            ArtifactError: The disk or an extra failed.
        """
        comm = comm or Alone()
        step = f"step={manifest['step']:09d}"
        with _as_artifact_error(self.dirpath / step):
            staging = on_rank_zero(comm, lambda: self._open_staging(step))
            try:
                kept = weights if on_rank_zero(comm, lambda: weights and self.keeps_weights(manifest)) else None
                complete = self._stage(staging, manifest, kept, extras, comm)
                path = on_rank_zero(comm, lambda: self._move(staging, step, complete, validation))
            except BaseException:
                if comm.rank == 0:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        return Artifact(path.resolve(), complete)

    def compare(self, newest: Manifest) -> None:
        """Note how the best artifact stands against the weights of a search, on the same batches. For one rank."""
        ranked = self._ranked(newest)
        best = ranked[0] if ranked and ranked[0].manifest["verdict"]["status"] == "accepted" else None
        value = (newest["anchors"][0]["confirm"] or {}).get("value")
        if best is None or value is None or not _same_batches(best.manifest, newest):
            write_standing(self.dirpath, None)
            return
        standing = Standing(
            run_id=newest.get("run_id", ""),
            monitor=newest["monitor"],
            mode=self.mode,
            step=newest["step"],
            value=value,
            is_final=False,
            best=best.path.name,
            best_step=best.manifest["step"],
            best_value=best.manifest["verdict"]["value"],
        )
        write_standing(self.dirpath, standing)

    def show_best(self, run_id: str, monitor: str) -> None:
        """Let ``best`` be the run's own again, where a later run has shared its directory. For one rank."""
        own = [a for a in self._found() if _measured(a.manifest) == (run_id, monitor, self.mode)]
        if own:
            self._move_best(self._ranked(own[-1].manifest))

    def append_skip(self, record: dict[str, Any]) -> None:
        """Enter a search without an artifact, as ``skip_record`` returns it, into the timeline."""
        self.dirpath.mkdir(parents=True, exist_ok=True)
        append_timeline(self.dirpath, record)

    def keep_records(self) -> None:
        """Take the weights out of all artifacts, and let ``best`` name none: they have been applied. For one rank."""
        for artifact in list(self._found()):
            if artifact.has_weights:
                self._keep_record(artifact)
        for name in (BEST_NAME, POINTER_NAME, STANDING_NAME):
            (self.dirpath / name).unlink(missing_ok=True)

    def write_member(
        self, path: Path, manifest: Manifest, weights: Weights, *, extras: Sequence[Extra], comm: Comm
    ) -> None:
        """Write an artifact inside another that is being staged, such as a merge of the same search's Pareto front.

        Args:
            path: Its directory, which is made.
            manifest: As for ``publish``.
            weights: As for ``publish``.
            extras: As for ``publish``.
            comm: As for ``publish``.
        """
        on_rank_zero(comm, partial(path.mkdir, parents=True))
        complete = self._stage(path, manifest, weights, extras, comm)
        on_rank_zero(comm, lambda: write_manifest(path, complete))

    def _open_staging(self, step: str) -> Path:
        self.dirpath.mkdir(parents=True, exist_ok=True)
        self._sweep()
        staging = temporary(self.dirpath, step)
        staging.mkdir()
        return staging

    def _stage(
        self, staging: Path, manifest: Manifest, weights: Weights | None, extras: Sequence[Extra], comm: Comm
    ) -> Manifest:
        files: dict[str, FileRecord] = {}
        if weights is not None:
            files = write_weights(staging, weights, self.max_shard_size, comm)
        for extra in extras:
            extra(staging, {**manifest, "files": files})
            comm.exchange(None)  # all have written
            files = on_rank_zero(comm, partial(records, staging, files))
        return {**manifest, "files": files}

    def _move(self, staging: Path, step: str, complete: Manifest, validation: Sequence[Validated]) -> Path:
        """The manifest last, one rename, and only then the rest."""
        write_manifest(staging, complete)
        fsync_tree(staging)
        path = self.free_path(step)
        os.rename(staging, path)
        fsync(self.dirpath)
        append_timeline(self.dirpath, timeline_record(complete, path.name, validation))
        ranked = self._ranked(complete)
        self._move_best(ranked)
        self._retain(ranked, self._undecided(Artifact(path, complete)))
        return path

    def free_path(self, step: str) -> Path:
        """Return where an artifact of this name is published now."""
        path, version = self.dirpath / step, 0
        while os.path.lexists(path):
            version += 1
            path = self.dirpath / f"{step}-v{version}"
        return path

    def _ranked(self, like: Manifest) -> list[Artifact]:
        """Return the artifacts of one run and metric that hold weights, best first.

        Of equals the older comes first, or the newer where that is kept anyway: a search that is done again.
        """
        found = [a for a in self._found() if a.has_weights and _measured(a.manifest) == _measured(like)]
        if self.keeps_newest:
            found.reverse()
        return sorted(found, key=lambda a: self._rank(a.manifest, like))

    def _found(self) -> Iterator[Artifact]:
        """Yield the artifacts, oldest first."""
        for path in sorted(self.dirpath.glob("step=*"), key=_age):
            if ARTIFACT_NAME.fullmatch(path.name) and not path.is_symlink():
                with contextlib.suppress(ArtifactError):  # damaged or not ours: neither counted nor removed
                    yield Artifact(path, read_manifest(path))

    def _rank(self, manifest: Manifest, like: Manifest) -> tuple[bool, bool, float]:
        """Return a key that sorts better artifacts first; those measured on other batches than ``like`` come later."""
        verdict = manifest["verdict"]
        value = float("inf") if verdict["value"] is None else verdict["value"] * sign_of(self.mode)
        return verdict["status"] != "accepted", not _same_batches(manifest, like), value

    def _move_best(self, ranked: Sequence[Artifact]) -> None:
        accepted = [a for a in ranked if a.manifest["verdict"]["status"] == "accepted"]
        if not accepted:
            return
        _point(self.dirpath, accepted[0].path)
        shared = self.dirpath.parent
        if LATER_RUN.fullmatch(self.dirpath.name) and find_run(shared) == self.dirpath and not is_alive(shared):
            with contextlib.suppress(OSError, ArtifactError):  # where links are refused, tools know the last run
                _lend(shared, accepted[0].path)

    def _undecided(self, published: Artifact) -> Path | None:
        """Return the newest merge, if it is unconfirmed: more data may yet accept it. Or if it is kept anyway."""
        own = [a for a in self._found() if _measured(a.manifest) == _measured(published.manifest)]
        # After a resume from an earlier checkpoint, the newest is not that of the highest step.
        statuses = [(a.manifest["verdict"]["status"], a.path) for a in [*own, published]]
        status, path = next(((s, p) for s, p in reversed(statuses) if s != "rejected"), ("", None))
        return path if status == "unconfirmed" or self.keeps_newest else None

    def _retain(self, ranked: Sequence[Artifact], undecided: Path | None) -> None:
        self.removed = []
        if self.save_top_k == -1:
            return
        best = best_target(self.dirpath)
        undecided = undecided if self.save_top_k else None
        for artifact in ranked[self.save_top_k :]:
            if artifact.path.resolve() != best and artifact.path != undecided:
                self._remove(artifact)
                self.removed.append(artifact.path.name)

    def _keep_record(self, artifact: Artifact) -> None:
        files = {name: record for name, record in artifact.manifest["files"].items() if name in REPORT_NAMES}
        staging = temporary(self.dirpath, artifact.path.name)
        staging.mkdir()
        for name in files:
            shutil.copyfile(artifact.path / name, staging / name)
        write_manifest(staging, {**artifact.manifest, "files": files})
        fsync_tree(staging)
        self._remove(artifact)
        os.rename(staging, artifact.path)
        fsync(self.dirpath)

    def _remove(self, artifact: Artifact) -> None:
        # Renamed first: half removed, it would still look like an artifact.
        doomed = temporary(self.dirpath, artifact.path.name)
        os.rename(artifact.path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove the remains of a crash."""
        for path in self.dirpath.glob(".tmp-*"):
            if TEMPORARY_NAME.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _point(dirpath: Path, artifact: Path) -> None:
    """Let ``best`` name an artifact."""
    if (dirpath / BEST_NAME).resolve() == artifact.resolve():
        return
    link = temporary(dirpath, BEST_NAME)
    try:
        os.symlink(artifact.name, link, target_is_directory=True)
    except OSError:
        # Some network file systems, and Windows without developer mode, refuse links.
        replace_json(dirpath / POINTER_NAME, {"artifact": artifact.name})
        if (dirpath / BEST_NAME).is_symlink():
            (dirpath / BEST_NAME).unlink()
    else:
        os.replace(link, dirpath / BEST_NAME)
        (dirpath / POINTER_NAME).unlink(missing_ok=True)
    fsync(dirpath)


def _lend(dirpath: Path, artifact: Path) -> None:
    """Let the link ``best`` of a run that is over name a later run's artifact; its own stays in the pointer."""
    link = temporary(dirpath, BEST_NAME)
    os.symlink(artifact.relative_to(dirpath), link, target_is_directory=True)
    if (own := best_target(dirpath)) is not None:
        replace_json(dirpath / POINTER_NAME, {"artifact": own.name})
    os.replace(link, dirpath / BEST_NAME)
    fsync(dirpath)


def _same_batches(one: Manifest, other: Manifest) -> bool:
    return bool(one["evaluation"]["fingerprint"] == other["evaluation"]["fingerprint"])


def _measured(manifest: Manifest) -> tuple[str | None, str, str]:
    """Return the run, metric and mode, which two artifacts must share to be compared."""
    return manifest.get("run_id"), manifest["monitor"], manifest["mode"]


@contextlib.contextmanager
def _as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (ArtifactError, PeerError):
        raise
    except Exception as error:
        raise ArtifactError(
            f"an artifact must be written whole, got {type(error).__name__} for {path}: {error}. Earlier artifacts are "
            "untouched; free disk space or fix the cause, and the next search publishes again."
        ) from error


def _age(path: Path) -> tuple[int, int]:
    match = ARTIFACT_NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
