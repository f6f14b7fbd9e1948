"""Writes the example of ``reading-a-report.md`` from a run's artifacts: pages and pictures, into ``docs/report/``.

python -m docs.example_report runs/gpt/merges    (after ``make demo``; needs Chromium and Pillow)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from lightning_ckmerge import Artifact
from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.run import render_run_html

TARGET = Path(__file__).parent / "report"
WIDTH = 1000
# Top and bottom of what is cut out of the search's page, in pixels: they follow its layout.
PICTURES = {"candidates.png": (0, 818), "charts.png": (836, 2026)}


def main(dirpath: Path) -> None:
    history = read_history(dirpath)
    TARGET.mkdir(exist_ok=True)
    search = TARGET / "search.html"
    search.write_text(render_html(Artifact.open(dirpath, verify=False).manifest), encoding="utf-8")
    run = render_run_html(history.timeline, history.manifests, history.best)
    (TARGET / "run.html").write_text(run, encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        picture = Path(directory) / "page.png"
        size = f"--window-size={WIDTH},{max(bottom for _, bottom in PICTURES.values())}"
        browser = shutil.which("chromium") or "google-chrome"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={picture}"]
        subprocess.run([browser, *options, search.as_uri()], check=True, capture_output=True)
        page = Image.open(picture).convert("RGB")
        for name, (top, bottom) in PICTURES.items():
            page.crop((0, top, WIDTH, bottom)).quantize(64).save(TARGET / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
