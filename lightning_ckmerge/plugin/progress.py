"""Show a search on the Trainer's own progress bar; plain log lines are the caller's where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from lightning.pytorch import Trainer

from lightning_ckmerge.core.outcome import Trial


class OnScored(Protocol):
    """Told of each scored trial, and of how many are expected in all."""

    def __call__(self, trial: Trial, total: int) -> None:
        """Show it."""


@contextlib.contextmanager
def search_progress(trainer: Trainer, step: int, sign: int) -> Iterator[OnScored]:
    """Yield a function that advances a line under the training bar; it goes away with the search.

    Args:
        trainer: Its progress bar may be tqdm's, rich's, somebody else's (then nothing is shown) or none.
        step: For the label.
        sign: 1 if lower values are better, -1 if higher ones are.
    """
    bar: Any = trainer.progress_bar_callback
    best: Trial | None = None
    shows = getattr(bar, "is_enabled", False)  # a bar of the user's own need not have it
    with contextlib.ExitStack() as stack:
        advance = None
        if shows and hasattr(bar, "init_validation_tqdm"):
            advance = stack.enter_context(_tqdm(bar))
        elif shows and getattr(bar, "progress", None) is not None:
            advance = stack.enter_context(_rich(bar))

        def on_scored(trial: Trial, total: int) -> None:
            nonlocal best
            if best is None or (trial.search.complete and sign * (trial.search.value - best.search.value) < 0):
                best = trial
            if advance is not None:
                advance(f"Merge search at step {step}, best {best.search.value:.4g}", total)

        yield on_scored


@contextlib.contextmanager
def _tqdm(bar: Any) -> Iterator[Any]:
    line = bar.init_validation_tqdm()
    line.set_description("Merge search")

    def advance(text: str, total: int) -> None:
        line.total = total
        line.set_description(text)
        line.update()

    try:
        yield advance
    finally:
        line.close()


@contextlib.contextmanager
def _rich(bar: Any) -> Iterator[Any]:
    line = bar.progress.add_task("Merge search", total=1)  # Lightning's own class refuses an unknown total

    def advance(text: str, total: int) -> None:
        bar.progress.update(line, description=text, total=total, advance=1)
        bar.refresh()

    try:
        yield advance
    finally:
        bar.progress.remove_task(line)
        bar.refresh()
