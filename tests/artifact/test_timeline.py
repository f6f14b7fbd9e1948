from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.timeline import append_timeline, read_timeline, timeline_record
from lightning_ckmerge.errors import ArtifactError
from tests.support.outcomes import make_outcome


def test_a_record_tells_the_search_in_a_line() -> None:
    record = timeline_record(build_manifest(make_outcome(value=2.0)), "step=000001000", [(500, 2.4), (1000, 2.1)])
    assert record.pop("cost")["num_batches"] == 93
    assert record == {
        "run_id": None,
        "step": 1000,
        "monitor": "val_loss",
        "mode": "min",
        "status": "accepted",
        "gain": 0.05,
        "interval": [0.041, 0.059],
        "equivalent_steps": 310,
        "winner": "trial-6",
        "best_anchor": "uniform-4",
        "values": {"latest": 2.05, "uniform-4": 2.012, "trial-6": 2.0},
        "artifact": "step=000001000",
        "validation": [[500, 2.4], [1000, 2.1]],
    }


def test_records_come_back_in_order(tmp_path: Path) -> None:
    records = [timeline_record(build_manifest(make_outcome(step=step)), "ä\n") for step in range(3)]
    assert read_timeline(tmp_path) == []
    for record in records:
        append_timeline(tmp_path, record)
    assert read_timeline(tmp_path) == records


@pytest.mark.parametrize("num_bytes", [1, 9, 30])
def test_a_line_torn_by_a_crash_is_passed_over_and_then_cut_off(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "timeline.jsonl"
    for step in range(2):
        append_timeline(tmp_path, {"step": step, "status": "accepted"})
    path.write_bytes(path.read_bytes()[:-num_bytes])
    assert [r["step"] for r in read_timeline(tmp_path)] == [0]
    append_timeline(tmp_path, {"step": 2, "status": "accepted"})
    assert [r["step"] for r in read_timeline(tmp_path)] == [0, 2]
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("line", ["{", "[]", "{}", "\x80"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "timeline.jsonl").write_bytes(b'{"status": "accepted"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ArtifactError, match="line 2"):
        read_timeline(tmp_path)
