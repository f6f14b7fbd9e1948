"""What a search keeps of a run beside its module: optimizers, schedulers, settings, progress, data, torch's flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_ckmerge.plugin.restore.kept import Attributes, Setting, attribute
from lightning_ckmerge.plugin.restore.saved_state import Allowance, SavedState

# Set by handlers of signals, which may arrive at any time.
MOVING = ("should_stop",)
LOOPS = (
    "fit_loop",
    "fit_loop.epoch_loop",
    "fit_loop.epoch_loop.automatic_optimization",
    "fit_loop.epoch_loop.manual_optimization",
    "fit_loop.epoch_loop.val_loop",
)
# A forward pass without gradients tells DDP to skip the next broadcast of buffers.
DDP_FLAGS = ("require_forward_param_sync", "require_backward_grad_sync")
# Name -> how it is read and written.
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "NumPy's handling of errors": (np.geterr, lambda saved: np.seterr(**saved)),
}


def run_weights(module: nn.Module) -> list[Tensor]:
    """Return the parameters that a search itself changes and puts back."""
    return [p for p in module.parameters() if not is_lazy(p) and (p.is_floating_point() or p.is_complex())]


def keep_run(trainer: Any, memory: SavedState, allowance: Allowance) -> None:
    """Keep what a Trainer's hooks can change outside of the module.

    Args:
        trainer: The Trainer, inside ``fit``.
        memory: Where to keep it.
        allowance: Of copies.
    """
    for name in ("datamodule", "train_dataloader", "val_dataloaders"):
        memory.take(getattr(trainer, name), name, allowance)
    for i, optimizer in enumerate(trainer.optimizers):
        memory.take(optimizer, f"optimizers[{i}]", allowance)
    memory.take(trainer.lr_scheduler_configs, "lr_scheduler_configs", allowance)
    settings = {"trainer": trainer, "strategy": trainer.strategy, "precision plugin": trainer.precision_plugin}
    settings.update((path, _follow(trainer, path)) for path in LOOPS)
    for where, holder in settings.items():
        own = Attributes(where, vars(holder), moving=MOVING)
        memory.kept.append(own)
        for name, value in own.saved.items():
            memory.take(value, f"{where}.{name}", allowance)
    for name, hooks in vars(module_hooks).items():
        if name.startswith("_global_") and isinstance(hooks, dict):
            memory.take(hooks, f"torch's {name}", allowance)
    if isinstance(trainer.model, DistributedDataParallel):
        memory.kept += [attribute(f"DDP's {flag}", trainer.model, flag) for flag in DDP_FLAGS]
    memory.kept += [Setting(name, read, write) for name, (read, write) in SWITCHES.items()]


class Gradients:
    """The gradients of a run, laid aside: a search has none, as any validation, and gives the run back its own.

    FSDP1 keeps its gradients in step with its flat parameters, so they stay where they are.
    """

    def __init__(self, module: nn.Module) -> None:
        is_flat = any(isinstance(m, FullyShardedDataParallel) for m in module.modules())
        self._own = [] if is_flat else [(p, p.grad) for p in module.parameters()]
        self.lay_aside()

    def lay_aside(self) -> None:
        """Take away the gradients that there are."""
        for parameter, _ in self._own:
            if parameter.grad is not None:
                parameter.grad = None

    def put_back(self) -> None:
        """Give each parameter the gradient that it had."""
        for parameter, gradient in self._own:
            if parameter.grad is not gradient:
                parameter.grad = gradient


def _follow(holder: Any, path: str) -> Any:
    for name in path.split("."):
        holder = getattr(holder, name)
    return holder
