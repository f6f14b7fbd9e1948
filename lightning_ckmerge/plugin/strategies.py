"""Which strategies can be served; everything else is refused before training, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_ckmerge.config import Refine
from lightning_ckmerge.errors import SkipError, UnsupportedError
from lightning_ckmerge.plugin.evaluate.lightning_loop import current_hook

# Where a rank holds the model whole, or shards of it whose places are known. By name: `pytorch_lightning` has classes
# of its own, and DeepSpeed's may not be importable.
SERVED = (
    "SingleDeviceStrategy",
    "DDPStrategy",
    "ModelParallelStrategy",
    "FSDPStrategy",
    "DeepSpeedStrategy",
)
WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
# Whose random state can be put back, and whose tensors are those of eager PyTorch.
DEVICES = ("cpu", "cuda", "mps")
# Between a forward pass and the optimizer's step, where sharded weights are about to be gathered.
IN_A_STEP = (
    "training_step",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
)
SUPPORTED = (
    "Supported: a single device, `ddp` with any launcher, ModelParallelStrategy (FSDP2, tensor parallelism, both), "
    "FSDPStrategy with `use_orig_params=True`, DeepSpeed stages 1 and 2."
)


def check_supported(trainer: Trainer, refine: Refine | None = None) -> None:
    """Raise ``UnsupportedError`` unless the strategy can be served, and a search by gradients if that is asked for."""
    strategy: Any = trainer.strategy
    names = [cls.__name__ for cls in type(strategy).__mro__]
    if not any(name in SERVED for name in names):
        raise UnsupportedError(f"the strategy must be supported, got {names[0]}. {SUPPORTED}")
    device = _device_type(strategy)
    if device is not None and device not in DEVICES:
        raise UnsupportedError(
            f"the device must be one of {', '.join(DEVICES)}, got {device}, whose random state "
            "cannot be put back after a search. Train on one of these, or search the checkpoints afterwards with "
            "`ckmerge search`."
        )
    reason = _refusal(strategy, names)
    if reason is not None:
        raise UnsupportedError(f"{reason} {SUPPORTED}")
    if refine is not None and not _is_whole(names):
        raise UnsupportedError(
            f"`search.refine` needs a strategy that holds the model whole and leaves gradients to PyTorch, a single "
            f"device or `ddp`, got {names[0]}. Leave it out."
        )


def _device_type(strategy: Any) -> str | None:
    """Return the kind of device; ``None`` where ranks do not know theirs yet, as in a plan."""
    if not hasattr(strategy, "parallel_devices"):
        return str(strategy.root_device.type)
    devices = strategy.parallel_devices
    return str(devices[0].type) if devices else None


def check_moment(trainer: Trainer) -> None:
    """Raise ``SkipError`` where a search would change the step that is under way."""
    device, hook = trainer.strategy.root_device.type, current_hook(trainer)
    if torch.is_autocast_enabled(device):
        raise SkipError(
            "autocast is on, and keeps copies of the weights in its lower precision. Search outside of the training "
            "step, such as in `on_train_batch_end`."
        )
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    if hook in IN_A_STEP and not _is_whole(names):
        raise SkipError(
            f"`{hook}` is within a step, for which {names[0]} gathers and shards the weights. Search outside of it, "
            "such as in `on_train_batch_end`."
        )


def _is_whole(names: list[str]) -> bool:
    """Whether each rank holds the model whole, and leaves gradients to PyTorch."""
    return next(name for name in names if name in SERVED) in WHOLE


def _refusal(strategy: Any, names: list[str]) -> str | None:
    if "FSDPStrategy" in names and not strategy.kwargs.get("use_orig_params", False):
        return "FSDPStrategy must keep the original parameters, got `use_orig_params=False`."
    if "DeepSpeedStrategy" in names:
        stage = (strategy.config or {}).get("zero_optimization", {}).get("stage", 0)
        if stage >= 3:
            return f"DeepSpeed must leave the parameters whole on every rank, got stage {stage}."
    return None
