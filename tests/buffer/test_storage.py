"""Snapshot files: what safetensors reads in them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_ckmerge.buffer import storage as storage_module
from lightning_ckmerge.buffer.blocks import cast_blocks, pool_blocks
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage, Stored, check_file
from lightning_ckmerge.core.layout import Flats, OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import BLOCK_NUMEL
from lightning_ckmerge.errors import SnapshotError
from tests.support.rolling import make_owned

NAME = "0123abcd-000000001-000000025-mean.safetensors"


def filled(layout: TensorLayout) -> Flats:
    """Return memory in which every element differs from its neighbours."""
    return {dtype: torch.arange(n).to(dtype) for dtype, n in layout.sizes.items()}


def write(storage: Storage, layout: TensorLayout, flats: Flats) -> Stored:
    return storage.write(NAME, layout, cast_blocks(layout.views(flats), layout))


def region(path: Path) -> bytes:
    """Return the file's data region."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def raw(flats: Flats) -> bytes:
    """Return the bytes of flat memory."""
    return b"".join(flat.view(torch.uint8).numpy().tobytes() for flat in flats.values())


def test_flat_memory_is_the_files_data_and_is_what_safetensors_itself_would_write(tmp_path: Path) -> None:
    layout = TensorLayout(make_owned())
    assert len(layout.sizes) == 3
    flats = filled(layout)
    write(DiskStorage(tmp_path), layout, flats)
    tensors = {slot.name: view.clone() for slot, view in zip(layout.slots, layout.views(flats), strict=True)}
    save_file(tensors, tmp_path / "reference.safetensors")
    assert region(tmp_path / NAME) == raw(flats) == region(tmp_path / "reference.safetensors")
    loaded = load_file(tmp_path / NAME)
    torch.testing.assert_close(loaded, tensors, rtol=0, atol=0)
    with safe_open(tmp_path / NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("storage", [DiskStorage, MemoryStorage])
def test_what_is_read_is_what_was_written(tmp_path: Path, storage: type[Storage]) -> None:
    layout = TensorLayout(make_owned())
    kept = DiskStorage(tmp_path) if storage is DiskStorage else MemoryStorage()
    flats = filled(layout)
    stored = write(kept, layout, flats)
    expected = {dtype: flat.clone() for dtype, flat in flats.items()}
    for flat in flats.values():
        flat.zero_()
    torch.testing.assert_close(kept.read(stored, layout), expected, rtol=0, atol=0)


def test_size_and_hash_are_the_files(tmp_path: Path) -> None:
    layout = TensorLayout(make_owned())
    stored = write(DiskStorage(tmp_path), layout, filled(layout))
    data = (tmp_path / NAME).read_bytes()
    assert (stored.num_bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_writing_to_mapped_memory_leaves_the_file_alone(tmp_path: Path) -> None:
    layout = TensorLayout(make_owned())
    storage = DiskStorage(tmp_path)
    stored = write(storage, layout, filled(layout))
    data = (tmp_path / NAME).read_bytes()
    for flat in storage.read(stored, layout).values():
        flat.fill_(-1)
    assert (tmp_path / NAME).read_bytes() == data


def test_writing_and_pooling_take_no_memory_of_the_models_size(tmp_path: Path) -> None:
    """64 MB snapshots through blocks of 2 MB. tracemalloc sees numpy and bytes; torch's share is a few blocks."""
    layout = TensorLayout([OwnedTensor(name="w", role="parameter", tensor=torch.empty(1 << 24, device="meta"))])
    storage = DiskStorage(tmp_path)
    flats = layout.allocate()
    flats[torch.float32].fill_(1)
    tracemalloc.start()
    stored = write(storage, layout, flats)
    mapped = layout.views(storage.read(stored, layout))
    storage.write(NAME.replace("mean", "open"), layout, pool_blocks(mapped, mapped, 0.5, layout))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22
    for blocks in (cast_blocks(mapped, layout), pool_blocks(mapped, mapped, 0.5, layout)):
        assert max(block.numel() for block in blocks) <= BLOCK_NUMEL


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 1 / 3), (torch.float16, 0.5), (torch.float32, 0.9), (torch.float64, 0.25)]
)
def test_pools_are_rounded_once(dtype: torch.dtype, share: float) -> None:
    """Goes red if two means of low precision are pooled in that precision."""
    old, new = torch.randn(2, 600_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    layout = TensorLayout([OwnedTensor(name="w", role="parameter", tensor=old)])
    pooled = torch.cat(list(pool_blocks([old], [new], share, layout)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(pooled, torch.lerp(old.to(wide), new.to(wide), share).to(dtype))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def flip_a_bit_of_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swell(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [flip_a_bit, flip_a_bit_of_the_header, truncate, swell, Path.unlink, replace_by_a_directory]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    layout = TensorLayout(make_owned())
    stored = write(DiskStorage(tmp_path), layout, filled(layout))
    damage(tmp_path / NAME)
    with pytest.raises(SnapshotError, match=NAME):
        DiskStorage(tmp_path).read(stored, layout)


@pytest.mark.parametrize("damage", [flip_a_bit, flip_a_bit_of_the_header, Path.unlink])
def test_damage_to_a_file_of_this_process_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Goes red if what was written or read once is trusted by its name."""
    layout = TensorLayout(make_owned())
    storage = DiskStorage(tmp_path)
    for read_before in (False, True):
        stored = write(storage, layout, filled(layout))
        if read_before:
            storage.read(stored, layout)
        damage(tmp_path / NAME)
        with pytest.raises(SnapshotError, match=NAME):
            storage.read(stored, layout)


def test_a_file_is_hashed_once_and_one_of_this_process_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TensorLayout(make_owned())
    hashed: list[str] = []

    def noting(path: Path, layout: TensorLayout, sha256: str) -> None:
        hashed.append(path.name)
        check_file(path, layout, sha256)

    monkeypatch.setattr(storage_module, "check_file", noting)
    own = DiskStorage(tmp_path)
    stored = write(own, layout, filled(layout))
    for _ in range(3):
        own.read(stored, layout)
    assert hashed == []
    resumed = DiskStorage(tmp_path)
    for _ in range(3):
        resumed.read(stored, layout)
    assert hashed == [NAME]


def test_a_file_that_shrinks_after_its_check_is_refused(tmp_path: Path) -> None:
    """Content is read once, but a map that reaches past the file's end would kill the process."""
    layout = TensorLayout(make_owned())
    storage = DiskStorage(tmp_path)
    stored = write(storage, layout, filled(layout))
    storage.read(stored, layout)
    truncate(tmp_path / NAME)
    with pytest.raises(SnapshotError, match="size must be"):
        storage.read(stored, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: [*o, OwnedTensor(name="more", role="parameter", tensor=torch.ones(2))], "more"),
        (lambda o: o[1:], r"z.weight.*F32 \[5, 7\] instead of nothing"),
        (lambda o: [OwnedTensor(name="z.weight", role="parameter", tensor=torch.ones(7, 5)), *o[1:]], r"z.weight"),
        (lambda o: [OwnedTensor(name="z.weight", role="parameter", tensor=o[0].tensor.half()), *o[1:]], r"F32 .* F16"),
    ],
)
def test_a_file_of_another_model_is_refused_by_the_name_of_the_tensor(
    tmp_path: Path, change: Callable[[list[OwnedTensor]], list[OwnedTensor]], message: str
) -> None:
    layout = TensorLayout(make_owned())
    stored = write(DiskStorage(tmp_path), layout, filled(layout))
    with pytest.raises(SnapshotError, match=message):
        DiskStorage(tmp_path).read(stored, TensorLayout(change(make_owned())))


@pytest.mark.parametrize(
    "name", [f"../{NAME}", f"/tmp/{NAME}", NAME.replace("mean", "../mean"), "model.safetensors", "", f"{NAME}\n"]
)
def test_only_names_of_snapshots_are_touched(tmp_path: Path, name: str) -> None:
    layout = TensorLayout(make_owned())
    storage = DiskStorage(tmp_path / "buffer")
    with pytest.raises(SnapshotError, match="name must be"):
        storage.write(name, layout, [])
    with pytest.raises(SnapshotError, match="name must be"):
        storage.read(Stored(name=name, num_bytes=1, sha256="0" * 64), layout)
    with pytest.raises(SnapshotError, match="name must be"):
        storage.delete(name)


def test_a_failed_write_leaves_nothing_and_the_older_file_whole(tmp_path: Path) -> None:
    layout = TensorLayout(make_owned())
    storage = DiskStorage(tmp_path)
    stored = write(storage, layout, filled(layout))

    def blocks() -> Iterator[Tensor]:
        yield torch.zeros(2, dtype=torch.float64)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        storage.write(NAME, layout, blocks())
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    torch.testing.assert_close(storage.read(stored, layout), filled(layout), rtol=0, atol=0)


def test_headers_name_every_tensor_in_unicode_and_align_the_data(tmp_path: Path) -> None:
    owned = [OwnedTensor(name=n, role="parameter", tensor=torch.ones(3)) for n in ("größe", 'quo"te', "ネット")]
    layout = TensorLayout(owned)
    write(DiskStorage(tmp_path), layout, filled(layout))
    assert load_file(tmp_path / NAME).keys() == {o.name for o in owned}
    data = (tmp_path / NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    assert next(iter(json.loads(data[8 : 8 + length]))) == "__metadata__"
