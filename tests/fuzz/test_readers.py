"""Whatever a file of unknown origin holds, reading it ends in a value or in one of our own errors; nothing hangs.

``CKMERGE_EXAMPLES=2000`` tries more of each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, save
from typer.testing import CliRunner

from lightning_ckmerge.artifact.accounts import read_account
from lightning_ckmerge.artifact.ensembles import EnsembleArtifact, publish_ensemble
from lightning_ckmerge.artifact.history import history_of
from lightning_ckmerge.artifact.load import Artifact, best_target, load_merged
from lightning_ckmerge.artifact.runs import read_run
from lightning_ckmerge.artifact.standing import Standing, read_standing, write_standing
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.buffer.sharded_snapshot import SnapshotParts
from lightning_ckmerge.buffer.state import BufferState, Entry, Progress
from lightning_ckmerge.buffer.storage import DiskStorage, Stored
from lightning_ckmerge.checkpoints.formats import open_source
from lightning_ckmerge.cli.main import app
from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import ArtifactError, CkmergeError, SearchError, SnapshotError
from lightning_ckmerge.search.study import SearchStudy, make_sampler
from lightning_ckmerge.studies.pilot.ledger import Ledger
from lightning_ckmerge.tensorfiles.durable import file_record
from lightning_ckmerge.tensorfiles.reader import StoredWeights
from lightning_ckmerge.tensorfiles.untrusted import MAX_DEPTH, inside, parse_json, read_json
from lightning_ckmerge.tensorfiles.writer import INDEX_NAME
from tests.support.outcomes import Publish, TiedModel, publisher, tensors_of

EXAMPLES = int(os.environ.get("CKMERGE_EXAMPLES", "12"))
several = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
# Stand-ins for values that `json.dumps` cannot write.
DEEP, LONG, HALF, HUGE = "@deep@", "@long@", "@half@", "@huge@"
RAW = {
    DEEP: "[" * 100_000,
    LONG: "9" * 5000,
    HALF: '"\\ud800"',
    HUGE: "1e999",
}
VALUES = [
    *(DEEP, LONG, HALF, HUGE, None, True, -1, 0, 2.0, 1 << 62, 1 << 70, 1e308, float("nan")),
    *("", "\0", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\\b", "x" * 300, "a/" * 2000, "\x1b[2J", "é" * 200),
    *([], {}, [[]], {"a": {}}, [1, "a"], {"bytes": 1}),
]
hostile = st.sampled_from(VALUES) | st.text(max_size=5) | st.integers() | st.floats()


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return each container below ``value`` with each of its keys."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in pairs] + [found for _, item in pairs for found in nodes(item)]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """One to three values of a document are others, or gone, or under another name."""
    copied = {"": json.loads(json.dumps(document))}
    for _ in range(draw(st.integers(1, 3))):
        places = nodes(copied)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if how == "replace" or holder is copied or isinstance(holder, list):
            holder[key] = draw(hostile)
        else:
            value = holder.pop(key)
            if how == "rename":
                holder[draw(st.sampled_from([v for v in VALUES if isinstance(v, str)]))] = value
    return copied[""]


@st.composite
def files(draw: st.DrawFn, document: Any) -> bytes:
    """A JSON file like ``document``, but for values, or for bytes."""
    text = json.dumps(draw(changed(document)))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return draw(bytes_like(text.encode()) | st.just(text.encode()))


def bytes_like(data: bytes) -> st.SearchStrategy[bytes]:
    """The same bytes but for a few, or cut off, or with others behind."""
    where = st.integers(0, max(0, len(data) - 1))
    flipped = st.lists(st.tuples(where, st.integers(0, 255)), min_size=1, max_size=6).map(lambda f: _with(data, f))
    return flipped | where.map(lambda i: data[:i]) | st.binary(max_size=20).map(lambda b: data + b) | st.binary()


def _with(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    result = bytearray(data)
    for place, value in changes:
        if result:
            result[place] = value
    return bytes(result)


@contextlib.contextmanager
def only(*kinds: type[Exception]) -> Iterator[None]:
    """Let errors of our own pass, and no other."""
    with contextlib.suppress(*kinds):
        yield


def command(*arguments: object) -> None:
    """Run a command; its errors are one line, and no traceback."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code in (0, 1, 2)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception


# --- one reader a row: the file, and what reads it ---------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A directory with sound files, one of which is to be written anew."""

    root: Path
    name: str
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ()

    @property
    def path(self) -> Path:
        return self.root / self.name

    def document(self) -> Any:
        text = self.path.read_text()
        return json.loads(text.splitlines()[0] if self.name.endswith(".jsonl") else text)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("sound")
    publish: Publish = publisher(root / "merges")
    artifact = publish(weights=tensors_of(TiedModel())).path
    run = artifact.parent
    publish(step=2000, weights=None, status="rejected")
    (run / "best").unlink()
    (run / "best.json").write_text(json.dumps({"artifact": artifact.name}))
    (run / "run.json").write_text(json.dumps({"run_id": "deadbeef", "started": 1.5, "resumable": True}))
    numbers: dict[str, Any] = {"step": 2000, "value": 1.0, "is_final": True, "best_step": 1000, "best_value": 1.5}
    standing = Standing(run_id="deadbeef", monitor="val_loss", mode="min", best=artifact.name, **numbers)
    write_standing(run, standing)
    account = {"schema_version": 1, "manifest_sha256": "", "complete": True, "monitor": "val_loss", "mode": "min"}
    (artifact / "explain.json").write_text(json.dumps({**account, "figures": {}, "left_out": [], "points": 0}))
    verdict = {"status": "accepted", "gain": 0.1, "interval": [0.0, 0.2], "sentence": "Better."}
    members = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    shown = {"averaging": "outputs", "members": members, "verdict": verdict, "comparison": []}
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    ensemble = publish_ensemble(root / "ensemble", [state, state], shown, 1 << 30).path
    merged = root / "merged"
    merged.mkdir()
    shutil.copyfile(ensemble / "member-0" / "model.safetensors", merged / "model.safetensors")
    recipe = {
        "inputs": [],
        "method": "linear",
        "files": {"model.safetensors": file_record(merged / "model.safetensors")},
    }
    (merged / "recipe.json").write_text(json.dumps(recipe))
    hub = root / "hub"
    hub.mkdir()
    for i in (1, 2):
        shutil.copyfile(merged / "model.safetensors", hub / f"model-{i:05d}-of-00002.safetensors")
    weight_map = {"weight": "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}
    (hub / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    def read_artifact(path: Path) -> None:
        command("show", path)
        command("verify", path, "--json")
        command("report", path)
        with only(ArtifactError):
            load_merged(path, TiedModel())

    def read_runs_history(path: Path) -> None:
        command("list", path)
        with only(ArtifactError):
            read_timeline(path)
        with only(ArtifactError):
            history_of(path)

    def read_ensemble(path: Path) -> None:
        command("verify", path)
        with only(ArtifactError):
            EnsembleArtifact.open(path).tensors(0)["weight"]

    return {
        "manifest": Case(artifact, "manifest.json", read_artifact),
        "timeline": Case(run, "timeline.jsonl", read_runs_history),
        "pointer": Case(run, "best.json", best_target, (ArtifactError,)),
        "run": Case(run, "run.json", read_run),
        "standing": Case(run, "standing.json", read_standing),
        "account": Case(artifact, "explain.json", read_account, (ArtifactError,)),
        "ensemble": Case(ensemble, "ensemble.json", read_ensemble),
        "recipe": Case(merged, "recipe.json", lambda path: load_merged(path, nn.Linear(2, 2)), (ArtifactError,)),
        "index": Case(hub, INDEX_NAME, open_source, (ArtifactError,)),
    }


READERS = ["manifest", "timeline", "pointer", "run", "standing", "account", "ensemble", "recipe", "index"]


@pytest.mark.parametrize("reader", READERS)
@several
@given(data=st.data())
def test_any_json_is_read_or_refused(cases: dict[str, Case], reader: str, data: st.DataObject) -> None:
    case = cases[reader]
    sound = case.path.read_bytes()
    content = data.draw(files(case.document()))
    try:
        case.path.write_bytes(content + b"\n")
        with only(*case.errors):
            case.read(case.root)
    finally:
        case.path.write_bytes(sound)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "raw", [RAW[DEEP], '{"a":' * 100_000, f"[{LONG}]", "", "[" * 30 + "]" * 30, f'{{"files": {RAW[DEEP]}}}']
)
def test_json_of_any_depth_is_refused_as_damage(cases: dict[str, Case], reader: str, raw: str) -> None:
    """It was a ``RecursionError``, from commands too."""
    case = cases[reader]
    sound = case.path.read_bytes()
    try:
        case.path.write_text(raw.replace(LONG, RAW[LONG]) + "\n")
        with only(*case.errors):
            case.read(case.root)
    finally:
        case.path.write_bytes(sound)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(cases: dict[str, Case], reader: str) -> None:
    case = cases[reader]
    sound = case.path.read_bytes()
    done = threading.Event()

    def read() -> None:
        with contextlib.suppress(CkmergeError), contextlib.redirect_stdout(io.StringIO()):
            case.read(case.root)
        done.set()

    case.path.unlink()
    os.mkfifo(case.path)
    try:
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert done.wait(120)
        thread.join()
    finally:
        case.path.unlink()
        case.path.write_bytes(sound)


# --- one place for JSON and names --------------------------------------------------------------------------------


@settings(several, max_examples=5 * EXAMPLES)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 60), 1 << 60)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda each: st.lists(each) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), each),
    )
)
def test_sound_json_is_read_as_python_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "nests deeper"),
        ('{"a": 1, "a": 2}', "a key twice"),
        ('["\\udfff"]', "half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ("[1e999]", "which no number can be"),
        ("[NaN]", "NaN is not JSON"),
        ("9" * 21, "21 digits"),
    ],
)
def test_json_beyond_bounds_is_a_value_error_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)
    with pytest.raises(ValueError, match="longer than"):
        parse_json(text, max_bytes=1)


def test_a_file_beyond_its_length_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a", max_bytes=9) == [1, 2, 3]
    with pytest.raises(ValueError, match="longer than 8 bytes"):
        read_json(tmp_path / "a", max_bytes=8)
    with pytest.raises(ValueError, match="no regular file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    "name", ["\0", "a\0b", "\ud800", "x" * 256, "é" * 128, "a/" * 40 + "b", "a\nb", 5, None, ["a"]]
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: Any) -> None:
    """A NUL was a ``ValueError``, and a long name an ``OSError``."""
    with pytest.raises(ArtifactError, match="must lie inside it"):
        inside(tmp_path, name)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with contextlib.suppress(ArtifactError):  # newer Pythons follow them nowhere
        assert not inside(tmp_path, "a").is_file()


@settings(several, max_examples=5 * EXAMPLES)
@given(st.text(max_size=20) | st.sampled_from([v for v in VALUES if isinstance(v, str)]))
def test_a_name_lies_inside_or_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    directory = tmp_path_factory.getbasetemp()
    with only(ArtifactError):
        path = inside(directory, name)
        assert path.resolve().is_relative_to(directory.resolve())
        path.is_file()


# --- tensors -----------------------------------------------------------------------------------------------------


def snapshot_layout() -> TensorLayout:
    tensors = {"w[0:2,0:3]": torch.zeros(2, 3), "b": torch.ones(2)}
    return TensorLayout([OwnedTensor(name=n, role="parameter", tensor=t) for n, t in tensors.items()])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = snapshot_layout()
    storage = DiskStorage(tmp_path_factory.mktemp("buffer"))
    flat = torch.cat([torch.zeros(slot.shape).view(-1) for slot in layout.slots])
    return storage.path(storage.write("deadbeef-000000001-000000002-mean.safetensors", layout, [flat]).name)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@several
@given(data=st.data())
def test_any_safetensors_file_is_read_or_refused(shard: Path, data: st.DataObject) -> None:
    sound = shard.read_bytes()
    header, rest = header_of(sound)
    text = data.draw(files(header))
    framed = len(text).to_bytes(8, "little") + text + rest
    content = data.draw(st.sampled_from([framed, framed[: len(framed) - 4]]) | bytes_like(sound))
    path = shard.with_name("00000000-000000001-000000002-mean.safetensors")
    path.write_bytes(content)
    with only(ArtifactError):
        weights = StoredWeights([path])
        for name in weights:
            with only(ArtifactError):
                weights.spec(name)
            with only(ArtifactError):
                weights[name].sum()
    with only(SnapshotError):
        parts = SnapshotParts([path], None, {"w": (2, 3), "b": (2,)})
        for name in list(parts.names):
            with only(SnapshotError):
                parts.dtype(name)
                parts.shape(name)
        parts.check_model()
    layout = snapshot_layout()
    record = file_record(path)
    with only(SnapshotError):
        stored = Stored(name=path.name, num_bytes=record["bytes"], sha256=record["sha256"])
        DiskStorage(path.parent).read(stored, layout)


def test_a_part_that_claims_a_far_place_costs_no_memory(tmp_path: Path) -> None:
    """The tensor would have had 4 TB."""
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"w[1000000000000:1000000000001]": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    parts = SnapshotParts([path], None, {})
    from lightning_ckmerge.core.specs import whole

    with pytest.raises(SnapshotError, match="must hold all of a tensor"):
        parts.assemble("w", whole(parts.shape("w")), torch.float32)


STATE = BufferState(
    run_id="deadbeef",
    snapshot="mean",
    durable=True,
    segment_steps=2,
    entries=(
        Entry(
            segment=Segment(kind="mean", first_step=1, last_step=2),
            stored=Stored(name="deadbeef-000000001-000000002-mean.safetensors", num_bytes=5, sha256="ab" * 32),
        ),
    ),
    progress=Progress.after(2),
    saved=True,
    file=None,
)


@settings(several, max_examples=5 * EXAMPLES)
@given(changed(json.loads(json.dumps(STATE.to_dict()))))
def test_any_state_of_a_buffer_is_read_or_refused(state: Any) -> None:
    """It comes from a checkpoint."""
    assert BufferState.from_dict(json.loads(json.dumps(STATE.to_dict()))) == STATE
    with only(SnapshotError):
        found = BufferState.from_dict(state)
        assert all(type(n) is int for e in found.entries for n in (e.segment.first_step, e.stored.num_bytes))
        with only(SnapshotError):
            for name in found.names:
                DiskStorage("/nowhere").path(name)


# --- checkpoints -------------------------------------------------------------------------------------------------


@several
@given(data=st.data())
def test_any_torch_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "a.ckpt"
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2), "b": torch.ones(3)}, "global_step": 5}, buffer)
    path.write_bytes(data.draw(bytes_like(buffer.getvalue())))
    with only(ArtifactError):
        open_source(path)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "checkpoint"
    save({"w": torch.arange(4.0), "b": torch.ones(2, 2)}, storage_writer=FileSystemWriter(path), no_dist=True)
    return path


@settings(several, max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_any_metadata_of_a_distributed_checkpoint_is_read_or_refused(distributed: Path, data: st.DataObject) -> None:
    metadata = distributed / ".metadata"
    sound = metadata.read_bytes()
    try:
        metadata.write_bytes(data.draw(bytes_like(sound)))
        with only(ArtifactError):
            source = open_source(distributed)
            for name in source.weights:
                with only(ArtifactError):
                    source.weights[name]
    finally:
        metadata.write_bytes(sound)
    assert torch.equal(open_source(distributed).weights["w"], torch.arange(4.0))


def test_a_pickle_cannot_change_the_classes_that_it_names(distributed: Path) -> None:
    """It could set attributes of torch's own classes, for the rest of the process."""
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    metadata = distributed / ".metadata"
    sound = metadata.read_bytes()
    # The class itself takes the state: (None, {"planner_data": "stolen"}).
    pieces = (b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n", b"N}Vstolen\nVyes\ns\x86b.")
    try:
        metadata.write_bytes(b"".join(pieces))
        with pytest.raises(ArtifactError):
            open_source(distributed)
        assert not hasattr(Metadata, "stolen")
        assert not hasattr(MetadataIndex, "stolen")
    finally:
        metadata.write_bytes(sound)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["CKMERGE_BOMB"],))


def test_nothing_runs_that_a_checkpoint_brings(
    distributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = tmp_path / "fired"
    monkeypatch.setenv("CKMERGE_BOMB", str(fired))
    sound = (distributed / ".metadata").read_bytes()
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Bomb()}, tmp_path / "a.ckpt")
    (distributed / ".metadata").write_bytes(pickle.dumps(Bomb()))
    (distributed / "meta.pt").write_bytes(pickle.dumps(Bomb()))
    try:
        for path in (distributed, tmp_path / "a.ckpt"):
            with pytest.raises(ArtifactError, match="alone, got"):
                open_source(path)
        (distributed / ".metadata").write_bytes(sound)
        with only(ArtifactError):
            open_source(distributed)
    finally:
        (distributed / ".metadata").write_bytes(sound)
        (distributed / "meta.pt").unlink()
    assert not fired.exists()


# --- records of searches -----------------------------------------------------------------------------------------


@several
@given(data=st.data())
def test_any_ledger_is_read_or_begun_anew(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "ledger.jsonl"
    record = {"key": "a", "half": "search", "score": {"value": 1.0, "values": [1.0], "sizes": [2], "num_batches": 1}}
    path.write_text(json.dumps({"study": "x"}) + "\n")
    with path.open("ab") as file:
        file.write(data.draw(files(record)) + b"\n")
    for score in Ledger(path, "x")._scores.values():
        assert isinstance(score, Score)


@settings(several, max_examples=max(4, EXAMPLES // 3))
@given(data=st.data())
def test_any_journal_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("study") / "study.journal"
    begin(path)
    path.write_bytes(data.draw(bytes_like(path.read_bytes())))
    with only(SearchError):
        begin(path)


def begin(path: Path) -> SearchStudy:
    from lightning_ckmerge.core.objectives import Objective
    from lightning_ckmerge.core.spaces import Interval

    study = SearchStudy(
        path,
        "search",
        sampler=make_sampler(None, 1),
        intervals={"x": Interval(low=0.0, high=1.0)},
        objectives=[Objective(monitor="val_loss", mode="min")],
        fingerprint="f",
    )
    study.begin("latest", {"x": 0.5})
    study.tell("latest", Score(value=1.0), {})
    return study


def test_texts_of_a_stranger_do_not_drive_the_terminal(publish: Publish) -> None:
    """Escape sequences were printed as they came."""
    path = publish(weights=tensors_of(TiedModel())).path
    manifest = json.loads((path / "manifest.json").read_text())
    told = {**manifest["verdict"], "sentence": "\x1b]0;owned\x07\x9b2J", "warnings": ["\x1b[2J"]}
    (path / "manifest.json").write_text(json.dumps({**manifest, "verdict": told, "monitor": "\x1b[1m"}))
    record = json.loads((path.parent / "timeline.jsonl").read_text().splitlines()[0])
    hostile_record = {**record, "status": "skipped", "reason": "\x1b[2J", "artifact": None}
    (path.parent / "timeline.jsonl").write_text(json.dumps(hostile_record) + "\n")
    for arguments in (["show", str(path)], ["list", str(path.parent)], ["verify", str(path)]):
        output = CliRunner().invoke(app, arguments).output
        assert output.strip()
        assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in output)


def test_verify_vouches_for_no_artifact_that_lists_nothing(publish: Publish) -> None:
    """It said 0 of a manifest whose files are empty, and of files that no manifest lists."""
    path = publish(weights=tensors_of(TiedModel())).path
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 0
    (path / "model.ckpt").write_bytes(b"anything")
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert (done.exit_code, "not listed" in done.output) == (1, True)
    (path / "model.ckpt").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 1
    for name in manifest["files"]:
        (path / name).unlink()
    done = CliRunner().invoke(app, ["verify", str(path)])
    assert (done.exit_code, "lists no files" in done.output) == (1, True)
    with pytest.raises(ArtifactError, match="must hold weights"):
        Artifact.open(path).tensors()
