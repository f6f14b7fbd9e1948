"""Fills the pages' ``<!-- generated: ... -->`` lines in while MkDocs builds them, from the code that they describe."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docstring_parser.common import Docstring
from docstring_parser.google import DEFAULT_SECTIONS, GoogleParser, Section, SectionType

from docs import client_results, example_results
from lightning_ckmerge import CheckpointMergeCallback, config
from lightning_ckmerge.core.spaces import SPACES
from lightning_ckmerge.search.hedge import GPHedgeSampler

DOCS = Path(__file__).parent
MARKER = re.compile(r"<!-- generated: ([\w -]+) -->")
LINE_LENGTH = 100


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with what is generated in the place of its markers; MkDocs calls this.

    Raises:
        KeyError: A marker asks for what nobody generates.
    """
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), markdown)


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a class: its annotation as it stands in the source, and its ``Args`` entry in Markdown."""

    name: str
    annotation: str
    default: Any
    meaning: str


def arguments(cls: type) -> Iterator[Argument]:
    """Yield a class's arguments, in order."""
    meanings = {p.arg_name: p.description or "" for p in parse(cls).params}
    made = (
        {f.name: f.default_factory for f in fields(cls) if f.default_factory is not MISSING}
        if is_dataclass(cls)
        else {}
    )
    for name, parameter in inspect.signature(cls).parameters.items():
        yield Argument(
            name=name,
            annotation=str(parameter.annotation),
            default=made[name]() if name in made else parameter.default,
            meaning=" ".join(in_markdown(meanings[name].replace("``None``", "``null``")).split()),
        )


def callback_table() -> str:
    """Return the callback's arguments; groups are named by their classes."""
    return table(CheckpointMergeCallback)


def group_tables() -> str:
    """Return the arguments of each group, under headings."""
    return "\n\n".join(section(cls, f"`{prefix}`") for prefix, cls in groups().items())


def space_tables() -> str:
    """Return each space that has a name, what it is, and its arguments."""
    return "\n\n".join(section(cls, f"`{name}`") for name, cls in SPACES.items())


def sampler_tables() -> str:
    """Return the package's own sampler and its arguments."""
    return section(GPHedgeSampler, f"`{GPHedgeSampler.__name__}`")


def complete_yaml() -> str:
    """Return a LightningCLI file that sets each argument to its default, with its meaning beside it."""
    lines = [
        "```yaml",
        "trainer:",
        "  callbacks:",
        f"    - class_path: lightning_ckmerge.{CheckpointMergeCallback.__name__}",
    ]
    return "\n".join([*lines, "      init_args:", *_yaml_lines(CheckpointMergeCallback, " " * 8), "```"])


def quality_headline() -> str:
    """Return the first paragraph of the page that the quality benchmark wrote."""
    return (DOCS / "quality.md").read_text(encoding="utf-8").split("\n\n")[1]


GENERATED: dict[str, Callable[[], str]] = {
    "callback table": callback_table,
    "group tables": group_tables,
    "space tables": space_tables,
    "sampler tables": sampler_tables,
    "complete yaml": complete_yaml,
    "quality headline": quality_headline,
    "clients": client_results.clients,
    "lightning suite": client_results.lightning_suite,
    "examples overview": example_results.overview,
    **{f"example {task}": partial(example_results.comparison, task) for task in example_results.TASKS},
    **{f"generalisation {case}": partial(example_results.generalisation, case) for case in ("text", "digits")},
}


def groups() -> dict[str, type]:
    """Return the grouped arguments' classes by their places in a YAML, and those of which lists hold several."""
    found = {a.name: type(a.default) for a in arguments(CheckpointMergeCallback) if is_dataclass(a.default)}
    listed = {
        f"{group}.{a.name}": member
        for group, cls in found.items()
        for a in arguments(cls)
        if is_dataclass(member := getattr(config, a.annotation.removeprefix("list[").removesuffix("]"), None))
    }
    return {**found, **listed}


def section(cls: type, title: str) -> str:
    """Return a heading, the docstring's text, and the arguments, if there are any."""
    parsed = parse(cls)
    sources = [f"Source: {m.description}" for m in parsed.meta if m.args == ["source"]]
    text = [parsed.short_description, parsed.long_description]
    arguments_table = table(cls) if inspect.signature(cls).parameters else None
    parts = [in_markdown(p) for p in [*text, *sources] if p]
    if cls.__module__ != config.__name__:
        parts.append(f"Class path: `{path(cls)}`")
    return "\n\n".join([f"### {title}", *parts, *([arguments_table] if arguments_table else [])])


def parse(cls: type) -> Docstring:
    """Return a class's docstring in parts, the house's ``Source`` section among them."""
    sections = [*DEFAULT_SECTIONS, Section("Source", "source", SectionType.SINGULAR)]
    return GoogleParser(sections).parse(inspect.getdoc(cls) or "")


def in_markdown(text: str) -> str:
    """Return a docstring's text with its code and its papers marked as Markdown does."""
    text = text.replace("``", "`")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def table(cls: type) -> str:
    """Return a class's arguments as a Markdown table."""
    rows = [("argument", "type", "default", "meaning"), ("---",) * 4]
    names = vars(sys.modules[cls.__module__])
    rows += [(f"`{a.name}`", in_words(a.annotation, names), default_in_words(a), a.meaning) for a in arguments(cls)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def in_words(annotation: str, names: Mapping[str, Any]) -> str:
    """Return a type as a reader of a YAML sees it; ``names`` are those of the module where it stands.

    >>> in_words("int | None", {}), in_words("tuple[Layout, ...]", vars(config)), in_words("str | list[str]", {})
    ('`int` or `null`', 'list of `geometric` or `uniform`', '`str`, or list of `str`')
    """
    *others, last = annotation.split(" | ")
    if listed := re.fullmatch(r"(?:list|tuple)\[(\w+)(?:, \.\.\.)?\]", last):
        one = [in_words(" | ".join(others), names)] if others else []
        return ", or ".join([*one, f"list of {in_words(listed[1], names)}"])
    words: list[str] = []
    for part in annotation.split(" | "):
        alias = names.get(part)
        words += get_args(alias) if get_origin(alias) is Literal else ["null" if part == "None" else part]
    quoted = [f"`{word}`" for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)


def default_in_words(argument: Argument) -> str:
    """Return a default as it stands in a YAML; a group's are in its own table."""
    if argument.default is inspect.Parameter.empty:
        return "required"
    if is_dataclass(argument.default):
        return "as below"
    return f"`{as_yaml(argument.default)}`"


def as_yaml(value: Any) -> str:
    """Return a plain value as YAML on one line.

    >>> as_yaml(None), as_yaml("val_loss"), as_yaml(("safetensors",)), as_yaml(True)
    ('null', 'val_loss', '[safetensors]', 'true')
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def path(cls: type) -> str:
    """Return the shortest path under which a YAML names a class."""
    *rooms, _ = cls.__module__.split(".")
    homes = [".".join(rooms[: i + 1]) for i in range(len(rooms))]
    home = next((h for h in homes if getattr(importlib.import_module(h), cls.__name__, None) is cls), cls.__module__)
    return f"{home}.{cls.__name__}"


def _yaml_lines(cls: type, indent: str) -> Iterator[str]:
    for a in arguments(cls):
        comment = textwrap.wrap(a.meaning.replace("`", ""), LINE_LENGTH - len(indent) - 2)
        yield from (f"{indent}# {line}" for line in comment)
        if is_dataclass(a.default):
            yield f"{indent}{a.name}:"
            yield from _yaml_lines(type(a.default), f"{indent}  ")
        else:
            yield f"{indent}{a.name}: {as_yaml(a.default)}"
