"""The bench of a search inside ``fit``: the run stands still, and candidates take the place of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.pipeline import Bench
from lightning_ckmerge.plugin.adapters import Load
from lightning_ckmerge.plugin.derivatives import Derivatives
from lightning_ckmerge.plugin.rank_model import RankModel
from lightning_ckmerge.plugin.standstill import Standstill
from lightning_ckmerge.plugin.validation import Validation

if TYPE_CHECKING:
    from lightning_ckmerge.plugin.callback import CheckpointMergeCallback


class BenchMaker:
    """Makes the benches of one ``fit``, one a search.

    Args:
        callback: Holds the arguments, and is told of batches in place of the muted others.
        trainer: The Trainer.
        model: What candidates are merged into.
    """

    def __init__(self, callback: CheckpointMergeCallback, trainer: Trainer, model: RankModel) -> None:
        self._callback = callback
        self._trainer = trainer
        self._model = model
        self._own_loaders: Any = None

    @contextlib.contextmanager
    def standing_still(self, find_snapshots: Callable[[], Sequence[Snapshot]], step: int) -> Iterator[Bench]:
        """Yield a bench; the weights and all else are the same afterwards.

        Args:
            find_snapshots: Returns what to merge, beside the latest weights.
            step: The latest weights' own.
        """
        model = self._model
        with Standstill(self._trainer, model.ownership, model.local_layout) as standstill:
            validation = self._make_validation(standstill)
            standstill.watch(validation.loaders)
            latest = model.select(standstill.weights)
            merger = Merger(model.layout, model.live, find_snapshots(), latest, step, model.space.group_of)
            with model.merging(merger) as merge:
                load = self._recalibrated(merge, validation)
                yield Bench(
                    merger=merger,
                    validation=validation,
                    begin=standstill.begin,
                    load=load,
                    differentiate=Derivatives(model, merger, load, standstill, validation),
                )

    def _make_validation(self, standstill: Standstill) -> Validation:
        callback, config = self._callback, self._callback.evaluation
        if config.dataloader is not None and self._own_loaders is None:
            self._own_loaders = self._find_loaders(config.dataloader)
        monitors, comm = callback.monitors, self._model.comm
        return Validation(self._trainer, callback, config, monitors, comm, standstill, self._own_loaders)

    def _find_loaders(self, name: str) -> Any:
        trainer = self._trainer
        owners = [o for o in (getattr(trainer, "datamodule", None), trainer.lightning_module) if hasattr(o, name)]
        if not owners:
            raise ConfigError(
                f"`evaluation.dataloader` must name a method of the datamodule or module, got {name!r}. "
                "Define it, or leave the argument out to use the run's validation loaders."
            )
        return getattr(owners[0], name)()

    def _recalibrated(self, merge: Load, validation: Validation) -> Load:
        num_batches = self._callback.evaluation.recalibrate_batches

        def load(c: Coefficients) -> None:
            merge(c)
            if num_batches:
                validation.recalibrate(num_batches)

        return load
