"""Writes the example of ``ensembles.md`` from an ensemble's directory: its page and a picture, into ``docs/report/``.

python -m benchmarks.ensembles digits --seeds 1 --out ensembles
python -m docs.example_ensemble ensembles/seed=1    (needs Chromium and Pillow)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from docs.example_report import TARGET, WIDTH, photograph, rows_of_cards
from lightning_ckmerge.artifact.ensembles import EnsembleArtifact
from lightning_ckmerge.report.ensemble import render_ensemble_html

# Which rows of the page the picture shows, a row being the cards that stand side by side.
SHOWN = slice(0, 3)


def main(ensemble: Path) -> None:
    page = TARGET / "ensemble.html"
    page.write_text(render_ensemble_html(EnsembleArtifact.open(ensemble).manifest, "ensemble"), encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        picture = Image.open(photograph(page, Path(directory))).convert("RGB")
    rows = rows_of_cards(picture)
    (top, _), *_, (_, bottom) = rows[SHOWN]
    margin = rows[1][0] - rows[0][1]
    whole = picture.crop((0, top - margin, WIDTH, bottom + margin))
    whole.quantize(64).save(TARGET / "ensemble.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
