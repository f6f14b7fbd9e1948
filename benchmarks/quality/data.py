"""Two corpora that every machine with PyTorch has, split by file, and windows of them.

Letters: N windows, T bytes in a window.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from pretraining import Windows, read_stdlib
from torch import Tensor

Corpus = Literal["python", "cpp"]
CORPORA: tuple[Corpus, ...] = ("python", "cpp")
CONTEXT = 128
BATCH_SIZE = 16
# The validation windows are split in two: every second batch is kept from the search.
NUM_EVAL_BATCHES = {"val": 64, "test": 32, "other": 16}
# Generated headers repeat themselves thousands of times.
HEADER_FOLDERS = ("torch/csrc", "c10", "ATen/native", "ATen/core", "ATen/cpu")


def read_corpus(corpus: Corpus) -> dict[str, bytes]:
    """Return Python's standard library, or PyTorch's C++ headers, as ``train``, ``val`` and ``test``."""
    return read_stdlib() if corpus == "python" else read_headers()


def read_headers() -> dict[str, bytes]:
    """Return PyTorch's hand-written C++ headers as ``train``, ``val`` and ``test``, split by file name."""
    root = Path(torch.__file__).parent / "include"
    texts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    for path in sorted(path for folder in HEADER_FOLDERS for path in (root / folder).rglob("*.h")):
        bucket = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[0] % 10
        texts["val" if bucket == 0 else "test" if bucket == 1 else "train"].append(path.read_bytes())
    return {split: b"".join(parts) for split, parts in texts.items()}


def eval_batches(corpus: Corpus) -> dict[str, list[Tensor]]:
    """Return the batches ``(N, T + 1)`` of the two halves, ``search`` and ``confirm``, of ``test`` and ``other``."""
    own, other = read_corpus(corpus), read_corpus("cpp" if corpus == "python" else "python")
    val = _batches(own["val"], NUM_EVAL_BATCHES["val"])
    return {
        "search": val[0::2],
        "confirm": val[1::2],
        "test": _batches(own["test"], NUM_EVAL_BATCHES["test"]),
        "other": _batches(other["test"], NUM_EVAL_BATCHES["other"]),
    }


def train_batches(corpus: Corpus, num_batches: int) -> list[Tensor]:
    """Return batches ``(N, T + 1)`` of the files that the run trained on."""
    return _batches(read_corpus(corpus)["train"], num_batches)


def _batches(text: bytes, num_batches: int) -> list[Tensor]:
    windows = Windows(text, CONTEXT, num_batches * BATCH_SIZE)
    return list(torch.stack([windows[i] for i in range(len(windows))]).long().split(BATCH_SIZE))
