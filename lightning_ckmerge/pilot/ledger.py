"""The evaluations of a study on disk, one JSON line each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.pilot.plan import Merge
from lightning_ckmerge.search.problem import Half
from lightning_ckmerge.tensorfiles.durable import replace_text


class Ledger:
    """Scores by merge and half, of one study.

    Args:
        path: The file. One of another study, or none of ours, is begun anew.
        identity: Stands for checkpoints, metric and data.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        self._scores: dict[str, Score] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        records = [_parsed(line) for line in lines]
        if not records or records[0] != {"study": identity}:
            self.clear()
            return
        for record in records[1:]:
            if isinstance(record, dict) and {"key", "half", "score"} <= record.keys():
                self._scores[f"{record['half']} {record['key']}"] = _score(record["score"])

    def __len__(self) -> int:
        return len(self._scores)

    def clear(self) -> None:
        """Forget all scores."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, json.dumps({"study": self._identity}) + "\n")
        self._scores = {}

    def get(self, merge: Merge, half: Half) -> Score | None:
        """Return a merge's score; ``None`` if there is none yet."""
        return self._scores.get(f"{half} {merge.key()}")

    def add(self, merge: Merge, half: Half, score: Score) -> None:
        """Keep a score, on the disk too. What a crash left of an unfinished last line is cut off first."""
        record = {"key": merge.key(), "half": half, "score": _told(score)}
        # NaN and infinity may be values: Python's JSON holds them.
        line = (json.dumps(record) + "\n").encode()
        with self._path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._scores[f"{half} {merge.key()}"] = score


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _told(score: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "values": score.values_B,
        "sizes": score.sizes_B,
        "num_batches": score.num_batches,
    }


def _score(record: dict[str, Any]) -> Score:
    values, sizes = record["values"], record["sizes"]
    return Score(
        value=record["value"],
        values_B=tuple(values) if values is not None else None,
        sizes_B=tuple(sizes) if sizes is not None else None,
        num_batches=record["num_batches"],
    )
