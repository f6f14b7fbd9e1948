"""``make clients``: checks each client in a virtual environment of its own, and writes the figures to a file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLIENTS = sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))


def main() -> int:
    """Return 0 if all clients pass."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", default=CLIENTS, help="clients, by their scripts; all, if none is named")
    parser.add_argument("--venvs", type=Path, required=True, help="a directory for the environments; they are kept")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; clients that are not named stay in it")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.names:
        results[name] = run(name, environment(name, arguments.venvs))
        print(name, results[name].get("fault", "passed"), flush=True)
        ordered = {n: results[n] for n in sorted(results)}
        arguments.out.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return any("fault" in results[name] for name in arguments.names)


def environment(name: str, venvs: Path) -> Path:
    """Return the Python of a client's environment, made if it is not there yet."""
    python = venvs / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venvs / name], check=True)
        wanted = ["--requirement", HERE / "requirements" / f"{name}.txt", "--editable", ROOT]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def run(name: str, python: Path) -> dict[str, Any]:
    """Return what was measured, or the fault."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "figures.json"
        command = [python, "-m", "tests.clients.check", name, "--out", out]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return dict(json.loads(out.read_text(encoding="utf-8")))
    sys.stderr.write(done.stderr)
    return {"fault": done.stderr.strip().splitlines()[-1][:500]}


if __name__ == "__main__":
    sys.exit(main())
