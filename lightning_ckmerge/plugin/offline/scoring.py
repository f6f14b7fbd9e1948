"""Scores merges of checkpoints on disk, which take the place of a run's buffer.

The work is done where a training run would begin: in ``fit``, with everything set up and no step taken. So candidates
are scored by the same code as during training.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.checkpoints.formats import Source
from lightning_ckmerge.config import EvaluationConfig, MergeSettings
from lightning_ckmerge.core.layout import as_real
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.wording import listed
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.plugin.evaluate.scorer import CandidateScorer, ScorerMaker
from lightning_ckmerge.plugin.rank.model import RankModel
from lightning_ckmerge.tensorfiles.durable import file_record

# One process, one device: more of them share the trials of one storage.
ALONE: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "min_epochs": None,
    "min_steps": None,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

R = TypeVar("R")


def at_train_start(
    trainer: Trainer, module: LightningModule, data: Mapping[str, Any], work: Callable[[Trainer, Callback], R]
) -> R:
    """Return the result of ``work``, done where training would begin; no step is taken.

    Args:
        trainer: One device, no logger. Its callbacks are replaced.
        module: The LightningModule.
        data: What ``fit`` takes beside the module.
        work: Called with the Trainer and the callback that is told of batches.
    """
    host = _Host(work)
    # Nothing of the run's own shall happen: no checkpoint, no early stop, no bar.
    getattr(trainer, "callbacks")[:] = [host]  # noqa: B009
    own = vars(module).get("configure_callbacks")
    module.configure_callbacks = list  # type: ignore[method-assign]
    try:
        trainer.fit(module, **data)
    finally:
        del module.configure_callbacks
        if own is not None:
            module.configure_callbacks = own  # type: ignore[method-assign]
    return host.results[0]


def make_trainer(arguments: Mapping[str, Any] | None) -> Trainer:
    """Return a Trainer of one device that keeps nothing.

    Args:
        arguments: Of the user's own, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``.

    Raises:
        ConfigError: They ask for several devices.
    """
    trainer = Trainer(**{**ALONE, "max_epochs": 1, "enable_checkpointing": False, **(arguments or {})})
    if trainer.world_size != 1:
        raise ConfigError(
            f"work over checkpoints takes one device, got {trainer.world_size} in `trainer`. Several processes share "
            "one search over `search.storage`: see `ckmerge search --worker`."
        )
    return trainer


def data_of(module: LightningModule, training: Any, validation: Any, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return loaders by the names that ``fit`` takes them by. It wants some for training, though no step is taken.

    Args:
        module: The LightningModule.
        training: Loaders as ``fit`` takes them, or ``None``.
        validation: Loaders as ``fit`` takes them, or ``None``: the module's own.
        evaluation: On what candidates are scored.

    Raises:
        ConfigError: The module or the loaders are something else, or loaders are needed and there are none.
    """
    if not isinstance(module, LightningModule):
        raise ConfigError(f"`module` must be a LightningModule, got {_kind(module)}. Build it as it was for training.")
    for name, loaders in (("train_dataloaders", training), ("val_dataloaders", validation)):
        if isinstance(loaders, (LightningDataModule, type)):
            raise ConfigError(
                f"`{name}` must be loaders, as `Trainer.fit` takes them, got {_kind(loaders)}. Pass what a "
                "data module's method returns, after its `prepare_data()` and `setup('fit')`."
            )
    if training is None and not is_overridden("train_dataloader", module):
        if evaluation.recalibrate_batches:
            raise ConfigError(
                "`evaluation.recalibrate_batches` needs training data, got neither `train_dataloaders` nor a module "
                "with `train_dataloader`. Pass the loader, or leave it at 0."
            )
        training = DataLoader([0])  # type: ignore[arg-type]
    return {"train_dataloaders": training, "val_dataloaders": validation}


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


class CheckpointScoring:
    """Checkpoints on disk as the snapshots of a search, the newest being the latest weights.

    Args:
        settings: What was asked for.
        trainer: The Trainer, inside ``fit``, before the first step.
        callback: Told of batches in place of the muted others.
        sources: Checkpoints, oldest first, each with its step; the last one is loaded into the module.
        segments: What each but the last stands for; ``None``: the weights at its step.
        others: What is merged beside the last checkpoint, with the steps that it stands for; ``None``: the others.

    Attributes:
        model: What candidates are merged into.
        step: The newest checkpoint's.
        run_id: Stands for the checkpoints' steps and contents: the same ones have the same, so that work goes on after
            an interruption, and others have another, be their names equal.
    """

    def __init__(
        self,
        settings: MergeSettings,
        trainer: Trainer,
        callback: Callback,
        sources: Sequence[Source],
        segments: Sequence[Segment] | None = None,
        others: Sequence[tuple[Segment, Mapping[str, torch.Tensor]]] | None = None,
    ) -> None:
        self._sources = sources
        self._others = others
        steps = [0, *(s.step or 0 for s in sources)]
        self._segments = segments or [
            Segment(kind="point", first_step=before + 1, last_step=step) for before, step in pairwise(steps[:-1])
        ]
        _load(sources[-1], trainer.lightning_module)
        self._hashes = [tuple(file_record(path)["sha256"] for path in s.files) for s in sources]
        contents = "\n".join(f"{s.step} {files}" for s, files in zip(sources, self._hashes, strict=True))
        self.run_id = hashlib.sha256(contents.encode()).hexdigest()[:8]
        self.model = RankModel(trainer.lightning_module, settings)
        self._scorer_maker = ScorerMaker(settings, callback, trainer, self.model, lambda: None)
        assert sources[-1].step is not None
        self.step = sources[-1].step

    @contextlib.contextmanager
    def paused(self) -> Iterator[CandidateScorer]:
        """Yield their scorer; the module and all else are the same afterwards.

        Raises:
            TraceError: They are not, though all was put back.
        """
        with self._scorer_maker.paused(self._snapshots, self.step) as scorer:
            yield scorer
        self._scorer_maker.check_traces()

    def _snapshots(self) -> list[Snapshot]:
        """Return what is merged beside the newest checkpoint, which is in the module."""
        if self._others is not None:
            slots = self.model.layout.slots
            return [
                Snapshot(segment=segment, sha256=None, tensors=[as_real(weights[slot.name]) for slot in slots])
                for segment, weights in self._others
            ]
        return [
            Snapshot(
                segment=segment,
                sha256=files[0] if len(files) == 1 else None,
                files_sha256=files if len(files) > 1 else (),
                tensors=[as_real(source.weights[slot.name]) for slot in self.model.layout.slots],
            )
            for source, files, segment in zip(self._sources[:-1], self._hashes[:-1], self._segments, strict=True)
        ]


class _Host(Callback, Generic[R]):
    """Works where training would begin, and lets it end there.

    Args:
        work: Listens to the batches through this callback.
    """

    def __init__(self, work: Callable[[Trainer, Callback], R]) -> None:
        self._work = work
        self.results: list[R] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Work."""
        trainer.should_stop = True
        self.results.append(self._work(trainer, self))


def _load(source: Source, module: LightningModule) -> None:
    """Load a checkpoint's weights into the module."""
    state = {n: t for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    shaped = {n for n in state.keys() & source.specs.keys() if source.specs[n].shape != tuple(state[n].shape)}
    faults = {
        "of another shape": shaped,
        f"missing from {source.path.name}": state.keys() - source.specs.keys(),
        "unknown to the module": source.specs.keys() - state.keys(),
    }
    if found := "; ".join(f"{listed(names)} {fault}" for fault, names in faults.items() if names):
        raise ArtifactError(
            f"the checkpoints must be {type(module).__name__}'s, got {found}. Use the config of the run that "
            "wrote them."
        )
    module.load_state_dict({name: source.weights[name] for name in state}, strict=False)
