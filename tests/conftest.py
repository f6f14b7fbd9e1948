from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.outcomes import Publish, publisher
from tests.support.ranks import RankPool

# On a busy machine a test that takes a millisecond may take a second.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# Their packages are installed in environments of their own (`make clients`).
collect_ignore = ["clients"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two gloo ranks, shared by all tests."""
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Publishes made-up searches of one run in ``tmp_path / "merges"``."""
    return publisher(tmp_path / "merges")
