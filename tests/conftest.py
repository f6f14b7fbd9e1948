from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.ranks import RankPool

# On a busy machine a test that takes a millisecond may take a second.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two gloo ranks, shared by all tests."""
    pool = RankPool(2)
    yield pool
    pool.stop()
