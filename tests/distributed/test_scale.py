"""Many ranks with a tiny model: the protocol does not depend on two."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ckmerge.artifact.weights import write_weights
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.distributed.comm import Ranks, on_rank_zero
from lightning_ckmerge.distributed.gather import GatheredWeights
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.errors import PeerError
from tests.support.outcomes import LocalWeights
from tests.support.ranks import RankPool


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(501, 16), *(nn.Linear(16, 16) for _ in range(8)))


def protocol(directory: str) -> dict[str, Any]:
    """Own, merge, publish, write; then one rank fails, and all know it."""
    comm = Ranks()
    model, other = make_model(0), make_model(1)
    expected = {
        n: torch.lerp(a, b, 0.75)
        for (n, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    }
    ownership = Ownership(model, comm, 5000)
    owned = ownership.owned()
    with torch.no_grad():
        for mine, theirs in zip(owned, Ownership(other, comm).owned(), strict=True):
            merge_tensor(mine.tensor, [mine.tensor.clone(), theirs.tensor], [0.25, 0.75])
    ownership.publish()
    worst = max(float((tensor - expected[name]).abs().max()) for name, tensor in model.state_dict().items())
    records = write_weights(Path(directory), GatheredWeights(model, comm), 3000, comm)
    try:
        if comm.rank == comm.world_size - 1:
            comm.give_up(ValueError("boom"))
            heard = "boom"
        else:
            comm.exchange(None)
            heard = "nothing"
    except PeerError as error:
        heard = str(error)
    answer = on_rank_zero(comm, lambda: "still here")
    comm.close()
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    return {
        "bytes": sum(o.tensor.nbytes for o in owned),
        "worst": worst,
        "records": records,
        "heard": heard,
        "answer": answer,
        "digest": digest,
        "weights": model.state_dict() if comm.rank == 0 else None,
    }


@pytest.mark.parametrize("world_size", [8, 16])
def test_many_ranks(tmp_path: Path, world_size: int) -> None:
    many, alone = tmp_path / "many", tmp_path / "alone"
    many.mkdir()
    alone.mkdir()
    pool = RankPool(world_size)
    try:
        results = pool.run(protocol, str(many))
    finally:
        pool.stop()
    model_bytes = sum(p.nbytes for p in make_model(0).parameters())
    assert sum(r["bytes"] for r in results) == model_bytes
    assert max(r["bytes"] for r in results) <= 1.1 * model_bytes / world_size
    assert max(r["worst"] for r in results) < 1e-6
    assert len({r["digest"] for r in results}) == 1
    assert {r["answer"] for r in results} == {"still here"}
    assert {r["heard"] for r in results} == {
        "boom",
        f"rank {world_size - 1} failed: ValueError: boom. See rank {world_size - 1}'s log.",
    }
    # As many writers as shards, and the bytes of one process.
    expected = write_weights(alone, LocalWeights(results[0]["weights"]), 3000)
    assert all(r["records"] == expected for r in results)
    assert {p.name: p.read_bytes() for p in many.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}
