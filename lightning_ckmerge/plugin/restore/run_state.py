"""What a search keeps of a run beside its module: optimizers, schedulers, settings, progress, data, torch's flags."""

from __future__ import annotations

import decimal
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules import module as module_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_ckmerge.plugin.restore.kept import Attributes, Setting, attribute, decimal_settings, set_decimal_settings
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


def _set_environment(saved: dict[str, str]) -> None:
    for name in os.environ.keys() - saved.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in saved.items() if os.environ.get(name) != value})


# Name -> how it is read and written.
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.backends.cuda.enable_flash_sdp": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "torch.backends.cuda.enable_mem_efficient_sdp": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "torch.backends.cuda.enable_math_sdp": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    "torch.backends.cuda.enable_cudnn_sdp": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "torch.backends.mkldnn": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "torch.backends.cudnn.enabled": (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    "torch.backends.cudnn.benchmark": (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    "torch.backends.cudnn.deterministic": (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    "torch's anomaly detection": (
        lambda: {"mode": torch.is_anomaly_enabled(), "check_nan": torch.is_anomaly_check_nan_enabled()},
        lambda saved: torch.autograd.set_detect_anomaly(**saved),
    ),
    "the decimal context": (
        lambda: decimal_settings(decimal.getcontext()),
        lambda saved: set_decimal_settings(decimal.getcontext(), saved),
    ),
    "os.environ": (lambda: dict(os.environ), _set_environment),
    "NumPy's handling of errors": (np.geterr, lambda saved: np.seterr(**saved)),
}


def run_weights(module: nn.Module) -> list[Tensor]:
    """Return the parameters that a search itself changes and puts back."""
    return [p for p in module.parameters() if not is_lazy(p) and (p.is_floating_point() or p.is_complex())]


def run_data(trainer: Any) -> dict[str, Any]:
    """Return what a run's data are read from."""
    return {name: getattr(trainer, name) for name in ("datamodule", "train_dataloader", "val_dataloaders")}


def keep_run(trainer: Any, memory: SavedState, allowance: Allowance) -> None:
    """Keep what a Trainer's hooks can change outside of the module.

    Args:
        trainer: The Trainer, inside ``fit``.
        memory: Where to keep it.
        allowance: Of copies.

    Raises:
        FinalError: All that is of too many objects.
    """
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
    memory.take_data(run_data(trainer), allowance)


class Gradients:
    """The gradients of a run, laid aside: a search has none, as any validation, and gives the run back its own.

    FSDP1 keeps its gradients in step with its flat parameters, so they stay where they are.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        is_flat = any(isinstance(m, FullyShardedDataParallel) for m in module.modules())
        # What is trained need not be registered.
        grouped = (p for o in optimizers for group in o.param_groups for p in group["params"])
        trained = {id(p): p for p in (*module.parameters(), *grouped)}.values()
        self._own = [] if is_flat else [(p, p.grad) for p in trained]
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
