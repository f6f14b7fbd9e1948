"""The documentation keeps its promises: what stands in a fence runs, and what is named exists."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import lightning_ckmerge
from docs import figures, hooks
from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.cli.main import app
from tests.support.pages import ROOT, Block, blocks, pages, read, run_python

CALLBACK = "lightning_ckmerge.CheckpointMergeCallback"
SHELL = ("", "bash", "console", "sh")
README = "README.md"
PAGES = pages()
every_page = pytest.mark.parametrize("name", PAGES)


YAML_BLOCKS = {f"{name}:{block.line}": block for name, path in PAGES.items() for block in blocks(path, "yaml")}


# tests/test_readme.py runs the README's.
@pytest.mark.parametrize("name", [n for n, path in PAGES.items() if n != README and list(blocks(path, "python"))])
@pytest.mark.filterwarnings("error:No merge at step")
def test_python_runs_and_each_run_in_it_searches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a block fails, if a search fails (which training survives), or if a schedule never searches."""
    monkeypatch.chdir(tmp_path)
    run_python(PAGES[name])
    named = {d for b in blocks(PAGES[name], "python") for d in re.findall(r'dirpath="([^"]+)"', b.text)}
    assert [d for d in sorted(named) if not read_timeline(tmp_path / d)] == []


@pytest.mark.parametrize("block", YAML_BLOCKS.values(), ids=YAML_BLOCKS)
def test_yaml_is_taken_by_lightning(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if an argument is unknown or refused. A block without a ``trainer`` holds arguments of the callback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["docs"])
    for path in (ROOT / "examples", Path(__file__).parent / "modules"):
        monkeypatch.syspath_prepend(path)
    config = yaml.safe_load(block.text)
    if "trainer" not in config:
        config = {"trainer": {"callbacks": [{"class_path": CALLBACK, "init_args": config}]}}
    cli = ParsedCLI if block.reason else LightningCLI
    parsed = run_cli(cli, config, tmp_path)
    classes = [entry.class_path for entry in parsed.config.trainer.callbacks]
    assert CALLBACK in classes


class ParsedCLI(LightningCLI):
    """Checks a config, and builds nothing that this machine may lack the devices for."""

    def instantiate_classes(self) -> None:
        pass


def run_cli(cli: type[LightningCLI], config: dict[str, Any], directory: Path) -> LightningCLI:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    model = None if "model" in config else BoringModel
    data = None if "data" in config else BoringDataModule
    return cli(model, data, args=["--config", str(path)], run=False, save_config_callback=None)


def test_the_complete_yaml_is_the_callback_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if an argument is missing in it, or stands there with another value."""
    monkeypatch.setattr(sys, "argv", ["docs"])
    (block,) = [b for b in blocks(PAGES["docs/yaml.md"], "yaml") if "on_error" in b.text]
    config = yaml.safe_load(block.text)
    cli = run_cli(LightningCLI, config, tmp_path)
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, CheckpointMergeCallback)]
    names = [a.name for a in hooks.arguments(CheckpointMergeCallback)]
    written = config["trainer"]["callbacks"][0]["init_args"]
    assert list(written) == names
    for group in ("buffer", "search", "evaluation", "artifact"):
        assert list(written[group]) == [f.name for f in fields(getattr(found.settings, group))]
    assert found.settings == CheckpointMergeCallback().settings


def test_the_tables_hold_every_argument_with_its_meaning() -> None:
    page = read(PAGES["docs/yaml.md"])
    classes = [CheckpointMergeCallback, *hooks.groups().values(), *hooks.SPACES.values()]
    for argument in (a for cls in classes for a in hooks.arguments(cls)):
        assert re.search(rf"^\| `{argument.name}` \| .+ \| .+ \| \S.+ \|$", page, flags=re.MULTILINE)
    assert "<!-- generated" not in page


def test_the_api_page_holds_every_public_name() -> None:
    page = PAGES["docs/api.md"].read_text(encoding="utf-8")
    shown = re.findall(r"^::: lightning_ckmerge\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(shown) == sorted([*lightning_ckmerge.__all__, "errors"])


def test_a_space_of_ones_own_takes_at_most_20_lines() -> None:
    code = "\n".join(b.text for b in blocks(PAGES["docs/recipes.md"], "python"))
    (space,) = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ClassDef) and ast.unparse(n.bases) == "Space"]
    assert space.end_lineno is not None
    assert space.end_lineno - space.lineno < 20


@every_page
def test_commands_exist_with_their_options(name: str) -> None:
    """Goes red if a page names a command, an option, a make target or a module that is not there."""
    for words in commands(PAGES[name]):
        check(words)


@every_page
def test_dotted_names_are_those_of_arguments(name: str) -> None:
    """Goes red if a page names `evaluation.cache_bytes`, say, which is no argument."""
    named = re.findall(r"`(buffer|search|evaluation|artifact)\.([a-z_]+)[`:]", read(PAGES[name]))
    of_objects = {("artifact", "manifest"), ("artifact", "path")}
    known = {(section, f.name) for section, cls in hooks.groups().items() for f in fields(cls)}
    assert sorted({*named} - known - of_objects) == []


@every_page
def test_pages_link_to_pages_of_the_site(name: str) -> None:
    """The README lies outside of it, and may link to anything in the repository."""
    path = PAGES[name]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", read(path))
    missing = [link for link in links if not (path.parent / link).is_file()]
    outside = [link for link in links if name != README and link.startswith("..")]
    assert (missing if name != README else [], outside) == ([], [])


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "report").glob("*.html")), ids=lambda p: p.name)
def test_links_of_the_example_lead_somewhere(page: Path) -> None:
    links = re.findall(r'href="([^"#]+)"', page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).is_file()] == []
    assert links != [] or page.name == "ensemble.html"  # which stands alone


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^  - .+: ([\w-]+\.md)$", config, flags=re.MULTILINE)) == sorted(
        path.name for name, path in PAGES.items() if name != README
    )


def test_the_figures_are_those_of_the_code() -> None:
    """Goes red if the ring or a space changes: run `python -m docs.figures`."""
    drawn = {name: (figures.FIGURES / name).read_text(encoding="utf-8") for name in figures.figures()}
    assert drawn == figures.figures()


def test_the_examples_of_the_generator_are_true() -> None:
    assert doctest.testmod(hooks).failed == 0


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the commands of a page, without prompt, environment, pipe and comment."""
    lines = [line for b in blocks(path, *SHELL) for line in b.text.splitlines()]
    lines += re.findall(r"`((?:ckmerge|make|python -m) [^`]+)`", read(path))
    for line in lines:
        line = re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", line.strip())
        if re.match(r"(ckmerge|make|python -m) ", line):
            yield list(shlex.split(line, comments=True))


def check(words: list[str]) -> None:
    end = next((i for i, word in enumerate(words) if word in ("|", "&", ";")), len(words))
    match words[:end]:
        case ["make", target, *_]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target}"
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(re.sub(r"\.\{.*", "", module)), f"no module {module}"
        case ["ckmerge", *arguments]:
            check_ckmerge(arguments)


def check_ckmerge(arguments: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    first, *rest = arguments
    command = group if first.startswith("-") else group.commands.get(first)
    assert command is not None, f"no command ckmerge {first}"
    context = command.make_context(first, [], resilient_parsing=True)
    # Raises for options that are not there; the paths of a page need not exist.
    command.make_parser(context).parse_args(rest if command is not group else arguments)
