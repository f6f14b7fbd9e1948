"""Artifacts behind a URL: how they get there, and how they are read."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from lightning_ckmerge.artifact import upload
from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.artifact.remote import as_url, local_copy, open_url, pending_sizes
from lightning_ckmerge.artifact.upload import Uploader, bring_back, claim_url, find_remote_fault
from lightning_ckmerge.errors import ArtifactError
from tests.support.commands import ckmerge, ckmerge_json
from tests.support.filesystems import odd_disk, s3_server
from tests.support.outcomes import Publish, TiedModel, tensors_of

KINDS = ("memory", "file", "s3")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(upload, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def _s3() -> Iterator[None]:
    with s3_server("bucket"):
        yield


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory that does not exist yet, on each kind of file system."""
    if request.param == "s3":
        request.getfixturevalue("_s3")
        return f"s3://bucket/{uuid.uuid4().hex}/merges"
    return f"file://{tmp_path}/remote/merges" if request.param == "file" else f"memory://{uuid.uuid4().hex}/merges"


def bring(dirpath: Path, url: str) -> list[str]:
    """Bring a directory to its URL, and return the warnings."""
    warnings: list[str] = []
    uploader = Uploader(dirpath, url, warnings.append)
    uploader.close()
    return warnings


def names_at(url: str) -> set[str]:
    fs, root = open_url(url)
    fs.invalidate_cache()
    return {name.removeprefix(root).lstrip("/") for name in fs.find(root)}


def names_in(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and not p.is_symlink()}


def test_a_run_is_the_same_at_its_url(publish: Publish, tmp_path: Path, url: str) -> None:
    merges = tmp_path / "merges"
    publish(step=10, max_shard_size=64)
    best = publish(step=20, value=1.0)
    publish(step=30, status="rejected", weights=None)
    assert bring(merges, url) == []
    assert names_at(url) == {n for n in names_in(merges) if not n.startswith("best/")} | {"best.json"}
    model = TiedModel()
    for path in (url, f"{url}/best", f"{url}/step=000000020", Path(f"{url}/step=000000020"), f"{url}/"):
        loaded = load_merged(path, model)
        assert loaded.manifest == best.manifest
        assert all(torch.equal(t, best.tensors()[n]) for n, t in tensors_of(model).items())
    assert Artifact.open(f"{url}/step=000000030").has_weights is False
    listed, expected = ckmerge_json("list", url), ckmerge_json("list", merges)
    assert listed["searches"] == expected["searches"]
    assert listed["best"] == expected["best"] == "step=000000020"
    assert ckmerge_json("show", url) == ckmerge_json("show", merges)
    assert ckmerge_json("report", f"{url}/step=000000010")["markdown"].startswith("#")
    assert ckmerge_json("verify", f"{url}/step=000000010")["ok"] is True


def test_messages_name_the_url_and_not_its_copy(publish: Publish, tmp_path: Path, url: str) -> None:
    publish(step=10, status="rejected", weights=None)
    publish(step=20)
    bring(tmp_path / "merges", url)
    record = Artifact.open(f"{url}/step=000000010")
    assert repr(record).startswith(f"Artifact('{url}/step=000000010', rejected")
    with pytest.raises(ArtifactError, match=f"got the record {url}/step=000000010: its search was rejected"):
        record.tensors()
    with pytest.raises(ArtifactError, match=f"got {url}/step=000000077/elsewhere. Name an artifact"):
        Artifact.open(f"{url}/step=000000077/elsewhere")
    assert f", {url}/step=000000020" in ckmerge("show", url).stdout.replace("\n", "")
    assert ckmerge_json("verify", url)["artifact"] == f"{url}/step=000000020"


def test_weights_are_copied_once_they_are_asked_for(publish: Publish, tmp_path: Path) -> None:
    publish(step=10)
    publish(step=20)
    with odd_disk() as disk:
        url = f"odd://{tmp_path}/remote"
        bring(tmp_path / "merges", url)
        disk.done.clear()
        ckmerge("list", url)
        artifact = Artifact.open(f"{url}/step=000000010", verify=False)
        assert not any(name.endswith(".safetensors") for _, name in disk.done)
        assert pending_sizes(artifact.path) == {
            "model.safetensors": artifact.manifest["files"]["model.safetensors"]["bytes"]
        }
        assert set(artifact.tensors()) == set(tensors_of(TiedModel()))
        assert [name for _, name in disk.done if name.endswith(".safetensors")] == ["model.safetensors"]
        disk.done.clear()
        Artifact.open(f"{url}/step=000000010")  # is known
        assert not any(name.endswith(".safetensors") for _, name in disk.done)


def test_a_copy_follows_what_changes_at_the_url(publish: Publish, tmp_path: Path, url: str) -> None:
    merges = tmp_path / "merges"
    uploader = Uploader(merges, url, pytest.fail)
    first = publish(step=10, value=2.0, save_top_k=1)
    before = bring(merges, url)
    assert load_merged(url, TiedModel()).path.name == first.path.name
    second = publish(step=20, value=1.0, save_top_k=1)
    uploader.close()
    assert not before
    assert not first.path.exists()
    assert load_merged(url, TiedModel()).path.name == second.path.name
    assert not any(name.startswith(first.path.name) for name in names_at(url))
    assert not list((tmp_path / "cache").rglob(first.path.name))
    with pytest.raises(ArtifactError, match="has been removed since"):
        Artifact.open(f"{url}/{first.path.name}")


def test_a_reader_between_any_two_writes_finds_whole_artifacts_alone(publish: Publish, tmp_path: Path) -> None:
    """Goes red if a manifest comes before a file that it lists, or stays longer than one."""
    remote, whole, halves = tmp_path / "remote", set(), []

    def look() -> None:
        for manifest in remote.glob("step=*/manifest.json"):
            try:
                whole.add(Artifact.open(manifest.parent).path.name)
            except ArtifactError as error:
                halves.append(str(error))

    with odd_disk(look=look):
        for step in (10, 20, 30):
            publish(step=step, value=1.0 / step, save_top_k=1, max_shard_size=64)
            assert bring(tmp_path / "merges", f"odd://{remote}") == []
    assert not halves
    assert whole == {"step=000000010", "step=000000020", "step=000000030"}
    assert [p.name for p in remote.glob("step=*")] == ["step=000000030"]


@pytest.mark.parametrize(("faults", "fails"), [(2, False), (3, True)])
def test_what_fails_is_tried_again_then_told_and_kept_here(
    publish: Publish, tmp_path: Path, faults: int, fails: bool
) -> None:
    publish(step=10)
    with odd_disk(faults=faults):
        warnings = bring(tmp_path / "merges", f"odd://{tmp_path}/remote")
        assert len(warnings) == fails
        if fails:
            assert "failed: OSError: the server is away. All of it is in" in warnings[0]
            assert Artifact.open(tmp_path / "merges").has_weights
            assert bring(tmp_path / "merges", f"odd://{tmp_path}/remote") == []  # a resumed run
        assert load_merged(f"odd://{tmp_path}/remote", TiedModel()).has_weights


def test_a_damaged_file_at_the_url_is_found(publish: Publish, tmp_path: Path) -> None:
    publish(step=10)
    url = f"memory://{uuid.uuid4().hex}"
    bring(tmp_path / "merges", url)
    fs, root = open_url(url)
    path = f"{root}/step=000000010/model.safetensors"
    content = bytearray(fs.cat_file(path))
    content[-1] ^= 1
    fs.pipe_file(path, bytes(content))
    with pytest.raises(ArtifactError, match="another SHA-256"):
        load_merged(url, TiedModel())
    assert ckmerge_json("verify", f"{url}/step=000000010", code=1)["ok"] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "memory://nothing-here", "FileNotFoundError for memory://nothing-here"),
        (lambda: "nosuch://bucket/run", "ValueError for nosuch://bucket/run: Protocol not known"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(make: Callable[[], str], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_merged(make(), TiedModel())
    assert message in ckmerge("list", make(), code=2).stderr


def test_a_name_that_leaves_the_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = open_url("memory://evil")
    fs.pipe_file(f"{root}/timeline.jsonl", b"")
    monkeypatch.setattr(type(fs), "find", lambda *_, **__: {"/evil/step=1/../../../x.json": {"size": 1}})
    with pytest.raises(ArtifactError, match="must lie inside it"):
        local_copy("memory://evil")
    with pytest.raises(ArtifactError, match="must lie inside it"):
        bring_back("memory://evil", tmp_path / "merges")
    assert not list(tmp_path.rglob("x.json"))


def test_each_run_has_a_directory_of_its_own(url: str) -> None:
    assert find_remote_fault(url) is None
    assert [claim_url(url, run) for run in ("a", "b", "a", "b", "c")] == [
        url,
        f"{url}/run=2",
        url,
        f"{url}/run=2",
        f"{url}/run=3",
    ]


def test_a_lost_directory_comes_back(publish: Publish, tmp_path: Path, url: str) -> None:
    merges = tmp_path / "merges"
    publish(step=10)
    publish(step=20, value=1.0)
    bring(merges, url)
    kept = {n: (merges / n).read_bytes() for n in names_in(merges)}
    assert not bring_back(url, merges)
    shutil.move(merges, tmp_path / "lost")
    merges.mkdir()
    assert bring_back(url, merges)
    assert {n: (merges / n).read_bytes() for n in names_in(merges) if n != "best.json"} == kept
    assert Artifact.open(merges).path.name == "step=000000020"


def test_urls_are_told_from_paths() -> None:
    assert as_url(Path("s3://bucket/a//b/")) == "s3://bucket/a/b"
    assert as_url("simplecache::s3://bucket") == "simplecache::s3://bucket"
    assert local_copy("runs/gpt") == Path("runs/gpt")
    assert fsspec.core.split_protocol(as_url(Path("gs://b/c")))[0] == "gs"
