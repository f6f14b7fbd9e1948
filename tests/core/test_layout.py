"""A snapshot's memory: every element once, in one order, whatever order the model names them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_ckmerge.core.layout import OwnedTensor, TensorLayout
from lightning_ckmerge.core.merge import merge_tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
owned_tensors = st.lists(
    st.builds(
        lambda name, shape, dtype: OwnedTensor(name=name, role="parameter", tensor=torch.empty(shape, dtype=dtype)),
        st.text("abz.09_", min_size=1),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([*DTYPES, torch.complex64]),
    ),
    max_size=8,
    unique_by=lambda o: o.name,
)


def owned(name: str, tensor: torch.Tensor) -> OwnedTensor:
    return OwnedTensor(name=name, role="parameter", tensor=tensor)


@given(tensors=owned_tensors, dtype=st.none() | st.sampled_from(DTYPES))
def test_slots_tile_the_memory(tensors: list[OwnedTensor], dtype: torch.dtype | None) -> None:
    layout = TensorLayout(tensors, dtype)
    assert sorted(s.name for s in layout.slots) == sorted(o.name for o in tensors)
    for stored, size in layout.sizes.items():
        slots = [s for s in layout.slots if s.dtype == stored]
        assert [s.offset for s in slots] == [sum(s.numel for s in slots[:i]) for i in range(len(slots))]
        assert size == sum(s.numel for s in slots)
    flats = layout.allocate()
    assert layout.num_bytes == sum(f.numel() * f.itemsize for f in flats.values())
    for slot, view in zip(layout.slots, layout.views(flats), strict=True):
        assert (tuple(view.shape), view.dtype, view.numel()) == (slot.shape, slot.dtype, slot.numel)


@given(tensors=owned_tensors, data=st.data())
def test_the_layout_does_not_depend_on_the_models_order(tensors: list[OwnedTensor], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(tensors))
    layout = TensorLayout(tensors)
    assert TensorLayout(shuffled).slots == layout.slots
    live = [o.data_ptr() for o in layout.order(tensors)]
    assert [o.data_ptr() for o in layout.order(shuffled)] == live


def test_memory_is_in_the_order_of_a_safetensors_file(tmp_path: Path) -> None:
    """So that a file's bytes are a snapshot's memory."""
    tensors = {
        "z": torch.arange(3.0),
        "a": torch.arange(4).bfloat16(),
        "m.weight": torch.arange(6, dtype=torch.float64).view(2, 3),
        "m.bias": torch.ones(2),
        "h": torch.ones(1, dtype=torch.float16),
    }
    layout = TensorLayout([owned(n, t) for n, t in tensors.items()])
    flats = layout.allocate()
    for view, slot in zip(layout.views(flats), layout.slots, strict=True):
        view.copy_(tensors[slot.name])
    save_file(tensors, tmp_path / "file.safetensors")
    body = (tmp_path / "file.safetensors").read_bytes()[-layout.num_bytes :]
    assert b"".join(f.view(torch.uint8).numpy().tobytes() for f in flats.values()) == body


def test_views_share_the_memory() -> None:
    layout = TensorLayout([owned("a", torch.empty(2)), owned("b", torch.empty(3))])
    flats = layout.allocate()
    for i, view in enumerate(layout.views(flats)):
        view.fill_(i)
    assert flats[torch.float32].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_float64_stays_float64(dtype: torch.dtype | None) -> None:
    layout = TensorLayout([owned("a", torch.empty(2, dtype=torch.float64)), owned("b", torch.empty(2).half())], dtype)
    assert {s.name: s.dtype for s in layout.slots} == {"a": torch.float64, "b": dtype or torch.float16}


def test_complex_tensors_are_merged_as_real_ones() -> None:
    live = torch.tensor([1 + 2j, 3 - 4j])
    tensors = [owned("phase", live)]
    layout = TensorLayout(tensors)
    assert layout.slots[0].shape == (2, 2)
    (target,) = layout.order(tensors)
    merge_tensor(target, [target.clone(), 3 * target], [0.5, 0.5])
    assert live.tolist() == [2 + 4j, 6 - 8j]
