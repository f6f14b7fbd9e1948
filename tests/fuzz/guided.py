"""Coverage-guided fuzzing of the two readers that meet a stranger's bytes first; `make fuzz`.

python -m tests.fuzz.guided --out tests/fuzz/results.json    both readers, 10 million inputs and 200,000
python -m tests.fuzz.guided --target header --runs 100000    one of them, in this process

It needs atheris, which has releases for CPython 3.11 to 3.13 on Linux. Anything but the value or the error that a
reader promises ends the run, and is counted as a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = {"header": 10_000_000, "manifest": 200_000}
INSTRUMENTED = ["lightning_ckmerge.tensorfiles.untrusted", "lightning_ckmerge.tensorfiles.reader"]
MAX_LENGTH = {"header": 256, "manifest": 8192}
HEADERS = [
    b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"__metadata__":{"format":"pt","a":"w"},"w":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}',
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[1,1],"data_offsets":[0,1]}}',
]
WORDS = [
    *('"__metadata__"', '"dtype"', '"shape"', '"data_offsets"', '"F32"', "[", "]", "{", "}", ":", ",", "[[[[[[[["),
    *("null", "true", "1e999", "NaN", "-1", "99999999999999999999", "\\\\ud800", "\\\\u0000", '{"a":1,"a":2}'),
]


def read_as_header() -> Callable[[bytes], None]:
    """Return the target: a header, or ``ValueError``."""
    from lightning_ckmerge.tensorfiles.reader import parse_header

    def target(data: bytes) -> None:
        try:
            metadata, entries = parse_header(data)
        except ValueError:
            return
        # What follows in the reader: a place in the file for each tensor.
        assert all(isinstance(text, str) for text in metadata.values())
        assert all(entry["data_offsets"][0] >= 0 for entry in entries.values())

    return target


def read_as_manifest() -> Callable[[bytes], None]:
    """Return the target: a manifest, or ``ArtifactError``."""
    from lightning_ckmerge.artifact.load import describe
    from lightning_ckmerge.artifact.manifest import MANIFEST_NAME, check_manifest, coefficients_of
    from lightning_ckmerge.errors import ArtifactError
    from lightning_ckmerge.tensorfiles.untrusted import inside, parse_json

    def target(data: bytes) -> None:
        try:
            manifest = parse_json(data)
            check_manifest(manifest, MANIFEST_NAME)
        except (ArtifactError, ValueError):
            return
        describe(Path("artifact"), manifest)
        coefficients_of(manifest)("w")
        for name in manifest["files"]:
            with contextlib.suppress(ArtifactError):
                inside(Path("/nowhere"), name)

    return target


def run_here(name: str, runs: int, corpus: Path, words: Path) -> None:
    """Fuzz in this process until ``runs`` inputs were tried; it does not return."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = {"header": read_as_header, "manifest": read_as_manifest}[name]()
    atheris.Setup(
        [
            *(sys.argv[0], str(corpus), f"-runs={runs}", f"-max_len={MAX_LENGTH[name]}", f"-dict={words}"),
            *(
                "-print_final_stats=1",
                "-verbosity=1",
                "-rss_limit_mb=4096",
                "-timeout=60",
                f"-artifact_prefix={corpus}/",
            ),
        ],
        target,
    )
    atheris.Fuzz()


def run_target(name: str, runs: int) -> dict[str, Any]:
    """Fuzz in a process of its own, and return the count of executions, seconds and crashes."""
    with tempfile.TemporaryDirectory() as root:
        corpus, words = Path(root, "corpus"), Path(root, "words")
        corpus.mkdir()
        for i, seed in enumerate(HEADERS if name == "header" else [manifest_seed()]):
            (corpus / f"seed-{i}").write_bytes(seed)
        quoted = [word.replace('"', '\\"') for word in WORDS]
        words.write_text("".join(f'"{word}"\n' for word in quoted), encoding="ascii")
        command = [sys.executable, "-m", "tests.fuzz.guided", "--target", name, "--runs", str(runs)]
        started_s = time.perf_counter()
        done = subprocess.run(
            [*command, "--corpus", str(corpus), "--words", str(words)], capture_output=True, text=True, errors="replace"
        )
        seconds = time.perf_counter() - started_s
        crashes = sorted(p.name for p in corpus.iterdir() if p.name.startswith(("crash-", "timeout-", "oom-")))
    executed = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    found = {"executions": int(executed[-1]) if executed else 0, "seconds": round(seconds), "crashes": len(crashes)}
    if crashes or done.returncode or not executed:
        print(done.stderr[-4000:], file=sys.stderr)
        found["exit_code"] = done.returncode
    return found


def manifest_seed() -> bytes:
    """Return a sound manifest of every section."""
    return (Path(__file__).parent / "manifest-seed.json").read_bytes()


def main() -> None:
    """Fuzz both readers, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--words", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.corpus is not None:
        run_here(options.target, options.runs, options.corpus, options.words)
        return
    names = [options.target] if options.target else list(TARGETS)
    found: dict[str, Any] = {"python": platform.python_version(), "machine": "two shared x86 cores, one of them used"}
    for name in names:
        found[name] = run_target(name, options.runs or TARGETS[name])
        print(json.dumps(found), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(found[name]["crashes"] or "exit_code" in found[name] for name in names):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
