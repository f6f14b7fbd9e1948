from __future__ import annotations

from tests.artifact.conftest import publish

__all__ = ["publish"]
