"""Builds an ensemble: a search for merges, a choice among them on the search half, figures on the confirmation half.

Letters: K snapshots, oldest first, the last being the latest weights; P merges to choose from; M members.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ckmerge.artifact.ensembles import publish_ensemble
from lightning_ckmerge.checks import check_fields, parse_size, require_at_least
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, EvaluationConfig, MergeSettings, SearchConfig
from lightning_ckmerge.core.objectives import Mode, make_objectives, sign_of
from lightning_ckmerge.core.outcome import Coefficients, Scored, SearchOutcome, counted
from lightning_ckmerge.core.spaces import normalised
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.plugin.ensemble.figures import Figures, Tally
from lightning_ckmerge.plugin.ensemble.judging import judge
from lightning_ckmerge.plugin.ensemble.material import Material, find_material
from lightning_ckmerge.plugin.ensemble.members import Members, split_shared, state_of
from lightning_ckmerge.plugin.ensemble.module import MergedEnsemble
from lightning_ckmerge.plugin.ensemble.predicting import (
    Predict,
    Prediction,
    name_of,
    predict_by_convention,
    read_prediction,
)
from lightning_ckmerge.plugin.evaluate.scorer import CandidateScorer
from lightning_ckmerge.plugin.offline.scoring import at_train_start, data_of, make_trainer
from lightning_ckmerge.plugin.offline.search import OfflineSearch
from lightning_ckmerge.plugin.progress import harmless
from lightning_ckmerge.report.ensemble import render_ensemble_html
from lightning_ckmerge.search.averaging import Averaging, is_classes
from lightning_ckmerge.search.ensembles import RULE, Chosen, Predicted, SearchHalf, choose_ensemble
from lightning_ckmerge.tensorfiles.durable import require_absent

# Predictions of all merges on the search half, on the host.
MAX_KEPT_BYTES = 4 << 30
MAX_TOLD_DIFFERENCE = 1e-3

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Which ensemble is wanted.

    Args:
        size: Most members; at least 1. Fewer are taken where more do not lower the loss on the search half enough.
        averaging: ``probabilities`` or ``logits``; ``None``: probabilities of classes, and outputs of anything else.
        weight_trials: Weights of the members that Optuna proposes; 0: equal weights.
        pool_size: Merges of the search to choose from, by their value on the search half; at least 1.
        min_disagreement: Least disagreement of a member with each one chosen before: of classes, the share of samples
            that they see differently; else the mean squared difference, as a share of the loss.
        min_gain: Share of the loss on the search half by which a new member must lower it; at least 0.
        with_snapshots: Whether checkpoints as they are may be members too.
    """

    size: int = 4
    averaging: Literal["probabilities", "logits"] | None = None
    weight_trials: int = 16
    pool_size: int = 12
    min_disagreement: float = 0.0
    min_gain: float = 0.001
    with_snapshots: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least("size", self.size, 1, "The default is 4.")
        require_at_least("weight_trials", self.weight_trials, 0, "0 gives members equal weights.")
        require_at_least("pool_size", self.pool_size, 1, "The default is 12.")
        for name in ("min_disagreement", "min_gain"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"`{name} >= 0` must hold, got {getattr(self, name)}. 0 asks for none.")


def build_ensemble(
    module: LightningModule,
    val_dataloaders: Any,
    source: str | Path | Sequence[str | Path],
    *,
    size: int = 4,
    predict: Predict | None = None,
    averaging: Literal["probabilities", "logits"] | None = None,
    weight_trials: int = 16,
    pool_size: int = 12,
    min_disagreement: float = 0.0,
    min_gain: float = 0.001,
    with_snapshots: bool = True,
    out: str | Path | None = None,
    monitor: str | list[str] = "val_loss",
    mode: Mode | list[Mode] = "min",
    search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
    evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
    artifact: ArtifactConfig = ArtifactConfig(),  # noqa: B008
    latest: str | Path | None = None,
    train_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    key: str | None = None,
    last: int | None = None,
) -> MergedEnsemble:
    """Return an ensemble of merges, with the account of what it gains over the single merge.

    A search over the checkpoints scores merges, as `search_checkpoints` does. Among the best of them, means of blocks
    of checkpoints, and the checkpoints themselves, members are chosen by their predictions on the search half: the best
    one first, then the one that lowers the ensemble's loss the most, and so on (Caruana et al. 2004). Optuna finds
    their weights, on the search half too. The confirmation half, which has chosen nothing, compares the ensemble with
    the latest weights, the single merge, and an ensemble of checkpoints alone, chosen in the same way:
    ``manifest["comparison"]`` and ``verdict``.

    Args:
        module: The LightningModule that was trained, built as it was; it lends the ensemble its structure. Of a run its
            weights are the latest, as after ``fit``; of checkpoints they do not matter, and those of the newest one
            are there afterwards.
        val_dataloaders: The loaders, as ``Trainer.fit`` takes them; their batches are dealt to the two halves.
        source: Checkpoints in any format that ``ckmerge merge`` reads, directories of them, or patterns; or the
            directory of a run with the callback (``merges``), of which the kept snapshots of the newest search, the
            published merges and their Pareto fronts are used.
        size: Most members, which are so many forward passes for a prediction.
        predict: Function of module and batch that returns outputs and targets: logits ``(..., C)`` with integers
            ``(...)``, of which -100 is left out, or values with targets of one shape. ``None``: the batch is a pair of
            inputs and targets, and the module's ``forward``, or its own ``predict_step``, returns the outputs.
        averaging: ``probabilities`` or ``logits``; ``None``: probabilities of classes, and outputs of anything else.
        weight_trials: Weights of the members that Optuna proposes; 0: equal weights.
        pool_size: Merges of the search to choose from.
        min_disagreement: Least disagreement of a member with each one chosen before: of classes, the share of samples
            that they see differently; else the mean squared difference, as a share of the loss.
        min_gain: Share of the loss on the search half by which a new member must lower it: it costs a forward pass.
        with_snapshots: Whether checkpoints as they are may be members too.
        out: Where the ensemble is published, a directory that does not exist; ``None``: nowhere.
        monitor: As the callback's; leads the search for merges.
        mode: As the callback's.
        search: How that search spends its trials.
        evaluation: On what data.
        artifact: ``max_shard_size`` of the members' files.
        latest: Of a run: a checkpoint of its latest weights, in place of the module's.
        train_dataloaders: Training loaders, which ``evaluation.recalibrate_batches`` needs.
        trainer: Arguments for the Trainer, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``; one device.
        key: The entry that holds the weights in a torch file, where it is not Lightning's.
        last: Use the newest so many checkpoints.

    Returns:
        The ensemble, on the module's device.

    Raises:
        ArtifactError: The checkpoints cannot be read, do not fit the module, or ``out`` exists.
        ConfigError: An argument is outside its range, or it is not known how the module predicts.
        MonitorError: Validation does not log ``monitor``.

    Source:
        Caruana et al. 2004, *Ensemble selection from libraries of models*, doi:10.1145/1015330.1015432.
        Lakshminarayanan et al. 2017, arXiv:1612.01474.
    """
    if out is not None:
        require_absent(Path(out), "`out`")
    config = EnsembleConfig(
        size=size,
        averaging=averaging,
        weight_trials=weight_trials,
        pool_size=pool_size,
        min_disagreement=min_disagreement,
        min_gain=min_gain,
        with_snapshots=with_snapshots,
    )
    settings = MergeSettings(
        objectives=make_objectives(monitor, mode),
        search=search,
        evaluation=evaluation,
        artifact=artifact,
        buffer=BufferConfig(snapshot="point"),
        on_error="raise",
    )
    data = data_of(module, train_dataloaders, val_dataloaders, settings.evaluation)
    material = find_material(source, module, latest=latest, key=key, last=last)
    return make_ensemble(
        make_trainer(trainer),
        module,
        data,
        settings,
        material,
        config,
        predict=predict,
        out=None if out is None else Path(out),
    )


def make_ensemble(
    trainer: Trainer,
    module: LightningModule,
    data: Mapping[str, Any],
    settings: MergeSettings,
    material: Material,
    config: EnsembleConfig,
    *,
    predict: Predict | None = None,
    out: Path | None = None,
    on_step: OnStep = lambda done, total: None,
) -> MergedEnsemble:
    """Build an ensemble, and publish it where that is asked for; arguments are those of ``build_ensemble``.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: Lends its structure.
        data: What ``fit`` takes beside the module.
        settings: Of the search for merges.
        material: What is merged.
        config: Which ensemble is wanted.
        predict: Outputs and targets of a batch.
        out: Where it is published.
        on_step: Told of passes over a half that are done, and of how many are expected in all.
    """
    work = partial(_Builder, settings, material, config, predict, on_step)
    built = at_train_start(trainer, module, data, lambda trainer, callback: work(trainer, callback).run())
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    ensemble = MergedEnsemble(
        module,
        built.states_M,
        built.weights_M,
        built.averaging,
        predict,
        {**built.manifest, "predict": name_of(predict)},
    )
    if out is not None:
        artifact = publish_ensemble(
            out.absolute(),
            built.states_M,
            ensemble.manifest,
            parse_size(settings.artifact.max_shard_size),
            partial(render_page, out, trainer),
        )
        ensemble.manifest = artifact.manifest
    return ensemble.to(device)


def render_page(out: Path, trainer: Trainer, manifest: dict[str, Any]) -> str | None:
    """Return the ensemble's page; one that fails is a warning."""
    with harmless("The ensemble's page", trainer, "The ensemble is"):
        return render_ensemble_html(manifest, out.as_posix())
    return None


@dataclass(frozen=True)
class _Built:
    states_M: list[dict[str, torch.Tensor]]
    weights_M: tuple[float, ...]
    averaging: Averaging
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """Something to choose from, or to compare with.

    Args:
        name: As in the manifest.
        load: Puts it into the live tensors.
        record: How it was made, for the manifest.
    """

    name: str
    load: Callable[[], None]
    record: Mapping[str, Any]
    predicted: Predicted = field(default_factory=Predicted)


class _Builder:
    """Builds one ensemble, inside ``fit``, before the first step."""

    def __init__(
        self,
        settings: MergeSettings,
        material: Material,
        config: EnsembleConfig,
        predict: Predict | None,
        on_step: OnStep,
        trainer: Trainer,
        callback: Callback,
    ) -> None:
        self._settings = settings
        self._material = material
        self._config = config
        self._predict = predict or predict_by_convention
        self._on_step = on_step
        self._trainer = trainer
        self._callback = callback
        self._averaging: Averaging | None = None
        self._targets_B: list[torch.Tensor] = []
        self._notes = list(material.notes)
        self._num_passes = 0

    def run(self) -> _Built:
        """Search, choose and compare."""
        with tempfile.TemporaryDirectory(prefix="ckmerge-") as directory:
            search = OfflineSearch(
                self._settings,
                self._trainer,
                self._callback,
                Path(directory),
                self._material.sources,
                lambda trial, total: self._passed(total),
                self._material.segments,
            )
            with search.offline.paused() as scorer:
                outcome = search.find(scorer)
                return self._build(search, scorer, outcome)

    def _build(self, search: OfflineSearch, scorer: CandidateScorer, outcome: SearchOutcome) -> _Built:
        if not scorer.can_confirm():
            raise ConfigError(
                "an ensemble must be judged on batches that have not chosen it, got one. Use more of them."
            )
        module = search.offline.model
        snapshots = self._snapshots(scorer)
        merges = [*self._merges(scorer, outcome), *self._blocks(scorer), *self._stored(scorer, module, snapshots[-1])]
        models = [*merges, *snapshots]
        for model in models:
            self._predict_on_search_half(scorer, model, len(models))
        self._compare_with_logged(outcome, models, snapshots[-1])
        assert self._averaging is not None
        half = SearchHalf(self._averaging, self._targets_B, [m.predicted for m in models])
        choose = partial(
            choose_ensemble,
            half,
            size=self._config.size,
            min_disagreement=self._config.min_disagreement,
            min_gain=self._config.min_gain,
            n_trials=self._config.weight_trials,
            seed=self._settings.search.seed,
        )
        chosen = choose(range(len(models) if self._config.with_snapshots else len(merges)))
        of_snapshots = choose(range(len(merges), len(models)))
        # By the loss that is compared, which need not be what the search went by.
        best = choose_ensemble(half, range(len(merges)), size=1).members_M[0]
        contenders = {
            "latest": Chosen(members_M=(len(models) - 1,), weights_M=(1.0,), steps=(), loss=0.0),
            "merge": Chosen(members_M=(best,), weights_M=(1.0,), steps=(), loss=0.0),
            "snapshots": of_snapshots,
            "ensemble": chosen,
        }
        states = {p: self._state(scorer, models[p]) for c in contenders.values() for p in c.members_M}
        figures = {
            name: self._measure(scorer, name, c, [states[p] for p in c.members_M], models)
            for name, c in contenders.items()
        }
        manifest = self._manifest(outcome, half, models, best, chosen, of_snapshots, figures)
        return _Built([states[p] for p in chosen.members_M], chosen.weights_M, self._averaging, manifest)

    def _snapshots(self, scorer: CandidateScorer) -> list[_Model]:
        """Return the checkpoints themselves, the latest weights last."""
        segments_K = scorer.merger.segments_K
        names = [f"snapshot-{s.last_step}" for s in segments_K[:-1]] + ["latest"]
        rows = [tuple(float(i == k) for i in range(len(names))) for k in range(len(names))]
        return [self._mixed(scorer, name, c_K) for name, c_K in zip(names, rows, strict=True)]

    def _merges(self, scorer: CandidateScorer, outcome: SearchOutcome) -> list[_Model]:
        """Return the search's best merges; its winner, and the front of several metrics, first."""
        sign = sign_of(outcome.mode)
        scored = [t for t in (*outcome.anchors, *outcome.trials) if t.feasible and _is_merge(t)]
        first = [outcome.winner, *(trial for trial, _ in outcome.front)]
        ranked = [t for t in first if _is_merge(t)] + sorted(scored, key=lambda t: sign * t.search.value)
        distinct = {repr(t.candidate.coefficients): t for t in reversed(ranked)}
        kept = sorted(distinct.values(), key=ranked.index)[: self._config.pool_size]
        return [
            self._mixed(scorer, t.candidate.name, t.candidate.coefficients, coordinates=t.candidate.coordinates)
            for t in kept
        ]

    def _blocks(self, scorer: CandidateScorer) -> list[_Model]:
        """Return the means of blocks of snapshots: merges that share no snapshot, and so disagree the most.

        There are as many as members are wanted, and once more as many as leave two snapshots in each.
        """
        steps_K = [s.num_steps for s in scorer.merger.segments_K]
        most = max(1, len(steps_K) // 2)
        models = []
        for num_blocks in sorted({min(self._config.size, most), most}):
            edges = [len(steps_K) * i // num_blocks for i in range(num_blocks + 1)]
            rows = [[n * (a <= k < b) for k, n in enumerate(steps_K)] for a, b in pairwise(edges)]
            models += [
                self._mixed(scorer, f"block-{i}-of-{num_blocks}", normalised(row))
                for i, row in enumerate(rows, start=1)
                if any(row)
            ]
        return models

    def _stored(self, scorer: CandidateScorer, model: Any, latest: _Model) -> list[_Model]:
        """Return the merges that the run has published."""
        latest_K: list[float] = list(latest.record["coefficients"])
        return [
            _Model(
                name,
                partial(scorer.reload, latest_K, partial(model.read, artifact)),
                {"artifact": name, "step": artifact.manifest["step"]},
            )
            for name, artifact in self._material.artifacts.items()
        ]

    def _mixed(self, scorer: CandidateScorer, name: str, c: Coefficients, **record: Any) -> _Model:
        rows = (
            {"groups": {g: list(row) for g, row in c.items()}} if isinstance(c, Mapping) else {"coefficients": list(c)}
        )
        return _Model(name, partial(scorer.load, c), {**rows, **record})

    def _predict_on_search_half(self, scorer: CandidateScorer, model: _Model, num_models: int) -> None:
        is_first = not self._targets_B
        model.load()

        def take(batch: Any) -> None:
            prediction = self._read(batch)
            if not len(prediction.targets):
                return
            if is_first:
                self._targets_B.append(prediction.targets.cpu())
            assert self._averaging is not None
            model.predicted.take(prediction.outputs, prediction.targets, self._averaging)
            if is_first and num_models * model.predicted.num_bytes > MAX_KEPT_BYTES:
                raise ConfigError(
                    f"predictions of {num_models} models on the search half must fit {MAX_KEPT_BYTES >> 30} GiB of "
                    "host memory, got more. Average probabilities, of which one number a sample is kept, or set "
                    "`evaluation.limit_batches` or a smaller `pool_size`."
                )

        scorer.visit("search", take)
        self._passed(self._num_passes + num_models)

    def _measure(
        self,
        scorer: CandidateScorer,
        name: str,
        chosen: Chosen,
        states_M: Sequence[dict[str, torch.Tensor]],
        models: Sequence[_Model],
    ) -> Figures:
        """Return a contender's figures on the confirmation half: it predicts as the ensemble does."""
        assert self._averaging is not None
        module, device = self._trainer.lightning_module, self._trainer.strategy.root_device
        shared, own_M = split_shared(states_M)
        num_bytes = sum(t.nbytes for state in (shared, *own_M) for t in state.values())
        moved = [{n: t.to(device) for n, t in state.items()} for state in states_M]
        members = Members(module, moved, chosen.weights_M, self._averaging)
        tally, spent = Tally(), [0.0]

        def take(batch: Any) -> None:
            start, targets = time.perf_counter(), list[torch.Tensor]()

            def outputs(module: Any) -> torch.Tensor:
                prediction = read_prediction(self._predict(module, batch))
                targets[:] = [prediction.targets]
                return prediction.outputs

            averaged = members.average(outputs)
            spent[0] += time.perf_counter() - start
            tally.take(averaged, targets[0])

        scorer.begin()
        scorer.visit("confirm", take)
        self._passed(self._num_passes + 1)
        return Figures(
            name=name,
            members=tuple(models[p].name for p in chosen.members_M),
            forward_passes=len(chosen.members_M),
            num_bytes=num_bytes,
            seconds=spent[0],
            scores=tally.scores(),
            calibration_error=tally.calibration(),
        )

    def _read(self, batch: Any) -> Prediction:
        prediction = read_prediction(self._predict(self._trainer.lightning_module, batch))
        if self._averaging is None:
            wanted = self._config.averaging
            if not is_classes(prediction.targets) and wanted is not None:
                raise ConfigError(
                    f"`averaging` {wanted!r} needs targets that are classes, got {prediction.targets.dtype}. Leave it "
                    "out: the outputs are averaged."
                )
            self._averaging = wanted or ("probabilities" if is_classes(prediction.targets) else "outputs")
        return prediction

    def _state(self, scorer: CandidateScorer, model: _Model) -> dict[str, torch.Tensor]:
        model.load()
        return state_of(self._trainer.lightning_module)

    def _compare_with_logged(self, outcome: SearchOutcome, models: Sequence[_Model], latest: _Model) -> None:
        """Note where no metric that validation logs is the loss that ``predict`` gives: it may predict otherwise."""
        assert self._averaging is not None
        half = SearchHalf(self._averaging, self._targets_B, [latest.predicted])
        loss, logged = half.loss({0: 1.0}), outcome.anchors[0].search.metrics
        if not any(abs(value - loss) <= MAX_TOLD_DIFFERENCE * abs(loss) for value in logged.values()):
            told = ", ".join(f"{name} {value:.5g}" for name, value in sorted(logged.items()))
            self._notes.append(
                f"The outputs that are averaged give the latest weights a loss of {loss:.5g} on the search half, and "
                f"validation logs {told}. Unless validation has a loss of its own, check `predict`."
            )

    def _manifest(
        self,
        outcome: SearchOutcome,
        half: SearchHalf,
        models: Sequence[_Model],
        best: int,
        chosen: Chosen,
        of_snapshots: Chosen,
        figures: Mapping[str, Figures],
    ) -> dict[str, Any]:
        merge, latest = figures["merge"], figures["latest"]

        def told(p: int) -> dict[str, Any]:
            return {"loss": half.loss({p: 1.0}), "disagreement_with_merge": half.disagreement(p, best)}

        def steps(c: Chosen) -> dict[str, Any]:
            chosen_one_by_one = [{"name": models[p].name, "loss_so_far": loss} for p, loss in c.steps]
            return {"chosen": chosen_one_by_one, "loss": c.loss, "weight_trials": c.num_trials}

        return {
            "averaging": half.averaging,
            "step": outcome.step,
            "monitor": outcome.monitor,
            "members": [
                {"name": models[p].name, "weight": w, **told(p), **models[p].record}
                for p, w in zip(chosen.members_M, chosen.weights_M, strict=True)
            ],
            "selection": {
                "rule": RULE,
                "source": "doi:10.1145/1015330.1015432",
                "ensemble": steps(chosen),
                "snapshots": steps(of_snapshots),
                "pool": [{"name": m.name, **told(p)} for p, m in enumerate(models)],
            },
            "comparison": [
                {**f.record(), "gain_over_latest": f.gains_over(latest), "gain_over_merge": f.gains_over(merge)}
                for f in figures.values()
            ],
            "verdict": judge(figures, self._notes),
            "snapshots": [dict(vars(record)) for record in outcome.snapshots_K],
            "evaluation": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(outcome.evaluation).items()},
        }

    def _passed(self, total: int) -> None:
        self._num_passes += 1
        self._on_step(self._num_passes, max(total, self._num_passes))


def _is_merge(trial: Scored) -> bool:
    """Whether more than one snapshot counts."""
    return len(counted(trial.candidate.coefficients)) > 1
