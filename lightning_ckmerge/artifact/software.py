"""What a merge was made with."""

from __future__ import annotations

import platform
from importlib import metadata

DISTRIBUTIONS = {
    "lightning_ckmerge": "lightning-ckmerge",
    "torch": "torch",
    "lightning": "lightning",
    "optuna": "optuna",
    "safetensors": "safetensors",
}


def software() -> dict[str, str | None]:
    """Return the versions of what an artifact depends on; ``None`` for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            # Run from a source tree, or beside the `pytorch_lightning` package instead of `lightning`.
            versions[name] = None
    return versions
