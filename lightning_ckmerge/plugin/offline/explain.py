"""The account of a published merge, scored by the run's own validation as in training.

Letters: K snapshots of the manifest, oldest first, the last one being the latest weights; S sources that are mixed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ckmerge.artifact.accounts import (
    SCHEMA_VERSION,
    Account,
    manifest_digest,
    read_account,
    write_account,
)
from lightning_ckmerge.artifact.history import history_of
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import software
from lightning_ckmerge.checkpoints.formats import Source, open_sources
from lightning_ckmerge.checkpoints.rebuild import kept_snapshots
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, EvaluationConfig, MergeSettings, SearchConfig
from lightning_ckmerge.core.layout import find_aliases
from lightning_ckmerge.core.objectives import make_objectives, sign_of
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Interval, Space
from lightning_ckmerge.errors import ArtifactError, CkmergeError, ConfigError, SearchError
from lightning_ckmerge.plugin.evaluate.scorer import CandidateScorer
from lightning_ckmerge.plugin.offline.scoring import CheckpointScoring, at_train_start, data_of, make_trainer
from lightning_ckmerge.plugin.publish.reports import write_account_page
from lightning_ckmerge.studies.account import figures
from lightning_ckmerge.studies.account.agreement import compare, labels_of
from lightning_ckmerge.studies.account.curvature import MAX_PRODUCTS, Curvature, find_curvature
from lightning_ckmerge.studies.account.importance import find_importances, scored_candidates
from lightning_ckmerge.studies.account.places import Places, Rows, measure, partition
from lightning_ckmerge.studies.account.stability import searches

Half = Literal["search", "confirm"]
Predict = Callable[[LightningModule, Any], Any]
# Latest weights on the search half, against what the search recorded: rounding explains no more.
TOLERANCE = 1e-3
# What an interruption may lose.
WRITE_EVERY_S = 2.0
# A product costs a forward pass, two backward passes, and what they keep.
PASSES_PER_PRODUCT = 4


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What an account is going to take.

    Args:
        num_evaluations: At most, of all batches of the half.
        by_figure: How many of them each figure takes.
        num_products: Products of a Hessian with a vector, at most.
        product_batches: Batches of each product.
        left_out: Figure -> why it is left out.
    """

    num_evaluations: int
    by_figure: dict[str, int]
    num_products: int
    product_batches: int
    left_out: dict[str, str]

    def __str__(self) -> str:
        parts = ", ".join(f"{key} {n}" for key, n in self.by_figure.items() if n)
        told = f"at most {self.num_evaluations} evaluations ({parts}; two of the ends)"
        if self.num_products:
            told += (
                f", and at most {self.num_products} products of a Hessian with a vector, each on "
                f"{self.product_batches} batches and as dear as {PASSES_PER_PRODUCT} forward passes of them"
            )
        return told


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What an account shall hold.

    Args:
        half: Which half of the validation batches scores the figures: ``confirm``, which the search did not see.
        max_evaluations: Most evaluations; figures that do not fit are left out. ``None``: no limit.
        curvature_batches: Batches of the half for the curvature; 0: none.
        predict: Gets the module and a batch, and returns predictions, or a pair of predictions and labels.
        on_forecast: Told of what is going to be done, before it begins.
        on_scored: Told of the evaluations and products done, and of how many there are at most.
    """

    half: Half = "confirm"
    max_evaluations: int | None = None
    curvature_batches: int = 4
    predict: Predict | None = None
    on_forecast: Callable[[Forecast], None] = lambda forecast: None
    on_scored: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        if self.max_evaluations is not None and self.max_evaluations < 2:
            raise ConfigError(
                f"`max_evaluations >= 2` must hold, got {self.max_evaluations}. The latest weights and the merge are "
                "scored in any case."
            )
        if self.curvature_batches < 0:
            raise ConfigError(f"`curvature_batches >= 0` must hold, got {self.curvature_batches}. 0 measures none.")
        if self.half not in ("search", "confirm"):
            raise ConfigError(f"`half` must be 'search' or 'confirm', got {self.half!r}.")


def explain(
    artifact: str | Path | Artifact,
    module: LightningModule,
    val_dataloaders: Any,
    *,
    checkpoints: str | Path | Sequence[str | Path] = (),
    buffer: str | Path | None = None,
    half: Half = "confirm",
    max_evaluations: int | None = None,
    curvature_batches: int = 4,
    predict: Predict | None = None,
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 - frozen
    train_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    key: str | None = None,
    on_forecast: Callable[[Forecast], None] = lambda forecast: None,
) -> Account:
    """Explain why a published merge works or does not: what it gains by, and how the loss lies around it.

    The account is returned, and written beside the artifact's files as ``explain.json`` and ``explain.html``; the
    published files stay as they are. Called again after an interruption, it goes on: scores are kept in the file.

    Args:
        artifact: The artifact, or its path as `load_merged` takes it.
        module: The LightningModule that was trained, built as it was; its weights do not matter.
        val_dataloaders: The run's validation loaders, as ``Trainer.fit`` takes them.
        checkpoints: Checkpoints in any format that ``ckmerge merge`` reads, or directories of them. One must be of the
            artifact's step: the latest weights, which no artifact holds. An offline search's snapshots are found among
            them by their SHA-256.
        buffer: The run's buffer; ``None``: ``buffer/`` beside the artifact. Snapshots that have rotated out of it are
            told, and figures that need them are left out.
        half: Which half of the validation batches scores the figures: ``confirm``, which the search did not see, or
            ``search``.
        max_evaluations: Most evaluations. Figures are made in the order snapshots, line, groups, layers, plane, and
            what does not fit is left out. ``None``: no limit.
        curvature_batches: Batches of the half on which the Hessian is measured, about 30 products with a vector at
            either end; 0: not at all.
        predict: Gets the module and a batch on its device, and returns logits with the classes last or labels as
            integers, or a pair of these and the true labels. ``None``: no agreement.
        evaluation: On what candidates were scored.
        train_dataloaders: Training loaders, which ``evaluation.recalibrate_batches`` needs.
        trainer: Arguments for the Trainer, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``; one device.
        key: The entry that holds the weights in a torch file, where it is not Lightning's.
        on_forecast: Told of what is going to be done, before it begins.

    Returns:
        The account: ``figures``, each with a ``sentence``, and ``left_out``, why others are missing.

    Raises:
        ArtifactError: There is no artifact, no checkpoint of its step, or they do not fit the module.
        SnapshotError: The artifact is a record, and too few of its snapshots are kept to mix the merge again.
        ConfigError: An argument is outside its range.
        MonitorError: Validation does not log the artifact's metric.
    """
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
    given = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
    settings = MergeSettings(
        objectives=make_objectives(opened.manifest["monitor"], opened.manifest["mode"]),
        buffer=BufferConfig(snapshot="point"),
        search=SearchConfig(),
        evaluation=evaluation,
        artifact=ArtifactConfig(),
        on_error="raise",
    )
    wishes = Wishes(
        half=half,
        max_evaluations=max_evaluations,
        curvature_batches=curvature_batches,
        predict=predict,
        on_forecast=on_forecast,
    )
    data = data_of(module, train_dataloaders, val_dataloaders, evaluation)
    return explain_artifact(
        make_trainer(trainer),
        module,
        data,
        settings,
        opened,
        open_sources([Path(path) for path in given], key) if given else [],
        Path(buffer) if buffer is not None else opened.path.parent / "buffer",
        wishes,
    )


def explain_artifact(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    settings: MergeSettings,
    artifact: Artifact,
    checkpoints: Sequence[Source],
    buffer: Path,
    wishes: Wishes,
) -> Account:
    """Explain an artifact; see ``explain``.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: Gets the latest weights.
        data: What ``fit`` takes beside the module.
        settings: What the search was asked for.
        artifact: The artifact.
        checkpoints: Among them the latest weights, and an offline search's snapshots.
        buffer: The run's snapshots.
        wishes: What the account shall hold.
    """
    if artifact.manifest.get("adapters", {}).get("merge") == "products":
        raise ConfigError(
            "an account mixes the merge with the latest weights, which must have one shape, got adapters that were "
            "merged by their products. Search with `artifact.adapter_merge: factors` to explain the result."
        )
    latest = _find_latest(artifact, checkpoints)
    shapes = {name: spec.shape for name, spec in latest.specs.items()}
    kept_K: dict[int, Mapping[str, Tensor]] = kept_snapshots(artifact, shapes, buffer, checkpoints)

    def work(trainer: Trainer, callback: Callback) -> Account:
        return _Explainer(settings, trainer, callback, artifact, latest, kept_K, wishes).run()

    account = at_train_start(trainer, module, data, work)
    write_account_page(artifact.path, artifact.manifest, account)
    return account


def _find_latest(artifact: Artifact, checkpoints: Sequence[Source]) -> Source:
    """Return the checkpoint of the artifact's step."""
    step = artifact.manifest["step"]
    found = [source for source in checkpoints if source.step == step]
    if not found:
        steps = ", ".join(str(s.step) for s in checkpoints if s.step is not None) or "none"
        raise ArtifactError(
            f"an account needs the latest weights of the artifact's step, {step}, which it does not hold, got "
            f"checkpoints of the steps: {steps}. Name a checkpoint of that step with `checkpoints`, such as "
            "Lightning's ModelCheckpoint writes; where there is none, explain a later search."
        )
    return found[-1]


class Partition(Space):
    """Coefficients that differ between cells of tensors. Nothing is searched in it.

    Args:
        cell_of: Tensor name -> cell.
    """

    def __init__(self, cell_of: Mapping[str, str]) -> None:
        self._cell_of = dict(cell_of)

    @property
    def group_of(self) -> Mapping[str, str]:
        """Tensor name -> cell."""
        return self._cell_of

    def bind(self, names: Sequence[str]) -> Partition:
        """Return this space for a model, whose further tensors are in the first cell."""
        first = next(iter(self._cell_of.values()))
        return Partition({name: self._cell_of.get(name, first) for name in names})

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return none."""
        return {}

    def coefficients(self, z_D: Mapping[str, float], segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the latest weights'."""
        return (*[0.0] * (len(segments_K) - 1), 1.0)


@dataclass
class _Tally:
    """Counts what is done."""

    total: int
    tell: Callable[[int, int], None]
    done: int = 0

    def add(self, num: int = 1) -> None:
        self.done += num
        self.tell(self.done, max(self.total, self.done))


@dataclass
class _Predictions:
    """Predicted and true labels, batch by batch."""

    predict: Predict
    predicted: list[Tensor] = field(default_factory=list)
    labels: list[Tensor | None] = field(default_factory=list)

    @torch.no_grad()
    def take(self, module: LightningModule, batch: Any) -> None:
        predicted, labels = labels_of(self.predict(module, batch))
        self.predicted.append(predicted)
        self.labels.append(labels)


class _Explainer:
    """One account.

    Args:
        settings: What the search was asked for.
        trainer: The Trainer, inside ``fit``, before the first step.
        callback: Told of batches in place of the muted others.
        artifact: The artifact.
        latest: The latest weights.
        kept_K: The other snapshots that are kept, by their place in the manifest.
        wishes: What the account shall hold.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        artifact: Artifact,
        latest: Source,
        kept_K: Mapping[int, Mapping[str, Tensor]],
        wishes: Wishes,
    ) -> None:
        self._artifact = artifact
        self._module = trainer.lightning_module
        self._manifest = artifact.manifest
        self._wishes = wishes
        snapshots = self._manifest["snapshots"]
        state = {n: t for n, t in trainer.lightning_module.state_dict().items() if isinstance(t, Tensor)}
        tied = find_aliases(state)  # under another name they are no part of their own
        names = [n for n, t in state.items() if n not in tied and (t.is_floating_point() or t.is_complex())]
        cell_of, cells = partition(names, self._manifest)
        merge = [artifact.tensors()] if artifact.has_weights else []
        self._places = Places(cells, [*kept_K, len(snapshots) - 1], has_merge=bool(merge))
        others: list[tuple[Segment, Mapping[str, Tensor]]] = [(_segment(self._manifest["step"]), w) for w in merge]
        others += [(_segment(snapshots[k]["last_step"]), weights) for k, weights in kept_K.items()]
        settings = replace(settings, search=replace(settings.search, space=Partition(cell_of), constraints=[]))
        self._offline = CheckpointScoring(settings, trainer, callback, [latest], others=others)
        roles = {slot.name: slot.role for slot in self._offline.model.layout.slots}
        parameters = {name: cell for name, cell in cell_of.items() if roles.get(name) == "parameter"}
        self._geometry = measure([*(w for _, w in others), latest.weights], parameters, cells)
        self._scores: dict[str, Score] = {}
        self._account: Account = {}
        self._before: Account = {}
        self._written = time.monotonic()

    def run(self) -> Account:
        """Score and measure, and write the account as it grows."""
        sections = [
            figures.snapshots_section(self._places),
            figures.line_section(self._places),
            figures.parts_section(self._places, "groups"),
            figures.parts_section(self._places, "layers"),
        ]
        plane_section, plane = figures.plane_section(self._places, self._geometry)
        sections, num = figures.fit_budget([*sections, plane_section], self._wishes.max_evaluations)
        forecast = self._forecast(sections, num)
        self._wishes.on_forecast(forecast)
        with self._offline.paused() as scorer:
            tally = _Tally(num + forecast.num_products, self._wishes.on_scored)
            measured = self._begin(scorer, sections)
            tally.add()
            # First, since a fault in a user's own function should not show at the end.
            self._compare(scorer, measured)
            for name, rows in [(figures.MERGE, self._places.merge()), *(p for s in sections for p in s.places.items())]:
                self._score(scorer, measured, name, rows)
                tally.add()
            made = {s.key for s in sections if s.left_out is None}
            self._draw(made, measured, plane)
            self._bend(scorer, measured, tally)
        self._read_records()
        self._account["complete"] = True
        self._write()
        return self._account

    def _forecast(self, sections: Sequence[figures.Section], num: int) -> Forecast:
        wished = self._wishes.curvature_batches
        return Forecast(
            num_evaluations=num,
            by_figure={s.key: len(s.places) for s in sections},
            num_products=2 * MAX_PRODUCTS if wished else 0,
            product_batches=wished,
            left_out={s.key: s.left_out for s in sections if s.left_out is not None},
        )

    def _begin(self, scorer: CandidateScorer, sections: Sequence[figures.Section]) -> figures.Measured:
        """Score the latest weights, and take up an account of these very weights and batches."""
        latest = _told(self._places.latest())
        on_search = scorer.score(latest, "search")
        half: Half = self._wishes.half if scorer.can_confirm() else "search"
        score = on_search if half == "search" else scorer.score(latest, half)
        if not math.isfinite(score.value):
            raise SearchError(
                f"the latest weights must have a finite {self._manifest['monitor']}, got {score.value}. An account has "
                "nothing to compare with."
            )
        measured = figures.Measured(
            monitor=self._manifest["monitor"],
            mode=self._manifest["mode"],
            half=half,
            num_batches=sum(scorer.num_batches(half)) or score.num_batches,
        )
        digest = manifest_digest(self._artifact.path)
        identity = [digest, half, [[o.value, o.values_B] for o in score.objectives], self._places.num_sources]
        self._account = {
            "schema_version": SCHEMA_VERSION,
            "manifest_sha256": digest,
            "identity": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            "complete": False,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": self._manifest["step"],
            "monitor": measured.monitor,
            "mode": measured.mode,
            "half": half,
            "num_batches": measured.num_batches,
            "num_samples": sum(score.sizes_B) if score.sizes_B else None,
            "notes": self._notes(scorer, on_search, half),
            "software": software(),
            "figures": {},
            "left_out": {s.key: s.left_out for s in sections if s.left_out is not None},
            "points": {},
        }
        before = read_account(self._artifact.path)
        self._before = before if before and before.get("identity") == self._account["identity"] else {}
        self._keep(figures.LATEST, self._places.latest(), score)
        return measured

    def _notes(self, scorer: CandidateScorer, on_search: Score, half: Half) -> list[str]:
        notes = list(scorer.notes())
        recorded = self._manifest["anchors"][0]["search"]
        is_same_half = list(scorer.num_batches("search")) == self._manifest["evaluation"]["search_batches"]
        if half != self._wishes.half:
            notes.append("One validation batch cannot be split: all figures are of the search's own batches.")
        if not is_same_half:
            notes.append(
                "The search was scored on other batches than this account, so that its values cannot be compared."
            )
        elif recorded["value"] is not None and not math.isclose(
            recorded["value"], on_search.value, rel_tol=TOLERANCE, abs_tol=1e-9
        ):
            notes.append(
                f"The latest weights have {self._manifest['monitor']} {on_search.value:.6g} on the search half here, "
                f"and had {recorded['value']:.6g} in the search: the checkpoint, the data or the precision is another."
            )
        if lost := len(self._manifest["snapshots"]) - len(self._places.kept):
            notes.append(
                f"{lost} of the {len(self._manifest['snapshots'])} snapshots that were merged are no longer kept: what "
                "needs them is left out or speaks of the others. Explain a merge soon after its search, or search "
                "checkpoints on disk."
            )
        return notes

    def _score(self, scorer: CandidateScorer, measured: figures.Measured, name: str, rows: Rows) -> None:
        """Score a mixture, unless that was done before an interruption."""
        known = self._before.get("points", {}).get(name)
        if known is not None and known["weights"] == _digest(rows) and known["value"] is not None:
            values, sizes = known["values"], known["sizes"]
            score = Score(value=known["value"], values_B=_tuple(values), sizes_B=_tuple(sizes))
        else:
            score = scorer.score(_told(rows), measured.half)
        self._keep(name, rows, score)

    def _keep(self, name: str, rows: Rows, score: Score) -> None:
        finite = math.isfinite(score.value)
        # The plane has many places, and nothing is paired there.
        by_batch = finite and score.values_B is not None and not name.startswith("plane-")
        by_batch = by_batch and all(map(math.isfinite, score.values_B or ()))
        self._scores[name] = score
        self._account["points"][name] = {
            "weights": _digest(rows),
            "value": score.value if finite else None,
            "values": list(score.values_B or ()) if by_batch else None,
            "sizes": list(score.sizes_B or ()) if by_batch else None,
        }
        # A file each moment would take longer than a small model's evaluations.
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        write_account(self._artifact.path, self._account)
        self._written = time.monotonic()

    def _draw(self, made: set[str], measured: figures.Measured, plane: Any) -> None:
        """Make the figures whose places have been scored."""
        places, scores, geometry, found = self._places, self._scores, self._geometry, self._account["figures"]
        gain, interval = measured.gain(scores[figures.MERGE], scores[figures.LATEST])
        self._account["gain"], self._account["interval"] = gain, interval
        self._account["values"] = {name: scores[name].value for name in (figures.LATEST, figures.MERGE)}
        snapshots = self._manifest["snapshots"]
        if "snapshots" in made:
            found["snapshots"] = figures.snapshots_figure(places, scores, measured, snapshots)
        keys: tuple[Literal["groups", "layers"], ...] = ("groups", "layers")
        for key in keys:
            if key in made:
                found[key] = figures.parts_figure(places, scores, measured, key, geometry)
        if "line" in made:
            found["line"] = figures.line_figure(places, scores, measured, geometry)
        if "plane" in made:
            found["plane"] = figures.plane_figure(plane, places, scores, measured, len(snapshots))
        self._write()

    def _compare(self, scorer: CandidateScorer, measured: figures.Measured) -> None:
        """Compare predictions, where there is a way to get them."""
        if self._wishes.predict is None:
            self._account["left_out"]["agreement"] = "No `predict` was given, which says how to get predictions."
            return
        passes = []
        for rows in (self._places.latest(), self._places.merge()):
            taken = _Predictions(self._wishes.predict)
            scorer.load(_told(rows))
            scorer.visit(measured.half, partial(taken.take, self._module))
            passes.append(taken)
        first, second = passes
        found = compare(first.predicted, second.predicted, first.labels)
        self._account["figures"]["agreement"] = figures.agreement_figure(found, measured)
        self._write()

    def _bend(self, scorer: CandidateScorer, measured: figures.Measured, tally: _Tally) -> None:
        """Measure the curvature at both ends, unless the loss cannot be differentiated twice."""
        num_batches = min(self._wishes.curvature_batches, measured.num_batches)
        if not num_batches:
            self._account["left_out"]["curvature"] = "`curvature_batches` is 0."
            return
        known = self._before.get("figures", {}).get("curvature")
        if known is not None and known["num_batches"] == num_batches:
            latest, merge = (Curvature(**known[name]) for name in (figures.LATEST, figures.MERGE))
            self._account["figures"]["curvature"] = figures.curvature_figure(latest, merge, measured, num_batches)
            return
        sign = sign_of(measured.mode)
        found = []
        try:
            for rows in (self._places.latest(), self._places.merge()):
                size, product = scorer.hessian(_told(rows), measured.half, num_batches)

                def counted(vector: Any, product: Callable[[Any], Any] = product) -> Any:
                    tally.add()
                    return sign * product(vector)

                found.append(find_curvature(counted, size))
        except (CkmergeError, RuntimeError, NotImplementedError) as error:
            if not isinstance(error, SearchError) and "deriv" not in str(error):
                raise
            told = str(error).partition("\n")[0].replace("`search.refine` needs", "The curvature needs")
            self._account["left_out"]["curvature"] = told.replace(", or leave `search.refine` out", "")
            return
        self._account["figures"]["curvature"] = figures.curvature_figure(found[0], found[1], measured, num_batches)
        self._write()

    def _read_records(self) -> None:
        """Add what manifests alone tell: importances and stability."""
        found, left_out = self._account["figures"], self._account["left_out"]
        shares, reason = find_importances(self._manifest)
        if shares is not None:
            scored = scored_candidates(self._manifest)
            num_estimates = sum(not c["search"]["complete"] for c in scored)
            found["importances"] = figures.importances_figure(shares, len(scored), num_estimates)
        else:
            left_out["importances"] = str(reason)
        try:
            history = history_of(self._artifact.path.parent)
        except ArtifactError:
            left_out["stability"] = "The artifact lies apart from its run's timeline."
            return
        ran = [r for r in history.timeline if r["artifact"]]
        if len(history.manifests) < 2:
            left_out["stability"] = (
                f"Two searches whose artifacts are kept are needed, got {len(history.manifests)} of {len(ran)}. Keep "
                "more with `save_top_k`."
            )
            return
        rows = searches(list(history.manifests.values()))
        found["stability"] = figures.stability_figure(rows, len(ran) - len(rows))


def _segment(step: int) -> Segment:
    """Return a place in the run; as a mean, whatever it is, so that none counts as the latest weights."""
    return Segment(kind="mean", first_step=1, last_step=max(1, step))


def _told(rows: Rows) -> dict[str, tuple[float, ...]]:
    return {key: tuple(float(v) for v in row) for key, row in rows.items()}


def _digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(_told(rows), sort_keys=True).encode()).hexdigest()[:16]


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return tuple(values) if values else None
