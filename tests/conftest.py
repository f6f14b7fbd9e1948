from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two gloo ranks, shared by all tests."""
    pool = RankPool(2)
    yield pool
    pool.stop()
