from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lightning_ckmerge import __version__
from lightning_ckmerge.cli.main import app
from tests.support.commands import ckmerge, ckmerge_process
from tests.support.outcomes import Publish

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
# What takes seconds to import.
HEAVY = {"torch", "lightning", "pytorch_lightning", "optuna", "transformers", "scipy", "jsonargparse"}


def imported_by(*args: object) -> set[str]:
    """The heavy packages that a command imports."""
    program = f"import sys, json\nsys.argv = {['ckmerge', *map(str, args)]}\n" + (
        "from lightning_ckmerge.cli.main import app\n"
        "try:\n    app()\nfinally:\n"
        f"    print(json.dumps([n for n in {sorted(HEAVY)} if n in sys.modules]), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_json_and_a_summary(command: str) -> None:
    text = ckmerge(command, "--help").output
    assert f"  ckmerge {command} " in text
    assert "--json" in text
    assert "Example" in text
    assert f"  {command} " in ckmerge("--help").output


@pytest.mark.parametrize("args", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    assert imported_by(*args) == set()


def test_looking_at_a_run_imports_nothing_heavy(publish: Publish, tmp_path: Path) -> None:
    publish()
    merges = tmp_path / "merges"
    for args in (
        ["list", merges],
        ["show", merges],
        ["verify", merges],
        ["report", merges / "best"],
        ["report", merges],
    ):
        assert imported_by(*args) == set(), args


def test_help_comes_in_well_under_a_second() -> None:
    """The best of three: other processes may hold the cores."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert ckmerge_process("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


def test_the_version_is_the_packages() -> None:
    assert ckmerge("--version").output.strip() == __version__


def test_errors_are_one_line_on_stderr_with_exit_code_2(tmp_path: Path) -> None:
    done = ckmerge_process("show", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: an artifact must be a directory with a manifest.json, got ")
    assert len(done.stderr.splitlines()) == 1


def test_wrong_usage_has_exit_code_2() -> None:
    assert "Usage" in ckmerge("show", code=2).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete_commands(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_ckmerge.cli.main import app; app(prog_name='ckmerge')"],
        env={"_CKMERGE_COMPLETE": f"complete_{shell}", "COMP_WORDS": "ckmerge ver", "COMP_CWORD": "1"}
        | {"_TYPER_COMPLETE_ARGS": "ckmerge ver", "PATH": "/usr/bin:/bin", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert "verify" in done.stdout
    assert "merge" not in done.stdout.replace("ckmerge", "")


def test_the_console_script_is_the_app() -> None:
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "ckmerge"] or [None]
    if script is None:
        pytest.skip("the package is not installed")
    assert script.load() is app


def test_the_documentation_shows_every_command_with_output() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    # Other headings are those of a report that is shown.
    for command in COMMANDS:
        assert f"$ ckmerge {command} " in sections[command], command


def test_options_in_the_documentation_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    helps = "".join(ckmerge(command, "--help").output for command in COMMANDS) + ckmerge("--help").output
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
        assert option in helps, option


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (("list", "nowhere"), "ArtifactError"),
        (("show", "nowhere"), "ArtifactError"),
        (("verify", "nowhere"), "ArtifactError"),
        (("report", "nowhere"), "ArtifactError"),
        (("merge", "nowhere", "--schedule", "uniform", "--out", "out"), "ArtifactError"),
        (("export", "nowhere", "--out", "out"), "ArtifactError"),
        (("plan", "nowhere.yaml"), "ConfigError"),
        (("show", "nowhere", "--nope"), "NoSuchOption"),
        (("merge",), "MissingParameter"),
    ],
)
def test_errors_are_json_where_json_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert (found["ok"], found["error"]["type"]) == (False, kind)
    assert "\n" not in found["error"]["message"]
    assert result.stderr == f"error: {found['error']['message']}\n"


def test_the_package_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ckmerge", "--version"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_a_checkpoint_or_a_directory_above_runs_is_helped_on(publish: Publish, tmp_path: Path) -> None:
    published = publish()
    (tmp_path / "x.ckpt").write_bytes(b"")
    for command in ("show", "list"):
        assert "This is a checkpoint: `ckmerge merge" in ckmerge(command, tmp_path / "x.ckpt", code=2).stderr
    above = tmp_path / "lightning_logs"
    merges = above / "version_0" / "merges"
    merges.mkdir(parents=True)
    (merges / "timeline.jsonl").write_text("{}")
    for command in ("show", "list"):
        assert f"It contains the run {merges}: pass that." in ckmerge(command, above, code=2).stderr
    assert ckmerge("show", published.path).exit_code == 0
