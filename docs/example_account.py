"""Writes the pictures of ``explain.md`` from an artifact's account into ``docs/report/``.

python -m docs.example_account runs/gpt/merges/best    (after ``ckmerge explain``; needs Chromium and Pillow)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from docs.example_report import TARGET, WIDTH, photograph, rows_of_cards
from lightning_ckmerge.artifact.accounts import PAGE_NAME

# Which rows of the page each picture shows, a row being the cards that stand side by side.
PICTURES = {"account-snapshots.png": slice(0, 2), "account-landscape.png": slice(4, 5)}


def main(artifact: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        picture = photograph(artifact.resolve() / PAGE_NAME, Path(directory))
        page = Image.open(picture).convert("RGB")
    rows = rows_of_cards(page)
    for name, shown in PICTURES.items():
        (top, _), *_, (_, bottom) = [*rows[shown], rows[shown][-1]]
        margin = rows[1][0] - rows[0][1]
        page.crop((0, top - margin, WIDTH, bottom + margin)).quantize(256).save(TARGET / name, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
