"""All ranks write an artifact's files, which are those that one process would write."""

from __future__ import annotations

import errno
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_ckmerge import ArtifactConfig, EvaluationConfig, SearchConfig, load_merged
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.weights import write_weights
from lightning_ckmerge.checkpoints.rebuild import rebuild
from lightning_ckmerge.core.spaces import Decay, Grouped
from lightning_ckmerge.distributed.comm import Ranks
from lightning_ckmerge.distributed.gather import GatheredWeights, scatter
from lightning_ckmerge.errors import PeerError
from lightning_ckmerge.tensorfiles.writer import ShardWriter
from tests.support.outcomes import LocalWeights
from tests.support.rank_runs import Classifier, fit, make_rank_merge, points, published
from tests.support.ranks import RankPool

SHARD_SIZES = {"single": 10**9, "several": 3000}


def make_model(kind: str = "whole") -> nn.Module:
    """Odd shapes, tied weights, a buffer, an integer and a half-precision tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(97, 12), nn.Linear(12, 37), nn.BatchNorm1d(37), nn.Linear(37, 12).bfloat16(), nn.Linear(12, 97)
    )
    model[4].weight = model[0].weight
    model[2].running_mean.copy_(torch.arange(37.0))
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model[3], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class Counted:
    """Weights that know how many of their gathered tensors are alive."""

    def __init__(self, weights: GatheredWeights) -> None:
        self._weights = weights
        self.specs, self.aliases = weights.specs, weights.aliases
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def gather(self, name: str) -> Tensor:
        tensor = self._weights.gather(name)
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor


def write(kind: str, max_shard_size: int, directories: list[str]) -> tuple[int, dict[str, Any]]:
    comm = Ranks()
    weights = Counted(GatheredWeights(make_model(kind), comm))
    records = write_weights(Path(directories[comm.rank]), weights, max_shard_size, comm)
    comm.close()
    return weights.most, records


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.mark.parametrize("kind", ["whole", "fsdp2"])
@pytest.mark.parametrize("size", SHARD_SIZES)
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared disk", "node-local disks"])
def test_files_equal_those_of_one_process(
    ranks: RankPool, tmp_path: Path, kind: str, size: str, is_shared: bool
) -> None:
    alone, many = tmp_path / "alone", tmp_path / "many"
    alone.mkdir()
    many.mkdir()
    expected = write_weights(alone, LocalWeights(make_model().state_dict()), SHARD_SIZES[size])
    directories = [str(many), str(many if is_shared else tmp_path / "elsewhere")]
    for most, records in ranks.run(write, kind, SHARD_SIZES[size], directories):
        assert most == 1
        assert records == expected
    assert contents(many) == contents(alone)
    assert len(contents(many)) == (1 if size == "single" else 4)  # three shards and an index


def failing_write(directory: str) -> tuple[str, str]:
    """The disk of rank 1 is full in its second shard; it goes on gathering."""
    comm = Ranks()
    original, count = ShardWriter._append, 0

    def failing(self: Any, data: Any) -> None:
        nonlocal count
        count += 1
        if comm.rank == 1 and count == 4:
            raise OSError(errno.ENOSPC, "full")
        original(self, data)

    ShardWriter._append = failing  # type: ignore[method-assign]
    try:
        write_weights(Path(directory), GatheredWeights(make_model("fsdp2"), comm), 3000, comm)
    except OSError as error:
        comm.give_up(error)
        return type(error).__name__, comm.exchange("well")[0]
    except PeerError as error:
        return type(error).__name__, comm.exchange("well")[0]
    finally:
        ShardWriter._append = original  # type: ignore[method-assign]
        comm.close()
    return "nothing", ""


def test_a_full_disk_is_told_when_all_have_gathered(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(failing_write, str(tmp_path)) == [("PeerError", "well"), ("OSError", "well")]


def scattered(directory: str) -> bool:
    """Whole tensors into zeroed shards, and back."""
    comm = Ranks()
    model, expected = make_model("fsdp2"), make_model().state_dict()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    scatter(model, expected)
    weights = GatheredWeights(model, comm)
    same = all(torch.equal(weights.gather(name), expected[name]) for name in weights.specs)
    comm.close()
    return same


def test_whole_tensors_are_scattered(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(scattered, str(tmp_path)) == [True, True]


def trained(strategy: str, root: str) -> dict[str, Tensor]:
    artifact = ArtifactConfig(max_shard_size="600B", formats=("safetensors", "ckpt"))
    merge = make_rank_merge(root, artifact=artifact, search_on_train_end=False)
    run = fit(strategy, root, merge, model=partial(Classifier, norm=strategy == "ddp"))
    return {n: GatheredWeights(run.module, Ranks()).gather(n) for n in ("net.0.weight",)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_holds_the_same_weights(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    """FSDP2's is a directory, as its strategy saves checkpoints."""
    ranks.run(trained, strategy, str(tmp_path))
    [name] = set(published(tmp_path)) - {"step=000000012"}
    artifact = load_merged(tmp_path / "merges" / name, Classifier(norm=strategy == "ddp"))
    assert sum(n.startswith("model-") for n in artifact.manifest["files"]) >= 2
    merged = artifact.tensors()
    path = artifact.path / "model.ckpt"
    if strategy == "fsdp2":
        dcp_to_torch_save(path, tmp_path / "model.pt")
        path = tmp_path / "model.pt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state.keys() == set(merged)
    assert all(torch.equal(state[n], merged[n]) for n in state)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_merge_is_rebuilt_from_what_all_ranks_kept(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    """DDP's ranks keep rows of some parameters, and BatchNorm statistics of their own; FSDP2's keep their shards."""
    ranks.run(trained, strategy, str(tmp_path))
    artifact = Artifact.open(tmp_path / "merges" / "step=000000012")
    *files, latest = [s.get("files_sha256") for s in artifact.manifest["snapshots"]]
    assert [len(set(hashes)) for hashes in files] == [2] * len(files)
    assert latest is None
    built = rebuild(artifact, tmp_path / "merges" / "buffer")
    assert not built.different
    integers = [n for n in artifact.tensors() if n.endswith("num_batches_tracked")]
    assert list(built.not_compared) == integers
    assert built.num_compared == len(artifact.tensors()) - len(integers) > 0


def trained_in_groups(strategy: str, root: str) -> int:
    # Without the latest weights, which no buffer keeps, the snapshots suffice for a rebuild.
    space = Grouped(space=Decay(latest_share=0), groups={"weights": "weight$"}, along="tau", factors={"weights": 0.5})
    search = SearchConfig(
        space=space, anchors=[], n_trials=6, sampler=RandomSampler(seed=0), max_fraction_of_training=None
    )
    merge = make_rank_merge(root, search=search, search_on_train_end=False)
    return fit(strategy, root, merge, model=partial(Classifier, norm=strategy == "ddp")).trainer.global_step


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_groups_keep_their_coefficients_whichever_rank_holds_which_part(
    ranks: RankPool, tmp_path: Path, strategy: str
) -> None:
    ranks.run(trained_in_groups, strategy, str(tmp_path))
    artifact = Artifact.open(tmp_path / "merges" / "step=000000012")
    groups = artifact.manifest["groups"]
    assert groups["weights"]["coefficients"] != groups["other"]["coefficients"]
    assert not rebuild(artifact, tmp_path / "merges" / "buffer").different


class TwoMetrics(Classifier):
    """Logs the size of its outputs too, which pulls away from merges: they have a lower loss and smaller outputs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_size", self.net(self.norm(batch[0])).square().mean(), sync_dist=True)


def trained_by_two(strategy: str, root: str) -> int:
    space = Decay(latest_share=0)
    search = SearchConfig(space=space, max_fraction_of_training=None, n_trials=6, sampler=RandomSampler(seed=0))
    merge = make_rank_merge(
        root, monitor=["val_loss", "val_size"], mode=["min", "max"], search=search, search_on_train_end=False
    )
    return fit(strategy, root, merge, model=partial(TwoMetrics, norm=strategy == "ddp")).trainer.global_step


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_merges_of_a_pareto_front_are_written_by_all_ranks(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    ranks.run(trained_by_two, strategy, str(tmp_path))
    outer = Artifact.open(tmp_path / "merges" / "step=000000012")
    members = [Artifact.open(path) for path in sorted((outer.path / "front").iterdir())]
    assert members
    for artifact in (outer, *members):
        built = rebuild(artifact, tmp_path / "merges" / "buffer")
        assert built.num_compared > 0
        assert not built.different


def uploaded(strategy: str, root: str) -> list[str]:
    merge = make_rank_merge(root, dirpath=f"file://{root}/remote")
    run = fit(strategy, root, merge, model=partial(Classifier, norm=strategy == "ddp"), default_root_dir=root)
    left = [t.name for t in threading.enumerate() if t.name == "ckmerge-upload"]
    return [*left, str(run.trainer.global_step)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_rank_uploads_what_all_have_written(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    assert ranks.run(uploaded, strategy, str(tmp_path)) == [["12"], ["12"]]
    (staged,) = (tmp_path / "ckmerge").iterdir()
    local, remote = (Artifact.open(p / "step=000000012") for p in (staged, tmp_path / "remote"))
    assert len(local.manifest["files"]) > 3
    assert local.manifest == remote.manifest


def applied(strategy: str, root: str) -> dict[str, Tensor]:
    """Confirmed on half of the batches, so that the merge is accepted, and loaded into the module."""
    merge = make_rank_merge(root, apply="on_train_end", every_n_train_steps=None, evaluation=EvaluationConfig())
    val = DataLoader(points(643), batch_size=8)
    run = fit(strategy, root, merge, model=partial(Classifier, norm=strategy == "ddp"), max_epochs=4, val=val)
    comm = Ranks()
    weights = GatheredWeights(run.module, comm)
    found = {name: weights.gather(name).clone() for name in weights.specs}
    comm.close()
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_accepted_merge_is_applied_on_all_ranks(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    first, second = ranks.run(applied, strategy, str(tmp_path))
    artifact = Artifact.open(tmp_path / "merges" / "best")
    assert artifact.manifest["verdict"]["status"] == "accepted"
    merged = artifact.tensors()
    for found in (first, second):
        assert found.keys() == set(merged)
        assert all(torch.equal(found[n], merged[n]) for n in found)
