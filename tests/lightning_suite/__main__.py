"""``make lightning-suite``: Lightning's own tests without us, with a callback that does nothing, and with ours."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.lightning_suite import everywhere, outcomes

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
KINDS = ("plain", "bystander", "merging")
PARTS = ("loops", "callbacks", "checkpointing", "trainer/logging_", "trainer/optimization")
Outcomes = dict[str, tuple[str, str]]
GROUP = "lightning.pytorch.callbacks_factory"


def main() -> int:
    """Return 0 if each test that fails with us alone stands in ``expected.json``, with its reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.lightning_suite", description=__doc__)
    parser.add_argument(
        "checkout", type=Path, help="Lightning's repository, at the tag of the release that is installed"
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="below `tests/tests_pytorch`")
    parser.add_argument("--tag", required=True, help="of the checkout, for the record")
    parser.add_argument("--work", type=Path, help="keeps outcomes here, and does not repeat what is in it")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one test")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_intermixed_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Outcomes] = {kind: {} for kind in KINDS}
    for part in arguments.parts:
        place = work.resolve() / part.replace("/", "-")
        for kind in KINDS:
            found[kind] |= run(kind, arguments.checkout, part, place, arguments.timeout)
    figures = {
        "tag": arguments.tag,
        "lightning": metadata.version("lightning"),
        "torch": metadata.version("torch"),
        "parts": arguments.parts,
        **compare(found, json.loads(EXPECTED.read_text(encoding="utf-8"))),
        "searches": count_searches(work),
    }
    text = json.dumps(figures, indent=1) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    return bool(figures["unexpected"])


def run(kind: str, checkout: Path, part: str, work: Path, timeout_s: int) -> Outcomes:
    """Run the tests of one part in a process of their own, and return their outcomes."""
    path, done = work / f"{kind}.jsonl", work / f"{kind}.done"
    if not done.exists():
        root = work / kind
        root.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        env = {
            **os.environ,
            everywhere.KIND: kind,
            everywhere.ROOT: str(root),
            outcomes.FILE: str(path),
            "PYTHONPATH": os.pathsep.join(
                [str(HERE.parents[1]), str(announced(work)), os.environ.get("PYTHONPATH", "")]
            ),
        }
        options = ["-q", "-p", outcomes.__name__, "-p", "no:cacheprovider", f"--timeout={timeout_s}", "--tb=short"]
        test = f"tests_pytorch/{part}"
        command = [sys.executable, "-m", "pytest", *options, f"--basetemp={work / 'temporary'}", test]
        with (work / f"{kind}.log").open("w") as log:
            subprocess.run(command, cwd=checkout / "tests", env=env, stdout=log, stderr=log, check=False)
        done.touch()
    return outcomes.read_outcomes(path)


def announced(work: Path) -> Path:
    """Return a directory whose distribution announces the callbacks, as an installed package would."""
    directory = work / "entry_points"
    info = directory / "ckmerge_everywhere-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ckmerge-everywhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\neverywhere = {everywhere.__name__}:make\n")
    return directory


def compare(found: dict[str, Outcomes], expected: dict[str, str]) -> dict[str, Any]:
    """Return counts, the tests that fail with us alone, and those of them that nobody expects."""
    plain, bystander, merging = (found[kind] for kind in KINDS)

    def failed(outcome: Outcomes) -> set[str]:
        return {test for test, (how, _) in outcome.items() if how == "failed"}

    ours = sorted(failed(merging) - failed(plain) - failed(bystander))
    return {
        "outcomes": {kind: dict(sorted(Counter(how for how, _ in found[kind].values()).items())) for kind in KINDS},
        "fail with any callback": sorted(failed(bystander) - failed(plain)),
        "fail with ours alone": {test: expected.get(test, "") for test in ours},
        "not run with ours": sorted(plain.keys() - merging.keys()),
        "unexpected": {test: merging[test][1] for test in ours if test not in expected},
    }


def count_searches(work: Path) -> dict[str, int]:
    """Return how often a search ended in which way."""
    ends: Counter[str] = Counter()
    for directory in work.glob("*/merging/*"):
        try:
            ends.update(record["status"] for record in read_timeline(directory))
        except (OSError, ValueError, KeyError):
            ends["unreadable"] += 1
    return dict(sorted(ends.items()))


if __name__ == "__main__":
    sys.exit(main())
