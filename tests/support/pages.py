"""The documentation's pages, as readers see them, and what stands in their fences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs import hooks

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fence; ``reason`` says why it cannot be run here, ``line`` is the first one of its text."""

    language: str
    text: str
    line: int
    reason: str | None


def pages() -> dict[str, Path]:
    """Return the README and the pages of the site, by name."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


def read(path: Path) -> str:
    """Return a page with what is generated."""
    return hooks.on_page_markdown(path.read_text(encoding="utf-8"))


def blocks(path: Path, *languages: str) -> Iterator[Block]:
    """Yield a page's blocks in these languages, in order; ``""`` is none."""
    text = read(path)
    for found in FENCE.finditer(text):
        if found["language"] in languages:
            line = text.count("\n", 0, found.start("text")) + 1
            yield Block(language=found["language"], text=found["text"], line=line, reason=found["reason"])


def run_python(path: Path) -> None:
    """Run a page's Python in order, in one namespace; what cannot run here is compiled."""
    names = {"__name__": path.stem}
    for block in blocks(path, "python"):
        # Errors name the page's own line.
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
        if block.reason is None:
            exec(code, names)
