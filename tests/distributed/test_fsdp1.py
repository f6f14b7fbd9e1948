"""FSDP1 with the original parameters, as far as torch runs it without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.distributed.comm import Ranks
from lightning_ckmerge.distributed.gather import GatheredWeights, scatter
from lightning_ckmerge.distributed.ownership import Ownership
from tests.support.ranks import RankPool


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.BatchNorm1d(33), nn.Linear(33, 3))


def wrap(model: nn.Module, sharding: str) -> nn.Module:
    options: dict[str, Any] = {"sharding_strategy": ShardingStrategy[sharding]}
    if sharding == "HYBRID_SHARD":
        options["device_mesh"] = init_device_mesh("cpu", (2, 1))
    policy = ModuleWrapPolicy({nn.Linear})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device, **options)


def merged(sharding: str) -> dict[str, Any]:
    comm = Ranks()
    plain, others = make_model(0), make_model(1)
    expected = {
        n: torch.lerp(a, b, 0.75) if a.is_floating_point() else a.clone()
        for (n, a), b in zip(plain.state_dict().items(), others.state_dict().values(), strict=True)
    }
    model, other = wrap(make_model(0), sharding), wrap(make_model(1), sharding)
    ownership = Ownership(model, comm)
    owned, theirs = ownership.owned(), Ownership(other, comm).owned()
    with torch.no_grad():
        for mine, its in zip(owned, theirs, strict=True):
            merge_tensor(mine.tensor, [mine.tensor.clone(), its.tensor], [0.25, 0.75])
    ownership.publish()
    weights = GatheredWeights(model, comm)
    found = {name: weights.gather(name).clone() for name in weights.specs}
    worst = max(float((found[n].float() - expected[n].float()).abs().max()) for n in expected)
    # What the wrapped model computes with is what was gathered.
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    plain.load_state_dict(found)
    with torch.no_grad():
        same_output = torch.equal(model.eval()(x), plain.eval()(x))
    scatter(model, expected)
    back = all(torch.equal(weights.gather(n), expected[n]) for n in expected)
    comm.close()
    return {
        "worst": worst,
        "names": sorted(found),
        "parts": {o.name for o in owned if o.role == "parameter"},
        "bytes": TensorLayout([o for o in owned if o.role == "parameter"]).num_bytes,
        "same_output": same_output,
        "back": back,
    }


@pytest.mark.parametrize("sharding", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_flat_shards_are_merged_in_place(ranks: RankPool, sharding: str) -> None:
    results = ranks.run(merged, sharding)
    parameters = make_model(0)
    model_bytes = sum(p.nbytes for p in parameters.parameters())
    for result in results:
        assert result["worst"] < 1e-6
        assert result["names"] == sorted(parameters.state_dict())
        assert result["same_output"]
        assert result["back"]
    assert sum(r["bytes"] for r in results) == model_bytes
    assert not results[0]["parts"] & results[1]["parts"]
