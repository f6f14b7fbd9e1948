"""How long the package takes to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.speed.rounds import Row, at_most, medians

NAMES = ("spaces", "merge", "merge_plan", "native.fused", "layout", "outcome", "segments")


def measure() -> Iterator[Row]:
    """Yield the rows of ``import``."""
    ours = "import " + ", ".join(f"lightning_ckmerge.core.{name}" for name in NAMES)
    found = medians({program: _importing(program) for program in ("import torch", ours, "import lightning_ckmerge")})
    ratio = found[ours] / found["import torch"]
    yield at_most("`import lightning_ckmerge.core.*`, of `import torch`", ratio, 1.2)
    ratio = found["import lightning_ckmerge"] / found["import torch"]
    yield Row(what="`import lightning_ckmerge`, of `import torch`", target="", measured=f"{ratio:.2f}", met=None)


def _importing(program: str) -> object:
    return lambda: subprocess.run([sys.executable, "-c", program], check=True)
