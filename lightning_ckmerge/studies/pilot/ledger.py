"""The evaluations of a study on disk, one JSON line each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.problem import Half
from lightning_ckmerge.studies.pilot.plan import Merge
from lightning_ckmerge.tensorfiles.durable import replace_text
from lightning_ckmerge.tensorfiles.untrusted import parse_json


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
            if isinstance(record, dict) and (score := _score(record.get("score"))) is not None:
                self._scores[f"{record.get('half')} {record.get('key')}"] = score

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
        return parse_json(line, allow_nan=True)
    except ValueError:
        return None


def _told(score: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "values": score.values_B,
        "sizes": score.sizes_B,
        "num_batches": score.num_batches,
    }


def _score(record: Any) -> Score | None:
    """Return the score; ``None`` where this is none: the merge is evaluated again."""
    if not isinstance(record, dict):
        return None
    value, values, sizes = record.get("value"), record.get("values"), record.get("sizes")
    lists = [[] if each is None else each for each in (values, sizes)]
    if not all(isinstance(each, list) and all(isinstance(v, (int, float)) for v in each) for each in lists):
        return None
    if not isinstance(value, (int, float)) or not isinstance(record.get("num_batches"), int):
        return None
    return Score(
        value=value,
        values_B=tuple(values) if values is not None else None,
        sizes_B=tuple(sizes) if sizes is not None else None,
        num_batches=record["num_batches"],
    )
