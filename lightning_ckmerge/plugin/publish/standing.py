"""The end of a run: its best artifact measured against its final weights, on the same batches."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.standing import Standing
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.core.layout import as_real
from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.specs import split_name
from lightning_ckmerge.distributed.comm import together
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.plugin.evaluate.scorer import ScorerMaker
from lightning_ckmerge.plugin.publish.publisher import Publisher
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.search.interval import score_gain


def compare(
    best: Artifact, scorer_maker: ScorerMaker, model: RankModel, *, step: int, run_id: str, known: Score | None
) -> Standing:
    """Measure a run's best artifact and the live weights on the confirmation half. All ranks call it together.

    Args:
        best: The artifact.
        scorer_maker: Of the run.
        model: The live weights, which are left as they are.
        step: Theirs.
        run_id: The run's.
        known: The live weights' score on that half, where a search has measured it.

    Raises:
        ArtifactError: The artifact is damaged, or not of this model.
    """
    manifest = best.manifest
    with together(model.comm):
        best.check_files()
        # A mean, of any steps: a point of this very step would stand for the live weights.
        segment = Segment(kind="mean", first_step=1, last_step=manifest["step"])
        snapshot = Snapshot(segment=segment, sha256=None, tensors=_own_parts(best, model))
    with scorer_maker.paused(lambda: [snapshot], step) as scorer:
        latest = known if known is not None else scorer.score([0.0, 1.0], "confirm")
        merged = scorer.score([1.0, 0.0], "confirm")
    _, interval = score_gain(merged, latest, sign_of(manifest["mode"]))
    return Standing(
        run_id=run_id,
        monitor=manifest["monitor"],
        mode=manifest["mode"],
        step=step,
        value=latest.value,
        is_final=True,
        best=best.path.name,
        best_step=manifest["step"],
        best_value=merged.value,
        interval=interval,
    )


def measure_best(
    publisher: Publisher, scorer_maker: ScorerMaker, model: RankModel, *, step: int, run_id: str, known: Score | None
) -> Standing | None:
    """Measure the run's best artifact and its final weights on the same batches, unless a search at this step has.

    Args:
        publisher: Of the run; it is told.
        scorer_maker: As for ``compare``.
        model: As for ``compare``.
        step: As for ``compare``.
        run_id: As for ``compare``.
        known: As for ``compare``.

    Returns:
        How they stand; ``None`` if there is no best one, or it cannot be put into the module.
    """
    best, standing = publisher.best(), publisher.standing()
    if best is None or model.adapter_merge == "products":
        return None
    if standing is not None and standing.step == standing.best_step == step:
        standing = replace(standing, is_final=True)
    else:
        model.ownership.check_frozen()
        standing = compare(best, scorer_maker, model, step=step, run_id=run_id, known=known)
    publisher.record(standing)
    publisher.show_run()
    return standing


def _own_parts(artifact: Artifact, model: RankModel) -> list[Tensor]:
    """Return this rank's parts of the artifact's tensors, in the layout's order."""
    weights, parts = artifact.tensors(), list[Tensor]()
    for slot in model.layout.slots:
        name, box = split_name(slot.name, slot.shape)
        tensor = as_real(weights[name]) if name in weights else None
        if tensor is None or tuple(tensor.shape) != model.ownership.shapes[name]:
            found = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ArtifactError(
                f"an artifact must hold the tensors of its run's model, got {found} for {name!r} in {artifact.path}. "
                "Resume with the model of the run."
            )
        flat = tensor if tensor.dim() == len(box.ranges_D) else tensor.reshape(-1)
        parts.append(flat[tuple(slice(*r) for r in box.ranges_D)])
    return parts
