"""The tensors of a Hugging Face config's model, asked of transformers where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A model's tensors.

    Args:
        shapes: Of each name in its ``state_dict``.
        kept: The names that a file must hold: of tied ones the first.
    """

    shapes: dict[str, tuple[int, ...]]
    kept: tuple[str, ...]


def expected_tensors(config_dir: Path) -> Expected | None:
    """Return the tensors of a config's model, which is built without memory.

    ``None`` if transformers is not installed, or does not know the model, whose code comes with the config; that is not
    run here.
    """
    try:
        import transformers
    except ImportError:
        return None
    import torch

    config = transformers.AutoConfig.from_pretrained(config_dir, local_files_only=True)
    model_class: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        return None
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    kept = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return Expected(shapes=shapes, kept=tuple(name for name in shapes if name in kept))
