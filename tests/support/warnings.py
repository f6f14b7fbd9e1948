"""The inventory of warnings that a test's run may show. Any other fails the test."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

EXPECTED: tuple[str, ...] = ()


@contextmanager
def only_expected(*also: str) -> Iterator[list[str]]:
    """Yield a list, which holds the texts of all warnings once the block has been left.

    Args:
        also: Patterns of warnings that this block alone may show, beside those of the inventory. A text is searched
            for them.

    Raises:
        AssertionError: The block has ended well, and showed another warning.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [str(w.message) for w in caught]
    patterns = [re.compile(p) for p in (*EXPECTED, *also)]
    found = [w for w in caught if not any(p.search(str(w.message)) for p in patterns)]
    if found and (path := os.environ.get("DISCOVER")):
        with open(path, "a") as f:
            for w in found:
                f.write(
                    f"{os.environ.get('PYTEST_CURRENT_TEST')}\t{w.category.__name__}\t{str(w.message)[:300]!r}\t{w.filename}\n"
                )
        return
    assert not found, "\n".join(f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}" for w in found)
