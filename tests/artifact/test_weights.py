from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_ckmerge.artifact.weights import write_weights
from lightning_ckmerge.core.layout import DTYPES
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import file_record
from lightning_ckmerge.tensorfiles.reader import StoredWeights
from tests.support.outcomes import LocalWeights

LARGE = 1 << 30


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def odd_weights() -> dict[str, Tensor]:
    """One tensor of every dtype, and the shapes and strides that trip writers."""
    generator = torch.Generator().manual_seed(0)
    weights = {str(d): torch.randint(0, 2, (3, 5), generator=generator).to(d) for d in DTYPES.values()}
    dense = torch.randn(6, 4, generator=generator)
    return {
        **weights,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "transposed": dense.t(),
        "strided": dense[::2, 1:3],
        'näme.with "quotes"': torch.tensor([float("nan"), -float("inf"), -0.0]),
        "parameter": torch.nn.Parameter(dense.clone()),
    }


@pytest.mark.parametrize("max_shard_size", [LARGE, 64])
def test_safetensors_reads_back_every_bit(tmp_path: Path, max_shard_size: int) -> None:
    weights = odd_weights()
    records = write_weights(tmp_path, LocalWeights(weights), max_shard_size)
    loaded: dict[str, Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        loaded.update(load_file(path))
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor.detach())
    assert records == {p.name: file_record(p) for p in tmp_path.iterdir()}


def test_mapped_tensors_are_aligned(tmp_path: Path) -> None:
    weights = {
        "a": torch.zeros(3, dtype=torch.int8),
        "b": torch.zeros(3),
        "c": torch.zeros(1).bfloat16(),
        "d": torch.ones(1),
    }
    write_weights(tmp_path, LocalWeights(weights), LARGE)
    stored = StoredWeights([tmp_path / "model.safetensors"])
    assert all(stored[name].data_ptr() % weights[name].element_size() == 0 for name in weights)


def test_shards_follow_hugging_face(tmp_path: Path) -> None:
    weights = {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.zeros(100)}
    write_weights(tmp_path, LocalWeights(weights), max_shard_size=80)
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], weights[name])
    assert all((tmp_path / name).stat().st_size < 80 + 400 for name in names[:-1])


@pytest.mark.parametrize("max_shard_size", [LARGE, 48])
def test_tied_weights_are_written_once_and_read_by_each_name(tmp_path: Path, max_shard_size: int) -> None:
    tied = torch.randn(4, 3)
    weights = {"wte.weight": tied, "body": torch.randn(12), "head.weight": tied, "other": tied.clone()}
    write_weights(tmp_path, LocalWeights(weights), max_shard_size)
    paths = sorted(tmp_path.glob("*.safetensors"))
    written = [name for path in paths for name in load_file(path)]
    assert sorted(written) == ["body", "head.weight", "other"]
    stored = StoredWeights(paths)
    assert {*stored} == weights.keys()
    assert len(stored) == 4
    for name, tensor in weights.items():
        assert torch.equal(stored[name], tensor)
        assert stored.spec(name).shape == tensor.shape
    metadata = [safe_open(path, framework="pt").metadata() for path in paths]
    assert {"wte.weight": "head.weight"}.items() <= {k: v for m in metadata for k, v in m.items()}.items()
    if len(paths) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["wte.weight"] == "head.weight"


def test_parts_of_one_memory_are_not_taken_for_tied(tmp_path: Path) -> None:
    """A merge may live in one flat buffer; goes red if tensors are compared by their storage."""
    flat = torch.arange(12.0)
    weights = {"a": flat[:6], "b": flat[6:], "c": flat[:6].view(2, 3), "d": flat[:4].view(2, 2).t(), "e": flat[:0]}
    write_weights(tmp_path, LocalWeights(weights), LARGE)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_tensor_that_safetensors_cannot_hold_is_named_before_a_file_is_begun(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'odd'"):
        write_weights(
            tmp_path, LocalWeights({"fine": torch.zeros(1), "odd": torch.zeros(2, dtype=torch.complex128)}), LARGE
        )
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="must be safetensors"):
        StoredWeights([tmp_path / "model.safetensors"])
