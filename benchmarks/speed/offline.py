"""``ckmerge merge`` against mergekit on the same files; the rows say so where it is not installed.

mergekit wants other versions than ours: install it elsewhere, and name its command in ``MERGEKIT``.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.speed.merging import gpt2
from benchmarks.speed.rounds import NUM_ROUNDS, Row, at_most

COMMAND = os.environ.get("MERGEKIT", "mergekit-pytorch")


def measure() -> Iterator[Row]:
    """Yield the rows of ``offline``."""
    if shutil.which(COMMAND) is None:
        yield Row(what="offline merge, of mergekit", target="", measured="not measured: no mergekit", met=None)
        return
    for num in (2, 4):
        with tempfile.TemporaryDirectory() as root:
            yield from _compare(Path(root), num)


def _compare(root: Path, num: int) -> Iterator[Row]:
    paths = [root / f"{k}" / "model.safetensors" for k in range(num)]
    for path in paths:
        path.parent.mkdir()
        save_file({f"{n:03}": torch.randn(shape) for n, shape in enumerate(gpt2())}, path)
    gc.collect()
    models = "".join(f"  - model: {path}\n    parameters: {{weight: {k + 1}}}\n" for k, path in enumerate(paths))
    config = root / "merge.yaml"
    config.write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    weights = ",".join(str(k + 1) for k in range(num))
    ours, theirs = root / "ours", root / "theirs"
    commands: dict[str, list[str]] = {
        "ours": [sys.executable, "-c", "from lightning_ckmerge.cli.main import app; app()", "merge", *map(str, paths)],
        "mergekit": [COMMAND, str(config), str(theirs)],
    }
    commands["ours"] += ["--weights", weights, "--out", str(ours)]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(NUM_ROUNDS):
        for name, command in commands.items():
            shutil.rmtree(ours if name == "ours" else theirs, ignore_errors=True)
            taken, peak = _run(command)
            seconds[name].append(taken)
            peaks[name].append(peak)
    if not _equal(ours, theirs):
        raise AssertionError("the two merges differ")
    s = {name: statistics.median(values) for name, values in seconds.items()}
    p = {name: statistics.median(values) for name, values in peaks.items()}
    title = f"offline merge of {num} x 124 M, same output"
    yield at_most(f"{title}: time, of mergekit's", s["ours"] / s["mergekit"], 0.33, f" ({s['ours']:.1f} s)")
    yield at_most(f"{title}: peak memory, of mergekit's", p["ours"] / p["mergekit"], 0.15, f" ({p['ours']:.0f} MiB)")


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Return seconds and the peak of resident memory that is not the page cache's, in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_kib(process.pid))
        time.sleep(0.02)
    if process.returncode:
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read()[-2000:])
    return time.perf_counter() - start, peak / 1024


def _anonymous_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _equal(ours: Path, theirs: Path) -> bool:
    tensors = [{k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()} for path in (ours, theirs)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
