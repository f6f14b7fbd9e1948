"""Which Trainers can be served; everything else is refused before training, with the reason."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_ckmerge.errors import UnsupportedError

SINGLE_DEVICE = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy")


def check_supported(trainer: Trainer) -> None:
    """Raise ``UnsupportedError`` unless the whole model lives on one device."""
    # By name: `pytorch_lightning` has classes of its own.
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    alone = "DDPStrategy" in names and trainer.world_size == 1
    if alone or any(name in SINGLE_DEVICE for name in names):
        return
    raise UnsupportedError(
        f"the whole model must live on one device, got strategy {names[0]} with {trainer.world_size} processes. "
        "Use `Trainer(devices=1)`."
    )
