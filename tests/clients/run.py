"""Runs clients, each in an environment of its own, and writes docs/clients.json and the table of docs/clients.md.

python -m tests.clients.run --environments .cache/clients [--torch 2.13.0] [forecasting ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "clients.json", ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- table: written by make clients -->", "<!-- end of the table -->"
# Script: the requirements of its environment.
CLIENTS = {
    "transformers_peft": ["transformers==5.23.0", "peft==0.21.2"],
    "forecasting": ["pytorch-forecasting==1.8.0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", help=f"Of {', '.join(CLIENTS)}; all by default.")
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache" / "clients")
    parser.add_argument("--torch", default="2.13.0", help="The version of torch in every environment.")
    options = parser.parse_args()
    names = options.clients or [*CLIENTS]
    if unknown := set(names) - CLIENTS.keys():
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for name in names:
        try:
            results[name] = run(name, options.environments / name, options.torch)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: {error}")
            results.pop(name, None)
        write(results)
    if failed:
        sys.exit("\n".join(failed))


def run(name: str, environment: Path, torch: str) -> dict[str, Any]:
    """Return the result of one client, whose environment is made where it is missing."""
    python = environment.resolve() / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}", *CLIENTS[name], "--editable", str(ROOT)], check=True)
    output = environment.resolve() / "result.json"
    output.unlink(missing_ok=True)
    command = [str(python), "-m", f"tests.clients.{name}", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def write(results: dict[str, Any]) -> None:
    """Write the results, and the table of the page that shows them."""
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}")


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| client | versions | steps, losses bit-equal | searches | reported | by the client |",
        "|---|---|---|---|---|---|",
    ]
    for _, r in sorted(results.items()):
        versions = ", ".join(f"{n} {v}" for n, v in r["versions"].items())
        searches = ", ".join(f"{r['searches'].count(s)} {s}" for s in dict.fromkeys(r["searches"]))
        numbers = f"{r['monitor']} {r['reported']:.6f} | {r['own']:.6f}"
        lines.append(f"| {r['client']} | {versions}, Python {r['python']} | {r['steps']} | {searches} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
