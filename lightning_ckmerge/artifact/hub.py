"""Directories that Hugging Face's ``from_pretrained`` opens, written without its libraries."""

from __future__ import annotations

from pathlib import Path

CONFIG_NAME = "config.json"
# Small files that belong to a model and hold no weights: config, tokenizer, processor, chat template, remote code.
SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
NOT_COPIED = {"recipe.json", "manifest.json"}


def side_files(directory: Path) -> list[Path]:
    """Return the files beside a model's weights that ``from_pretrained`` reads: its config, tokenizer and code."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in SIDE_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in NOT_COPIED
    ]
