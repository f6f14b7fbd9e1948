"""Writes the example of ``study.md`` from a study's directory: the page and pictures of it, into ``docs/study/``.

python -m docs.example_study study    (needs Chromium and Pillow)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from docs.example_report import rows_of_cards
from lightning_ckmerge.report.study import render_study_html

TARGET = Path(__file__).parent / "study"
WIDTH = 1000
# Beyond the end of the page, in pixels.
HEIGHT = 4400
# Which rows of the page each picture shows, a row being the cards that stand side by side.
PICTURES = {"which.png": slice(4, 6), "how-many.png": slice(7, 8), "how.png": slice(9, 10)}


def main(directory: Path) -> None:
    TARGET.mkdir(exist_ok=True)
    page = TARGET / "study.html"
    study = json.loads((directory / "study.json").read_text(encoding="utf-8"))
    page.write_text(render_study_html(study), encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        shot = Path(temporary) / "page.png"
        browser = shutil.which("chromium") or "google-chrome"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB")
    rows = rows_of_cards(picture)
    for name, shown in PICTURES.items():
        (top, _), *_ = rows[shown]
        *_, (_, bottom) = rows[shown]
        picture.crop((0, top - 8, WIDTH, bottom + 8)).quantize(64).save(TARGET / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
