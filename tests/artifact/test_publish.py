from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.errors import ArtifactError
from tests.support.outcomes import LocalWeights, Publish, TiedModel, make_outcome, tensors_of
from tests.support.waiting import wait_until


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    return tmp_path / "merges"


def listing(directory: Path) -> dict[str, str]:
    """Every file's content, and every link's target, by name."""
    return {
        str(p.relative_to(directory)): os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def with_weights(directory: Path) -> list[str]:
    return sorted(p.parent.name for p in directory.glob("step=*/model.safetensors"))


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond ``num_bytes``, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_artifact_is_laid_out_as_promised(publish: Publish, merges: Path) -> None:
    artifact = publish(step=2000)
    assert names(merges) == ["best", "step=000002000", "timeline.jsonl"]
    assert os.readlink(merges / "best") == "step=000002000"
    assert names(artifact.path) == ["manifest.json", "model.safetensors"]
    assert artifact == Artifact.open(merges / "step=000002000")


def test_publishing_changes_neither_manifest_nor_weights(merges: Path) -> None:
    manifest, weights = build_manifest(make_outcome()), tensors_of(TiedModel())
    before = json.dumps(manifest), {name: t.clone() for name, t in weights.items()}
    ArtifactStore(merges, mode="min", save_top_k=1, max_shard_size=1 << 30).publish(manifest, LocalWeights(weights))
    assert json.dumps(manifest) == before[0]
    assert all(torch.equal(weights[name], t) for name, t in before[1].items())


def test_extras_see_the_weights_and_are_listed(publish: Publish) -> None:
    seen = []

    def extra(directory: Path, manifest: dict[str, Any]) -> None:
        seen.append(sorted(manifest["files"]))
        (directory / "hf").mkdir(exist_ok=True)
        (directory / "hf" / f"part-{len(seen)}.txt").write_text("text")

    artifact = publish(extras=[extra, extra])
    assert seen == [["model.safetensors"], ["hf/part-1.txt", "model.safetensors"]]
    assert sorted(artifact.manifest["files"]) == ["hf/part-1.txt", "hf/part-2.txt", "model.safetensors"]
    Artifact.open(artifact.path)


def test_an_extra_must_not_link_out(publish: Publish, tmp_path: Path, merges: Path) -> None:
    (tmp_path / "secret").write_text("text")
    with pytest.raises(ArtifactError, match="got the link stolen"):
        publish(extras=[lambda directory, _: (directory / "stolen").symlink_to(tmp_path / "secret")])
    assert names(merges) == []


def test_one_step_published_twice_overwrites_nothing(publish: Publish, merges: Path) -> None:
    first = publish(value=2.0)
    before = listing(first.path)
    assert [publish(value=3.0).path.name for _ in range(2)] == ["step=000001000-v1", "step=000001000-v2"]
    assert listing(first.path) == before
    assert os.readlink(merges / "best") == "step=000001000"


@pytest.mark.parametrize(("mode", "values", "best"), [("min", (2.0, 1.5, 1.8), 1), ("max", (0.5, 0.7, 0.6), 1)])
def test_best_is_the_best_accepted(
    publish: Publish, merges: Path, mode: str, values: tuple[float, ...], best: int
) -> None:
    paths = [publish(step=i, value=value, mode=mode).path for i, value in enumerate(values)]
    assert (merges / "best").resolve() == paths[best]


@pytest.mark.parametrize("status", ["rejected", "unconfirmed"])
def test_only_an_accepted_search_moves_best(publish: Publish, merges: Path, status: str) -> None:
    publish(step=1, value=1.0, status=status)
    assert not os.path.lexists(merges / "best")
    publish(step=2, value=2.0)
    publish(step=3, value=1.0, status=status)
    assert os.readlink(merges / "best") == "step=000000002"
    assert [r["status"] for r in read_timeline(merges)] == [status, "accepted", status]


def test_a_rejected_search_leaves_a_record_which_retention_keeps(publish: Publish, merges: Path) -> None:
    record = publish(step=1, status="rejected", weights=None)
    for step in range(2, 5):
        publish(step=step, value=3.0 - step / 10, save_top_k=1)
    assert names(merges) == ["best", "step=000000001", "step=000000004", "timeline.jsonl"]
    assert not Artifact.open(record.path).has_weights


@pytest.mark.parametrize(
    ("save_top_k", "kept"),
    [(-1, [1, 2, 3, 4, 5]), (0, []), (1, [3]), (2, [3, 4])],
)
def test_retention_counts_by_value(publish: Publish, merges: Path, save_top_k: int, kept: list[int]) -> None:
    for step, value in enumerate((2.0, 1.9, 1.1, 1.5, 1.8), start=1):
        publish(step=step, value=value, save_top_k=save_top_k)
    assert with_weights(merges) == [f"step={step:09d}" for step in kept]
    assert len(read_timeline(merges)) == 5
    if save_top_k:
        assert os.readlink(merges / "best") == "step=000000003"


def test_an_outranked_search_is_never_written_with_weights(publish: Publish) -> None:
    publish(step=1, value=1.0, save_top_k=1)
    artifact = publish(step=2, value=2.0, save_top_k=1)
    assert artifact.path.is_dir()
    assert not artifact.has_weights


def test_of_equals_the_older_stays(publish: Publish, merges: Path) -> None:
    artifacts = [publish(step=step, value=1.0, save_top_k=1) for step in range(1, 4)]
    assert with_weights(merges) == ["step=000000001"]
    assert all(artifact.path.is_dir() for artifact in artifacts)


@pytest.mark.parametrize(
    ("searches", "kept"),
    [
        ("au", [1, 2]),  # beside the best
        ("aur", [1, 2]),
        ("auu", [1, 3]),  # until a newer one
        ("aua", [1]),  # or acceptance, be the accepted one outranked
        ("uu", [1, 2]),  # the first is the better one
        ("ua", [2]),
    ],
)
def test_the_newest_unconfirmed_merge_is_kept(publish: Publish, merges: Path, searches: str, kept: list[int]) -> None:
    """And `best` stays where it is. Goes red if an accepted merge outranks it: there, its weights would be lost."""
    statuses = {"a": "accepted", "u": "unconfirmed", "r": "rejected"}
    for step, letter in enumerate(searches, start=1):
        publish(step=step, value=1.0 + step, save_top_k=1, status=statuses[letter])
    assert with_weights(merges) == [f"step={step:09d}" for step in kept]
    assert "a" not in searches or os.readlink(merges / "best") == f"step={searches.index('a') + 1:09d}"


def test_after_a_resume_the_newest_is_the_one_published_last(publish: Publish, merges: Path) -> None:
    publish(step=5, value=2.0, save_top_k=1)
    publish(step=4, value=3.0, save_top_k=1, status="unconfirmed")
    assert with_weights(merges) == ["step=000000004", "step=000000005"]


def test_records_alone_are_kept_of_unconfirmed_merges_too(publish: Publish, merges: Path) -> None:
    publish(step=1, save_top_k=0, status="unconfirmed")
    assert with_weights(merges) == []


def test_best_outlives_any_save_top_k(publish: Publish, merges: Path) -> None:
    publish(step=1, value=1.0)
    publish(step=2, value=2.0)
    publish(step=3, value=1.5, save_top_k=0)
    assert with_weights(merges) == ["step=000000001"]


def test_retention_removes_nothing_but_artifacts_of_its_own(publish: Publish, merges: Path, tmp_path: Path) -> None:
    foreign = merges / "step=000000000"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_bytes(b"mine")
    damaged = publish(step=1, value=3.0).path
    (damaged / "manifest.json").write_text("{}")
    other_metric = publish(step=2, value=9.0, monitor="other").path
    elsewhere = publish(step=3, value=5.0).path.rename(tmp_path / "elsewhere")
    (merges / "step=000000003").symlink_to(elsewhere)
    (merges / "notes.txt").write_text("mine")
    publish(step=4, value=2.0, save_top_k=1)
    publish(step=5, value=1.0, save_top_k=1)
    assert all((p / "model.safetensors").exists() for p in (foreign, damaged, other_metric, elsewhere))
    assert (merges / "notes.txt").exists()
    assert (merges / "step=000000003").is_symlink()
    assert not (merges / "step=000000004").exists()


def fail(directory: Path, manifest: dict[str, Any]) -> None:
    (directory / "half").write_text("half")
    raise ValueError("no toner")


@pytest.mark.parametrize("save_top_k", [-1, 1])
def test_a_failing_extra_leaves_everything_as_it_was(publish: Publish, merges: Path, save_top_k: int) -> None:
    publish(step=1, value=2.0)
    before = listing(merges)
    with pytest.raises(ArtifactError, match="no toner") as error:
        publish(step=2, value=1.0, extras=[fail], save_top_k=save_top_k)
    assert isinstance(error.value.__cause__, ValueError)
    assert listing(merges) == before
    assert names(merges) == ["best", "step=000000001", "timeline.jsonl"]


def test_a_full_disk_leaves_everything_as_it_was(publish: Publish, merges: Path) -> None:
    publish(step=1, value=2.0)
    before = listing(merges)
    with largest_file(100_000), pytest.raises(ArtifactError, match="written whole") as error:
        publish(step=2, value=1.0, weights={"w": torch.zeros(100_000)}, save_top_k=1)
    assert isinstance(error.value.__cause__, OSError)
    assert listing(merges) == before
    publish(step=2, value=1.0, weights={"w": torch.zeros(100_000)}, save_top_k=1)
    assert with_weights(merges) == ["step=000000002"]


def test_a_dirpath_that_is_a_file_is_an_artifact_error(publish: Publish, merges: Path) -> None:
    merges.write_text("not a directory")
    with pytest.raises(ArtifactError, match="written whole"):
        publish()
    assert merges.read_text() == "not a directory"


def test_an_interrupt_passes_and_leaves_nothing(publish: Publish, merges: Path) -> None:
    def interrupt(directory: Path, manifest: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(extras=[interrupt])
    assert names(merges) == []


def _publish_forever(merges: Path) -> None:
    store = ArtifactStore(merges, mode="min", save_top_k=2, max_shard_size=1 << 30)
    # Small tensors: larger ones are filled by OpenMP threads, which do not survive a fork.
    weights = {f"w{i}": torch.full((20_000,), float(i)) for i in range(8)}
    for step in range(1, 10_000):
        store.publish(build_manifest(make_outcome(step=step, value=2 - step / 10_000)), LocalWeights(weights))


# What can be seen of a publication at each of its stages.
MOMENTS: tuple[Callable[[Path], object], ...] = (
    lambda merges: seen(merges, ".tmp-step=*"),
    lambda merges: seen(merges, ".tmp-step=*/model.safetensors"),
    lambda merges: seen(merges, ".tmp-step=*/manifest.json"),
    lambda merges: seen(merges, ".tmp-best*"),
    lambda merges: not seen(merges, ".tmp-*"),
    # A rename whose record was not there before it. The moment is too short for the other order, or for a walk.
    lambda merges: num_lines(merges / "timeline.jsonl") < len(filter_names(os.listdir(merges), "step=*")),
)


def num_lines(path: Path) -> int:
    return path.read_text().count("\n")


def seen(merges: Path, pattern: str) -> list[str]:
    """Return the paths that match, in a directory whose entries come and go."""
    found = [str(Path(d, name).relative_to(merges)) for d, *names in os.walk(merges) for name in chain(*names)]
    return [path for path in found if path.count("/") == pattern.count("/") and fnmatch(path, pattern)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_run_leaves_whole_artifacts_only(tmp_path: Path) -> None:
    """Killed at six moments of a publication: whatever has an artifact's name verifies, and so does ``best``."""
    num_searches = 0
    for i, begun in enumerate(MOMENTS):
        merges = tmp_path / str(i)
        process = multiprocessing.get_context("fork").Process(target=_publish_forever, args=(merges,))
        process.start()
        wait_until(lambda merges=merges: (merges / "best").exists())
        wait_until(partial(begun, merges), every_s=0)
        process.kill()
        process.join()
        for path in merges.glob("step=*"):
            Artifact.open(path)
        num_searches += len(read_timeline(merges))
        # `best` follows the first record; the second search starts after both.
        if len(read_timeline(merges)) > 1:
            assert Artifact.open(merges).has_weights
    assert num_searches >= 6


def test_staging_of_a_crashed_run_is_swept_and_nothing_else(publish: Publish, merges: Path) -> None:
    crashed = merges / ".tmp-step=000000500-0123abcd"
    crashed.mkdir(parents=True)
    (crashed / "model.safetensors").write_bytes(b"half")
    (merges / ".tmp-best-0123abcd").symlink_to("step=000000001")
    others = [".tmp-mine", ".tmp-step=000000500", ".tmp-step=000000500-0123abcd.bak", "step=5-0123abcd"]
    for name in others:
        (merges / name).mkdir()
    publish(step=1)
    assert names(merges) == sorted([*others, "best", "step=000000001", "timeline.jsonl"])


def test_sweeping_does_not_follow_a_link(publish: Publish, merges: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("text")
    merges.mkdir()
    (merges / ".tmp-step=000000500-0123abcd").symlink_to(tmp_path / "precious")
    publish()
    assert (tmp_path / "precious" / "file").exists()
    assert names(merges) == ["best", "step=000001000", "timeline.jsonl"]


def test_best_is_a_pointer_where_links_are_refused(
    publish: Publish, merges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("links are refused")

    monkeypatch.setattr(os, "symlink", refuse)
    publish(step=1, value=2.0)
    publish(step=2, value=1.0, save_top_k=1)
    assert names(merges) == ["best.json", "step=000000002", "timeline.jsonl"]
    for path in (merges, merges / "best", merges / "best.json"):
        assert Artifact.open(path).path == merges / "step=000000002"
    monkeypatch.undo()
    publish(step=3, value=0.5)
    assert names(merges) == ["best", "step=000000002", "step=000000003", "timeline.jsonl"]


def test_a_later_best_never_lacks_a_target(publish: Publish, merges: Path) -> None:
    """Retention runs after ``best`` has moved: each round deletes the earlier best."""
    for first, second in pairwise(range(1, 6)):
        publish(step=first, value=10.0 - first, save_top_k=1)
        publish(step=second, value=10.0 - second, save_top_k=1)
        assert Artifact.open(merges / "best").manifest["step"] == second


def test_artifacts_can_be_read_by_others(publish: Publish) -> None:
    """A staging directory made by ``tempfile`` would stay private to its owner."""
    umask = os.umask(0o022)
    try:
        artifact = publish()
    finally:
        os.umask(umask)
    assert artifact.path.stat().st_mode & 0o777 == 0o755
