"""Writes the example of ``reading-a-report.md`` from a run's artifacts: pages and pictures, into ``docs/report/``.

python -m docs.example_report runs/gpt/merges    (after ``make demo``; needs Chromium and Pillow)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.run import render_run_html
from lightning_ckmerge.report.text import ReportPlace

TARGET = Path(__file__).parent / "report"
# As it is on the machine of whoever runs the demo.
SHOWN = Path("runs/gpt/merges")
WIDTH = 1000
# Beyond the end of the search's page, in pixels.
HEIGHT = 4000
# Which rows of the search's page each picture shows, a row being the cards that stand side by side.
PICTURES = {"candidates.png": slice(0, 3), "charts.png": slice(3, 6)}


def main(dirpath: Path) -> None:
    history = read_history(dirpath)
    TARGET.mkdir(exist_ok=True)
    search = TARGET / "search.html"
    assert history.best is not None, "no merge was accepted: there is nothing to show"
    manifest = history.manifests[history.best]
    lies = ReportPlace(path=SHOWN / history.best, up="run.html")
    search.write_text(render_html(manifest, lies), encoding="utf-8")
    # The other searches' pages are not part of the example.
    shown = replace(history, dirpath=SHOWN, manifests={history.best: manifest}, standing=None, explained=frozenset())
    run = render_run_html(shown).replace(f"{history.best}/report.html", search.name)
    (TARGET / "run.html").write_text(run, encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        page = Image.open(photograph(search, Path(directory))).convert("RGB")
    rows = rows_of_cards(page)
    for name, shown in PICTURES.items():
        (top, _), *_, (_, bottom) = rows[shown]
        margin = rows[1][0] - rows[0][1]
        whole = page.crop((0, top - margin, WIDTH, bottom + margin))
        whole.quantize(64).save(TARGET / name, optimize=True)


def photograph(page: Path, directory: Path) -> Path:
    """Return the path of a picture of a page, made in ``directory``."""
    picture = directory / "page.png"
    browser = shutil.which("chromium") or "google-chrome"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
    subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True)
    return picture


def rows_of_cards(page: Image.Image) -> list[tuple[int, int]]:
    """Return top and bottom of each row of cards, which bare background parts from the next."""
    background = page.getpixel((0, 0))
    bare = [page.crop((0, y, page.width, y + 1)).getcolors() == [(page.width, background)] for y in range(page.height)]
    tops = [y for y in range(1, page.height) if bare[y - 1] and not bare[y]]
    return [(top, bare.index(True, top)) for top in tops]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
