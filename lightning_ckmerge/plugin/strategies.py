"""Which strategies can be served; everything else is refused before training, with the reason."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_ckmerge.config import Refine
from lightning_ckmerge.errors import UnsupportedError

# Where a rank holds the model whole, or shards of it whose places are known. By name: `pytorch_lightning` has classes
# of its own, and DeepSpeed's may not be importable.
SERVED = (
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "DDPStrategy",
    "ModelParallelStrategy",
    "FSDPStrategy",
    "DeepSpeedStrategy",
)
REFINED = ("SingleDeviceStrategy", "DDPStrategy")
WHAT_WORKS = (
    "What works: a single device, `ddp` with any launcher, ModelParallelStrategy (FSDP2, tensor parallelism, both), "
    "FSDPStrategy with `use_orig_params=True`, DeepSpeed stages 1 and 2."
)


def check_supported(trainer: Trainer, refine: Refine | None = None) -> None:
    """Raise ``UnsupportedError`` unless the strategy can be served, and a search by gradients if that is asked for."""
    strategy: Any = trainer.strategy
    names = [cls.__name__ for cls in type(strategy).__mro__]
    if not any(name in SERVED for name in names):
        raise UnsupportedError(
            f"the strategy must be one whose tensors can be told apart, got {names[0]}. {WHAT_WORKS}"
        )
    reason = _refusal(strategy, names)
    if reason is not None:
        raise UnsupportedError(f"{reason} {WHAT_WORKS}")
    if refine is not None and next(name for name in names if name in SERVED) not in REFINED:
        raise UnsupportedError(
            f"`search.refine` needs a strategy that holds the model whole and leaves gradients to PyTorch, a single "
            f"device or `ddp`, got {names[0]}. Leave it out."
        )


def _refusal(strategy: Any, names: list[str]) -> str | None:
    if "FSDPStrategy" in names and not strategy.kwargs.get("use_orig_params", False):
        return "FSDPStrategy must keep the original parameters, got `use_orig_params=False`."
    if "DeepSpeedStrategy" in names:
        stage = (strategy.config or {}).get("zero_optimization", {}).get("stage", 0)
        if stage >= 3:
            return f"DeepSpeed must leave the parameters whole on every rank, got stage {stage}."
    return None
