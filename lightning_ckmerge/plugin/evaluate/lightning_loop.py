"""Evaluate inside ``fit`` and leave no trace: the one file that uses Lightning's private names.

A trial runs the user's own ``validation_step``, hooks and ``self.log`` calls in an evaluation loop of its own, swapped
in for the run's while the other callbacks' validation hooks, the loggers and the profiler are muted. The run's own
loop, with its progress, results and loader iterators, is never touched. ``PRIVATE_NAMES`` lists what is borrowed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ckmerge.plugin.evaluate.batch_values import BatchRecorder
from lightning_ckmerge.plugin.evaluate.candidate import Candidate
from lightning_ckmerge.plugin.evaluate.halves import length_of, stoppable
from lightning_ckmerge.plugin.restore.interruptions import lightning_package

# Private name -> what it is for. Tested on Lightning 2.6.6.
PRIVATE_NAMES = {
    "loops._EvaluationLoop": "the loop that evaluates a trial",
    "loops._EvaluationLoop.on_run_start": "the hooks that start a loop",
    "loops._EvaluationLoop._combined_loader": "the loaders of a loop",
    "CombinedLoader._mode": "how several loaders make one batch",
    "loops._EvaluationLoop._max_batches": "the limits of a loop",
    "loops._EvaluationLoop._last_val_dl_reload_epoch": "keeps a loop from asking for its loaders again",
    "loops._EvaluationLoop._data_source": "asks the user for validation loaders before the run has done so",
    "loops._EvaluationLoop._store_dataloader_outputs": "ends each loader of a loop",
    "loops._EvaluationLoop._results": "what validation_step logged, batch by batch",
    "Trainer._data_connector._prepare_dataloader": "gives own loaders the strategy's sampler",
    "Trainer.fit_loop._combined_loader": "the training loaders, for BatchNorm statistics",
    "Trainer._checkpoint_connector": "makes a checkpoint without `Trainer.save_checkpoint`'s barrier",
    "Trainer.strategy._checkpoint_io": "a run's IO plugin, which may write elsewhere or later",
    "Trainer._logger_connector": "metrics that the run has logged so far",
    "Trainer._last_val_time": "when the run validated last",
    "LightningModule._current_fx_name": "the hook that is running",
    "LightningModule._metric_attributes": "names of metric objects",
}
VALIDATION_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)


def uploads_checkpoints(logger: Any) -> bool:
    """Whether a W&B or MLflow logger's own ``log_model`` lets it upload checkpoints, which it keeps to itself."""
    # Not in PRIVATE_NAMES: these loggers need libraries that may be missing, and without the name nothing is uploaded.
    return bool(getattr(logger, "_log_model", False))


def evaluate(
    trainer: Trainer,
    callback: Callback,
    parts: Sequence[Iterable[Any]],
    recorder: BatchRecorder,
    like: Any,
    candidate: Candidate,
    on_start: Callable[[], None] | None = None,
    step: Callable[..., Any] | None = None,
) -> dict[str, float]:
    """Run the user's validation of the live weights, and return what this rank's has logged.

    Args:
        trainer: The Trainer, inside ``fit``.
        callback: Ours; it is told of batches in place of the muted others.
        parts: Batches to evaluate on, of each loader.
        recorder: Takes each batch's values, and may stop the evaluation.
        like: The ``CombinedLoader`` that ``parts`` are of.
        candidate: The live weights, which are kept in place.
        on_start: Called when the module's own hooks have started validation.
        step: Called in place of the module's ``validation_step``.
    """
    stopped = functools.partial(_has_stopped, recorder)
    loop = _make_loop(trainer, [stoppable(p, stopped) for p in parts], like)
    # In which metrics are reduced over ranks.
    loop._store_dataloader_outputs = functools.partial(_end_loader, recorder, loop._store_dataloader_outputs)
    hooks: dict[str, Callable[..., None]] = {
        "on_validation_batch_start": recorder.begin_batch,
        "on_validation_batch_end": functools.partial(_record, recorder, loop, candidate),
        "on_validation_epoch_end": functools.partial(_end, candidate),
    }
    loop.on_run_start = functools.partial(_start, loop.on_run_start, candidate, on_start)
    own_step = {} if step is None else {"validation_step": step}
    try:
        with _isolated(trainer, loop), _listening(callback, hooks), _listening(trainer.lightning_module, own_step):
            logged = loop.run()
            recorder.higher_is_better = _directions(loop)
    finally:
        loop.teardown()
    return {name: float(value) for row in logged for name, value in row.items()}


def training_loader(trainer: Trainer) -> Any:
    """Return the ``CombinedLoader`` of the run's training batches."""
    return trainer.fit_loop._combined_loader


def find_loaders(trainer: Trainer, own_loaders: Any) -> tuple[Any, list[Any], list[float]]:
    """Return the validation loaders together, one by one, and the limit of each.

    Args:
        trainer: The Trainer, inside ``fit``.
        own_loaders: Loaders to prepare as the run's own are; ``None``: the run's own.
    """
    source = trainer.fit_loop.epoch_loop.val_loop
    if own_loaders is not None:
        utilities = importlib.import_module(f"{lightning_package(trainer)}.utilities.combined_loader")
        given = isinstance(own_loaders, utilities.CombinedLoader)
        combined = own_loaders if given else utilities.CombinedLoader(own_loaders, "sequential")
        stage = _states(trainer).RunningStage.VALIDATING
        prepare = functools.partial(trainer._data_connector._prepare_dataloader, shuffle=False, mode=stage)
        loaders = [prepare(d) for d in combined.flattened]
        return combined, loaders, [length_of(d) for d in loaders]
    if source._combined_loader is None:
        # No validation has run yet. The run will ask for its loaders when it is due to, and draw the same random
        # numbers then as without us.
        loop = _make_loop(trainer, [])
        loop._data_source = source._data_source
        loop._last_val_dl_reload_epoch = source._last_val_dl_reload_epoch
        with _isolated(trainer, loop):
            loop.setup_data()
        source = loop
    if source._combined_loader is None:
        return None, [], []
    return source._combined_loader, list(source._combined_loader.flattened), list(source._max_batches)


def logged_names(trainer: Trainer) -> set[str]:
    """Return the names that the run has logged, those of the validation that is just ending included.

    The sanity check does not enter what it logged from several loaders into ``callback_metrics``.
    """
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return {*trainer.callback_metrics, *(n for e in results.values() if e.meta.on_epoch for n in _logged_names(e.meta))}


def directions(trainer: Trainer) -> dict[str, bool]:
    """Return, for each torchmetrics object that the validation now ending has logged, whether higher is better."""
    return _directions(trainer.fit_loop.epoch_loop.val_loop)


def current_hook(trainer: Trainer) -> str | None:
    """Return the name of the hook that Lightning is running."""
    name: str | None = trainer.lightning_module._current_fx_name
    return name


def dump_weights(trainer: Any) -> dict[str, Any]:
    """Return a checkpoint of the live weights alone, for ``write_checkpoint``. All ranks take part.

    ``Trainer.save_checkpoint`` does both, without a chance to agree in between or before the barrier after them. With
    ``weights_only=False`` an EMA callback would write its own average instead.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    return checkpoint


def write_checkpoint(trainer: Any, checkpoint: dict[str, Any], path: Path, *, is_sharded: bool) -> None:
    """Write a checkpoint that is complete when all ranks have returned, whatever IO plugin the run has.

    A plugin may write later, elsewhere or in a form of its own; an artifact is hashed and moved as soon as it is there.
    """
    strategy = trainer.strategy
    plain = importlib.import_module(f"{lightning_package(trainer)}.plugins.io").TorchCheckpointIO()
    if not is_sharded:
        if trainer.is_global_zero:
            plain.save_checkpoint(checkpoint, path)
        return
    own, strategy._checkpoint_io = strategy._checkpoint_io, plain
    try:
        type(strategy).save_checkpoint(strategy, checkpoint, path)
    finally:
        strategy._checkpoint_io = own


def mode_of(combined: Any) -> Any:
    """Return how the loaders of a ``CombinedLoader`` make one batch."""
    return combined._mode


def _make_loop(trainer: Trainer, parts: Sequence[Iterable[Any]], like: Any = None) -> Any:
    """Return a loop over ``parts``, which stand in for the loaders of a ``CombinedLoader`` like this one."""
    loops, states = importlib.import_module(f"{lightning_package(trainer)}.loops"), _states(trainer)
    # inference_mode=False as in fit: inference tensors would get into the user's metric states.
    loop = loops._EvaluationLoop(
        trainer,
        states.TrainerFn.FITTING,
        states.RunningStage.VALIDATING,
        verbose=False,
        inference_mode=False,
    )
    if like is not None:
        loop._combined_loader = type(like)(like.iterables, mode_of(like))
        loop._combined_loader.flattened = list(parts)
    loop._max_batches = [length_of(p) for p in parts]
    loop._last_val_dl_reload_epoch = math.inf
    return loop


def _states(trainer: Trainer) -> Any:
    return importlib.import_module(f"{lightning_package(trainer)}.trainer.states")


def _start(run_hooks: Callable[[], None], candidate: Candidate, on_start: Callable[[], None] | None) -> None:
    """Start a loop: the candidate is in place when all hooks have run."""
    run_hooks()
    candidate.started()
    if on_start is not None:
        on_start()


def _end(candidate: Candidate, *_: Any) -> None:
    candidate.ending()


def _record(recorder: BatchRecorder, loop: Any, candidate: Candidate, *hook_args: Any) -> None:
    """Hand a batch's sums to the recorder, for each metric that is a mean over batches."""
    sums = {}
    for entry in loop._results.values():
        is_mean = entry.is_tensor and entry.meta.is_mean_reduction and entry.meta.on_epoch
        if is_mean and entry.meta.fx.startswith("validation_step"):
            # Lightning sums `value * batch_size` in the value's own precision. Widened at the first batch, so that the
            # difference between two sums is a batch's value, and not what rounding left of it. Apple's GPUs cannot.
            if entry.value.device.type != "mps":
                entry.value = entry.value.double()
            sums.update(
                dict.fromkeys(_logged_names(entry.meta), (float(entry.value), float(entry.cumulated_batch_size)))
            )
    # The hook's arguments: trainer, module, outputs, batch, batch_idx and, with several loaders, dataloader_idx.
    batch_idx, dataloader_idx = (*hook_args[4:6], 0)[:2]
    if batch_idx == 0:
        candidate.ran_batch()
    recorder.take(sums, dataloader_idx=dataloader_idx, batch_idx=batch_idx)


def _directions(loop: Any) -> dict[str, bool]:
    said = {
        name: getattr(entry.value, "higher_is_better", None)
        for entry in loop._results.values()
        if entry.meta.on_epoch and not entry.is_tensor
        for name in _logged_names(entry.meta)
    }
    return {name: bool(higher) for name, higher in said.items() if higher is not None}


def _end_loader(recorder: BatchRecorder, store_outputs: Callable[[], None]) -> None:
    recorder.end_loader()
    store_outputs()


def _has_stopped(recorder: BatchRecorder) -> bool:
    return recorder.stopped


def _logged_names(meta: Any) -> set[str]:
    """The names under which Lightning's epoch metrics appear: two, where steps are logged as well."""
    is_one_of_several = meta.add_dataloader_idx and meta.dataloader_idx is not None
    suffix = f"/dataloader_idx_{meta.dataloader_idx}" if is_one_of_several else ""
    return {f"{meta.name}{suffix}", f"{meta.forked_name(on_step=False)}{suffix}"}


@contextlib.contextmanager
def _isolated(trainer: Any, loop: Any) -> Iterator[None]:
    """Let ``loop`` stand in for the run's validation loop, and put back all that this touches."""
    package = lightning_package(trainer)
    dummy = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    no_profiler = importlib.import_module(f"{package}.profilers").PassThroughProfiler
    module, epoch_loop, connector = trainer.lightning_module, trainer.fit_loop.epoch_loop, trainer._logger_connector
    saved = (trainer.state.stage, epoch_loop.val_loop, trainer.loggers, trainer.profiler, trainer.should_stop)
    saved_module = (module._current_fx_name, module._metric_attributes)
    last_val_time = getattr(trainer, "_last_val_time", None)
    logged = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(connector).items() if k != "trainer"}
    try:
        epoch_loop.val_loop = loop
        # Not an empty list where there were loggers: a module may use `self.logger`.
        trainer.loggers = [dummy()] if trainer.loggers else []
        trainer.profiler = no_profiler()
        trainer.validating = True
        with contextlib.ExitStack() as stack:
            # `trainer.callbacks` stays as it is: a progress bar's thread looks itself up there.
            for callback in trainer.callbacks:
                stack.enter_context(_listening(callback, dict.fromkeys(VALIDATION_HOOKS, _ignore)))
            yield
    finally:
        trainer.state.stage, epoch_loop.val_loop, trainer.loggers, trainer.profiler, trainer.should_stop = saved
        module._current_fx_name, module._metric_attributes = saved_module
        if last_val_time is not None:
            trainer._last_val_time = last_val_time
        vars(connector).update(logged)


@contextlib.contextmanager
def _listening(listener: Callback | LightningModule, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace hooks of one object, and take the replacements away again."""
    own = vars(listener)
    saved = {name: own[name] for name in hooks if name in own}
    own.update(hooks)
    try:
        yield
    finally:
        for name in hooks:
            own.pop(name, None)
        own.update(saved)


def _ignore(*_: Any, **__: Any) -> None:
    return None
