"""PEFT's adapters over ranks: shared out without their base, products gathered from their owners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_ckmerge import ArtifactConfig, BufferConfig, load_merged
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.checkpoints.rebuild import rebuild
from tests.support.rank_runs import Classifier, fit, make_rank_merge, points, same_trail
from tests.support.ranks import RankPool

peft: Any = pytest.importorskip("peft")


class Adapted(Classifier):
    def __init__(self) -> None:
        super().__init__(norm=False)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 2))
        self.net = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=["0", "2"]))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self.is_sharded:
            self.is_sharded = True
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def run(strategy: str, root: str, kind: Any) -> dict[str, Any]:
    merge = make_rank_merge(
        root,
        artifact=ArtifactConfig(adapters=kind, max_shard_size="600B"),
        buffer=BufferConfig(every_n_train_steps=2, snapshot="point"),
    )
    merged, baseline = (fit(strategy, root, callback, model=Adapted) for callback in (merge, None))
    paths = sorted(Path(root, "merges").glob("step=*"))
    if strategy == "ddp" and torch.distributed.get_rank() == 0:
        torch.save(merged.module.state_dict(), Path(root, "latest.pt"))
    return {"same": same_trail(merged, baseline), "paths": [str(p) for p in paths]}


@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "factors"), ("ddp", "products"), ("fsdp2", "factors")])
def test_two_ranks(ranks: RankPool, tmp_path: Path, strategy: str, kind: str) -> None:
    first, second = ranks.run(run, strategy, str(tmp_path), kind)
    assert first == second
    assert first["same"]
    names = {n for n in Adapted().state_dict() if "lora_" in n}
    held = {n.partition("[")[0] for f in (tmp_path / "merges" / "buffer").rglob("*.safetensors") for n in load_file(f)}
    assert held == names
    artifact = Artifact.open(first["paths"][-1])
    assert set(artifact.tensors()) == names
    module = Adapted()
    load_merged(artifact, module)
    manifest = artifact.manifest
    num_merged = sum(c != 0 for c in manifest["coefficients"])
    assert num_merged > 1
    rank = module.net.base_model.model[0].lora_A["default"].weight.shape[0]
    assert rank == (3 * num_merged if kind == "products" else 3)
    # What was evaluated is what was published.
    (winner,) = [t for t in (*manifest["anchors"], *manifest["trials"]) if t["name"] == manifest["verdict"]["winner"]]
    with torch.no_grad():
        loss = module.eval().loss(points(83)[:])
    assert winner["search"]["value"] == pytest.approx(float(loss), abs=1e-6)

    if strategy == "ddp":
        latest = torch.load(tmp_path / "latest.pt", weights_only=True)
        built = rebuild(artifact, tmp_path / "merges" / "buffer", latest)
        assert (built.num_compared, built.different) == (len(names), ())


def refusal(root: str) -> str:
    try:
        fit("fsdp2", root, make_rank_merge(root, artifact=ArtifactConfig(adapters="products")), model=Adapted)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_products_of_sharded_factors_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(refusal, str(tmp_path)):
        assert message.startswith('UnsupportedError: `artifact.adapters` "products" needs whole factors on every rank')
