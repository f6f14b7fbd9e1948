"""Output during a run: lines that no progress bar overwrites, and a search on the Trainer's own bar.

Showing a search must not cost the search: reports, charts, loggers and progress bars may fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ckmerge.core.outcome import Scored
from lightning_ckmerge.errors import explain


class OnScored(Protocol):
    """Called with each scored candidate and the number expected in all."""

    def __call__(self, scored: Scored, total: int, /) -> None:
        """Show it."""


def say(trainer: Trainer, text: str, tell: Callable[[str], None] = rank_zero_info) -> None:
    """Tell people something, on rank 0, on lines of its own above the progress bar.

    Args:
        trainer: Its bar makes room.
        text: One line or more.
        tell: Where it goes: a log record by default, so that it is in every log, once; or ``rank_zero_warn``.
    """
    bar: Any = trainer.progress_bar_callback
    with contextlib.ExitStack() as stack:
        if getattr(bar, "is_enabled", False) and trainer.is_global_zero:
            with contextlib.suppress(Exception):  # the message goes out even if the bar fails to make room
                if hasattr(bar, "init_validation_tqdm"):
                    stack.enter_context(Tqdm.external_write_mode())
                elif (live := getattr(getattr(bar, "progress", None), "live", None)) is not None:
                    stack.enter_context(_without_live(bar.progress, live))
        tell(text)


@contextlib.contextmanager
def harmless(
    what: str, trainer: Trainer | None = None, spared: str = "The search and its artifact are"
) -> Iterator[None]:
    """Turn an error within into one warning.

    Args:
        what: Start of the warning, such as ``"The run's report"``.
        trainer: Its bar makes room; ``None``: the warning needs none, or the bar itself failed.
        spared: What the error leaves as it is, with its verb.
    """
    try:
        yield
    except Exception as error:
        text = f"{what} failed: {explain(error)}. {spared} unaffected."
        if trainer is None:
            rank_zero_warn(text)
        else:
            say(trainer, text, rank_zero_warn)


@contextlib.contextmanager
def _without_live(progress: Any, live: Any) -> Iterator[None]:
    """Take a Rich display off the terminal: log handlers write past it, and it would be drawn over their lines."""
    console = live.console
    if not (live.is_started and console.is_terminal) or console.is_jupyter:
        yield
        return
    transient, live.transient = live.transient, True  # stops without a trace
    progress.stop()
    # It has moved up by its rows; the next drawing would go up by as many again, over what is said meanwhile.
    render: Any = getattr(live, "_live_render", None)
    if render is not None and hasattr(render, "_shape"):
        render._shape = None
    try:
        yield
    finally:
        live.transient = transient
        progress.start()


@contextlib.contextmanager
def search_progress(trainer: Trainer, step: int, sign: int) -> Iterator[OnScored]:
    """Yield a function that advances a line under the training bar; it goes away with the search.

    Args:
        trainer: Its progress bar may be tqdm's, rich's, another (then nothing is shown) or none.
        step: For the label.
        sign: 1 if lower values are better, -1 if higher ones are.
    """
    bar: Any = trainer.progress_bar_callback
    best: Scored | None = None
    shows = getattr(bar, "is_enabled", False)  # a bar of the user's own need not have it
    stack, advance = contextlib.ExitStack(), None
    try:
        with harmless("The progress bar"):
            if shows and hasattr(bar, "init_validation_tqdm"):
                advance = stack.enter_context(_tqdm(bar))
            elif shows and getattr(bar, "progress", None) is not None:
                advance = stack.enter_context(_rich(bar))

        def on_scored(scored: Scored, total: int) -> None:
            nonlocal best, advance
            if best is None or (scored.search.complete and sign * (scored.search.value - best.search.value) < 0):
                best = scored
            tell, advance = advance, None  # no second time, should it fail
            with harmless("The progress bar"):
                if tell is not None:
                    tell(f"Merge search at step {step}, best {best.search.value:.4g}", total)
                advance = tell

        yield on_scored
    finally:
        with harmless("The progress bar"):
            stack.close()


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
