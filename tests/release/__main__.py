"""``make release-check``: build the distributions, and use the wheel as a user would, in an environment of its own."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_ckmerge"
# Beside the package itself, the metadata.
METADATA = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


def main() -> int:
    """Return 0 if everything holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="a directory for the distributions and the environment"
    )
    parser.add_argument("--venv", type=Path, help="an environment to install into; a new one, if none is named")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    shutil.rmtree(work / "dist", ignore_errors=True)
    call("-m", "build", "--outdir", work / "dist", ROOT)
    (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
    call("-m", "twine", "check", "--strict", wheel, sdist)
    check_wheel(wheel)
    check_sdist(sdist)
    venv = arguments.venv or work / "venv"
    if not (venv / "bin" / "python").exists():
        call("-m", "venv", venv)
    python = venv / "bin" / "python"
    call("-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel, python=python)
    call("-m", "pip", "install", "--quiet", wheel, python=python)
    call("-m", "pip", "check", python=python)
    # Not from the source tree, whose package would be imported instead.
    call(Path(__file__).with_name("short_demo.py"), python=python, cwd=work)
    shown = [
        subprocess.run([*command, "--version"], cwd=work, check=True, capture_output=True, text=True).stdout
        for command in ([python, "-m", "lightning_ckmerge"], [venv / "bin" / "ckmerge"])
    ]
    assert shown[0] == shown[1], f"`python -m lightning_ckmerge` and `ckmerge` differ: {shown}"
    print(f"ready: {wheel.name} ({wheel.stat().st_size} bytes), {sdist.name} ({sdist.stat().st_size} bytes)")
    return 0


def call(*arguments: Any, python: Path | str = sys.executable, cwd: Path | None = None) -> None:
    print("$", *arguments, flush=True)
    subprocess.run([python, *arguments], cwd=cwd, check=True)


def check_wheel(wheel: Path) -> None:
    """The wheel holds each file of the package, its metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    info = next(name for name in found if name.endswith("/METADATA")).rpartition("/")[0]
    expected = package_files() | {f"{info}/{name}" for name in METADATA}
    assert found == expected, f"missing: {sorted(expected - found)}; not expected: {sorted(found - expected)}"


def check_sdist(sdist: Path) -> None:
    """The source distribution holds the package, and the page that its metadata shows."""
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    expected = package_files() | {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
    assert expected <= found, f"missing: {sorted(expected - found)}"


def package_files() -> set[str]:
    """Return the package's files by their places in a distribution."""
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT).as_posix() for p in files}


if __name__ == "__main__":
    sys.exit(main())
