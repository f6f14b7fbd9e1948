"""Builds the wheel and the sdist, checks them, installs the wheel into a clean environment, and trains there.

python -m tests.release_check --out .cache/release [--torch 2.13.0]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "release")
    parser.add_argument("--torch", default="2.13.0")
    parser.add_argument("--no-install", action="store_true", help="Build and check the files alone.")
    options = parser.parse_args()
    dist = options.out.resolve() / "dist"
    for old in dist.glob("*"):
        old.unlink()
    call(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    check_contents(wheel, sdist)
    if not options.no_install:
        install(wheel, options.out.resolve() / "venv", options.torch)


def check_contents(wheel: Path, sdist: Path) -> None:
    """Exit unless the wheel holds every file of the package and no other, and the sdist the tests and the examples."""
    files = subprocess.run(
        ["git", "ls-files", "lightning_ckmerge"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    expected = {f for f in files if f}
    held = {n for n in zipfile.ZipFile(wheel).namelist() if not re.match(r"[^/]+\.dist-info/", n)}
    if held != expected:
        sys.exit(f"{wheel.name}: missing {sorted(expected - held)}, unexpected {sorted(held - expected)}")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = {*expected, "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"}
    if missing := needed - names:
        sys.exit(f"{sdist.name}: missing {sorted(missing)}")
    print(f"{wheel.name}: {len(held)} files; {sdist.name}: {len(names)}")


def install(wheel: Path, environment: Path, torch: str) -> None:
    """Install the wheel alone into a clean environment, and run the quickstart and both names of the command there."""
    venv.create(environment, with_pip=True, clear=True)
    python = environment / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", wheel)
    call(python, "-m", "pip", "check")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    script = environment / "quickstart.py"
    script.write_text("\n".join(blocks))
    call(python, script, cwd=environment)
    for command in ([environment / "bin" / "ckmerge"], [python, "-m", "lightning_ckmerge"]):
        call(*command, "list", environment / "merges", cwd=environment)


def call(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([str(c) for c in command], check=True, cwd=cwd)


if __name__ == "__main__":
    main()
