"""Callbacks that Lightning puts into each Trainer, by the entry-point group ``lightning.pytorch.callbacks_factory``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_ckmerge import BufferConfig, CheckpointMergeCallback, SearchConfig

ROOT = "CKMERGE_SUITE_ROOT"
KIND = "CKMERGE_SUITE_KIND"
MAX_SEARCHES = 2  # of one `fit`
MONITOR = "length_of_the_weights"


class Bystander(pl.Callback):
    """The control: has a state, and does nothing. A test that fails with it too does not fail because of us."""

    def state_dict(self) -> dict[str, Any]:
        return {"stands": "by"}


class Everywhere(CheckpointMergeCallback):
    """Searches often, in modules that log nothing: the monitored metric is logged during searches alone."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor_seen = True
        super().on_validation_end(trainer, pl_module)

    def _make_run(self, trainer: pl.Trainer, *args: Any) -> Any:
        run = super()._make_run(trainer, *args)
        if run is not None:
            run.search = searching(run.search, trainer.lightning_module)
        return run


def searching(search: Callable[[], Any], module: pl.LightningModule) -> Callable[[], Any]:
    """Return a search during which each validation step of the module also logs the length of its weights."""

    num_left = MAX_SEARCHES

    def logged_search() -> Any:
        nonlocal num_left
        if num_left == 0:
            return None
        num_left -= 1
        step = module.validation_step

        def logging_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            length = sum(float(p.detach().double().square().sum()) for p in module.parameters())
            module.log(MONITOR, length, batch_size=1, on_epoch=True, on_step=False)
            return output

        own = vars(module).get("validation_step")
        vars(module)["validation_step"] = logging_step
        try:
            return search()
        finally:
            if own is None:
                del vars(module)["validation_step"]
            else:
                vars(module)["validation_step"] = own

    return logged_search


def make() -> list[pl.Callback]:
    """Return the callbacks for one Trainer: those of the environment's kind of run."""
    kind = os.environ.get(KIND, "plain")
    if kind == "bystander":
        return [Bystander()]
    if kind != "merging":
        return []
    return [
        Everywhere(
            monitor=MONITOR,
            check_mode=False,
            dirpath=Path(tempfile.mkdtemp(dir=os.environ[ROOT])),
            every_n_train_steps=2,
            buffer=BufferConfig(every_n_train_steps=1, capacity=3),
            search=SearchConfig(n_trials=1, anchors=["uniform"], max_fraction_of_training=None, at_low_lr="search"),
        )
    ]
