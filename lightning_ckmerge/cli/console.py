"""How commands speak: tables to people, JSON to programs, one line of error, a progress bar where it takes long.

Colours and bars appear on a terminal only. Exit codes: 0 all is well, 1 the command found that something is not, 2 the
command could not do its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

FOUND = 1
FAILED = 2
# Off a terminal lines are for `grep`: they do not wrap.
WIDTH_OF_FILES = 400
# All but tabs and line feeds, with the second half of Latin-1's.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STATUS_STYLES = {"accepted": "bold green", "rejected": "bold red", "unconfirmed": "bold yellow"}


class Advance(Protocol):
    """Moves a bar on; a new total takes the place of the old one."""

    def __call__(self, amount: int, total: int | None = None) -> None:
        """Add ``amount`` to the progress."""


def console() -> Console:
    """Return standard output for people."""
    from rich.console import Console

    class PlainConsole(Console):
        """Shows a stranger's texts without their control characters."""

        def render_str(self, text: str, **kwargs: Any) -> Text:
            return super().render_str(printable(text), **kwargs)

    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    return PlainConsole(width=width, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """Return a text without the characters that move a terminal's cursor, change its title or type for its user.

    >>> printable("better\\x1b[2J by 3 %")
    'better\ufffd[2J by 3 %'
    """
    return CONTROL.sub("\ufffd", text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> Table:
    """Return a table whose last columns keep their width when the terminal is narrow."""
    from rich import box
    from rich.table import Table

    made = Table(
        *header,
        box=box.SIMPLE_HEAD if any(header) else None,
        show_header=any(header),
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for row in rows:
        made.add_row(*row)
    return made


def status_text(status: str) -> Any:
    """Return a verdict's status in its colour."""
    from rich.text import Text

    return Text(printable(status), style=STATUS_STYLES.get(status.lower(), ""))


def verdict_text(verdict: Mapping[str, Any]) -> Any:
    """Return a verdict in one line: its status in its colour, and the sentence, which may start with it.

    Within a line, "merging" has a small letter, as after "Unconfirmed:" in reports and logs.
    """
    from rich.text import Text

    rest = verdict["sentence"].removeprefix(f"{verdict['status'].capitalize()}: ")
    if rest.startswith("Merging "):
        rest = f"m{rest[1:]}"
    return Text.assemble(status_text(verdict["status"].capitalize()), ": ", printable(rest))


def print_json(value: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextlib.contextmanager
def progress(label: str, total: int | None, *, is_bytes: bool = False) -> Iterator[Advance]:
    """Yield a function that moves a bar on, on standard error, which goes away at the end; no bar off a terminal."""
    if not sys.stderr.isatty():
        yield lambda amount, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if is_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount, total=None: bar.update(task, advance=amount, total=total)


def hash_files(paths: Sequence[Path], label: str) -> dict[Path, dict[str, Any]]:
    """Return bytes and SHA-256 of each file, hashed side by side, with a bar."""
    from lightning_ckmerge.tensorfiles.durable import file_record

    stopped = threading.Event()
    with progress(label, sum(path.stat().st_size for path in paths), is_bytes=True) as advance:

        def on_bytes(num_bytes: int) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            advance(num_bytes)

        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="ckmerge-hash") as pool:
            try:
                return dict(zip(paths, pool.map(lambda path: file_record(path, on_bytes), paths), strict=True))
            finally:
                stopped.set()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be Ctrl-C: safetensors turns one that arrives while it reads into an error of its own."""
    received = False
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        if callable(previous):
            previous(number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if received:
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGINT, previous)


def tell_choice(path: Path, *, as_json: bool) -> dict[str, str]:
    """Say which of several runs a path stands for: to people in a line, to programs as the entry that is returned."""
    from lightning_ckmerge.artifact import runs

    note = runs.tell_choice(path)
    if note is None:
        return {}
    if not as_json:
        typer.echo(f"note: {note}", err=True)
    return {"note": note}


def fail(message: str, kind: str, *, as_json: bool = False) -> typer.Exit:
    """Print an error in one line, for programs also as JSON on standard output, and return the command's exit."""
    line = printable(" ".join(message.split()))
    typer.echo(f"error: {line}", err=True)
    if as_json:
        print_json({"ok": False, "error": {"type": kind, "message": line}})
    return typer.Exit(FAILED)
