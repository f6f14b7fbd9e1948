"""Ownership on real gloo ranks: who keeps what, how a merge becomes visible, and at what cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.distributed.comm import Alone, Ranks
from lightning_ckmerge.distributed.ownership import Ownership, deal_out
from tests.support.ranks import RankPool


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(97, 12), nn.Linear(12, 37), nn.BatchNorm1d(37), nn.Linear(37, 3, bias=False))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 8)), min_size=1, max_size=12),
    world_size=st.integers(1, 5),
)
def test_every_row_has_one_owner(shapes: list[tuple[int, int]], world_size: int) -> None:
    tensors = [(f"t{i}", torch.empty(shape)) for i, shape in enumerate(shapes)]
    rows = [
        (p.name, r)
        for share in deal_out(tensors, world_size)
        for p in share
        for r in range(*(p.rows or (0, dict(tensors)[p.name].shape[0])))
    ]
    assert sorted(rows) == sorted((name, r) for name, t in tensors for r in range(t.shape[0]))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_shares_differ_by_less_than_a_tenth_of_the_mean(world_size: int) -> None:
    """A GPT-2 with one embedding of a third of all bytes, which must be cut."""
    tensors = [
        ("wte", torch.empty(50257, 64)),
        *((f"h{i}", torch.empty(256, 64)) for i in range(300)),
        ("s", torch.empty(())),
    ]
    shares = deal_out(tensors, world_size)
    sizes = [sum(p.of(dict(tensors)[p.name]).nbytes for p in share) for share in shares]
    assert max(sizes) <= 1.1 * sum(sizes) / world_size
    assert sum(sizes) == sum(t.nbytes for _, t in tensors)


def ddp_merge(bucket_bytes: int) -> dict[str, Any]:
    """Merge two models' replicated parameters: each rank half of them."""
    comm = Ranks()
    model, other = small_model(0), small_model(1)
    model[2].running_mean.fill_(float(comm.rank))  # ranks need not agree on BatchNorm statistics
    expected = {n: 0.25 * a + 0.75 * b for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True)}
    ownership = Ownership(model, comm, bucket_bytes)
    owned, others = ownership.owned(), Ownership(other, comm).owned()
    biggest = 0

    def counted(tensor: torch.Tensor, src: int) -> None:
        nonlocal biggest
        biggest = max(biggest, tensor.nbytes)
        original(tensor, src=src)

    original = dist.broadcast
    with torch.no_grad():
        for mine, theirs in zip(owned, others, strict=True):
            merge_tensor(mine.tensor, [mine.tensor.clone(), theirs.tensor], [0.25, 0.75])
        dist.broadcast = counted
        try:
            ownership.publish()
        finally:
            dist.broadcast = original
    worst = max(float((p - expected[n]).abs().max()) for n, p in model.named_parameters())
    parameter_bytes = sum(o.tensor.nbytes for o in owned if o.role == "parameter")
    comm.close()
    return {
        "worst": worst,
        "bytes": parameter_bytes,
        "all_bytes": sum(p.nbytes for p in model.parameters()),
        "biggest": biggest,
        "running_mean": float(model[2].running_mean.mean()),
        "weights": torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
    }


@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
def test_replicated_parameters_are_merged_by_their_owners_and_visible_everywhere(
    ranks: RankPool, bucket_bytes: int
) -> None:
    results = ranks.run(ddp_merge, bucket_bytes)
    for rank, result in enumerate(results):
        assert result["worst"] < 1e-6
        assert result["bytes"] <= 1.1 * result["all_bytes"] / 2
        assert result["biggest"] <= bucket_bytes
        assert result["running_mean"] == 0.25 * rank + 0.75 * 0.0  # its own, not rank 0's
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert sum(r["bytes"] for r in results) == results[0]["all_bytes"]


def shard(kind: str, model: nn.Module) -> nn.Module:
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    return model


def sharded_model(kind: str, seed: int) -> nn.Module:
    """Dimensions that two ranks cannot share evenly (37, 97), but for tensor parallelism."""
    torch.manual_seed(seed)
    width = 37 if kind == "fsdp2" else 36
    model = nn.Sequential(nn.Embedding(97, 12), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3, bias=False))
    return model


def sharded_merge(kind: str) -> dict[str, Any]:
    comm = Ranks()
    plain, other = sharded_model(kind, 0), sharded_model(kind, 1)
    expected = {
        n: torch.lerp(a, b, 0.75).detach()
        for (n, a), b in zip(plain.named_parameters(), other.parameters(), strict=True)
    }
    model, others = shard(kind, sharded_model(kind, 0)), shard(kind, sharded_model(kind, 1))
    # A forward pass without gradients leaves FSDP2's root gathered: writes would go to the wrong tensors.
    with torch.no_grad():
        model(torch.arange(5))
        others(torch.arange(5))
    ownership, theirs = Ownership(model, comm), Ownership(others, comm)
    ownership.settle()
    with CommDebugMode() as comms, torch.no_grad():
        for mine, its in zip(ownership.owned(), theirs.owned(), strict=True):
            merge_tensor(mine.tensor, [mine.tensor.clone(), its.tensor], [0.25, 0.75])
        ownership.publish()
    model(torch.arange(5))
    ownership.settle()
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    worst = max(float((full[n] - expected[n]).abs().max()) for n in expected)
    names = [o.name for o in ownership.owned()]
    comm.close()
    return {"collectives": comms.get_total_counts(), "worst": worst, "names": names}


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_a_merge_of_shards_needs_no_collective(ranks: RankPool, kind: str) -> None:
    first, second = ranks.run(sharded_merge, kind)
    assert first["collectives"] == second["collectives"] == 0
    assert max(first["worst"], second["worst"]) < 1e-6
    assert first["names"] != second["names"]  # parts are named by their place in the whole


def uneven_parts() -> list[tuple[str, tuple[int, ...]]]:
    comm = Ranks()
    model = shard("fsdp2", sharded_model("fsdp2", 0))
    parts = [(o.name, tuple(o.tensor.shape)) for o in Ownership(model, comm).owned()]
    comm.close()
    return parts


def test_uneven_shards_are_named_by_their_true_place(ranks: RankPool) -> None:
    """`DTensor.from_local` would take the whole for local x 2: 98 rows instead of 97."""
    first, second = ranks.run(uneven_parts)
    assert ("0.weight[0:49,0:12]", (49, 12)) in first
    assert ("0.weight[49:97,0:12]", (48, 12)) in second


def test_a_process_alone_owns_everything_once() -> None:
    model = small_model()
    tied = nn.Sequential(model, model[1])
    owned = Ownership(tied, Alone()).owned()
    expected = {n for n, _ in tied.named_parameters()} | {"0.2.running_mean", "0.2.running_var"}
    assert sorted(o.name for o in owned) == sorted(expected)
    assert TensorLayout(owned).num_bytes == sum(p.nbytes for p in tied.parameters()) + 2 * 37 * 4
    assert all(o.tensor.data_ptr() == dict(tied.named_parameters())[o.name].data_ptr() for o in owned[:2])
