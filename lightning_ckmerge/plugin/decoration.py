"""What is shown of a search must not cost the search: reports, charts, loggers and progress bars may fail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.pytorch.utilities import rank_zero_warn

from lightning_ckmerge.errors import explain


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn an error within into one warning.

    Args:
        what: Begins the warning, such as ``"The run's report"``.
    """
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{what} failed: {explain(error)}. The search and its artifact are not touched by this.")
