"""Which strategies are served, and what each refusal says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.utils.data import DataLoader

from lightning_ckmerge import SearchConfig
from lightning_ckmerge.errors import ConfigError, UnsupportedError
from lightning_ckmerge.plugin.strategies import SUPPORTED, check_supported
from tests.support.rank_runs import Classifier, fit, make_rank_merge, points, published, same_trail
from tests.support.ranks import RankPool


def trainer_with(strategy: Any) -> Any:
    """`check_supported` looks at nothing but the strategy; a Trainer would refuse some of these without a GPU."""
    return SimpleNamespace(strategy=strategy)


class OwnStrategy(Strategy):
    """Of somebody who knows where the tensors are; we do not."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def model_to_device(self) -> None: ...

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def barrier(self, name: str | None = None) -> None: ...


class OwnDDPStrategy(DDPStrategy):
    pass


@pytest.mark.parametrize(
    "strategy",
    [
        SingleDeviceStrategy("cpu"),
        DDPStrategy(),
        DDPStrategy(start_method="spawn", find_unused_parameters=True),
        OwnDDPStrategy(),
        ModelParallelStrategy(),
        FSDPStrategy(use_orig_params=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_served(strategy: Strategy) -> None:
    check_supported(trainer_with(strategy))


def test_fsdp1_serves_with_its_defaults() -> None:
    """Lightning keeps the original parameters unless told otherwise."""
    check_supported(trainer_with(FSDPStrategy()))


def refusal(strategy: Any, refine: Any = None) -> str:
    with pytest.raises(UnsupportedError) as caught:
        check_supported(trainer_with(strategy), refine)
    return str(caught.value)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy("cpu"), DDPStrategy(), OwnDDPStrategy()])
def test_gradients_are_served_where_the_model_is_whole(strategy: Strategy) -> None:
    check_supported(trainer_with(strategy), "gradient")


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy(use_orig_params=True)])
def test_gradients_are_refused_elsewhere(strategy: Strategy) -> None:
    assert refusal(strategy, "gradient").startswith("`search.refine` needs a strategy that holds the model whole")


def test_refusals_name_strategy_reason_and_what_works() -> None:
    own = refusal(OwnStrategy())
    assert "OwnStrategy" in own
    assert own.endswith(SUPPORTED)
    flattened = refusal(FSDPStrategy(use_orig_params=False))
    assert "FSDPStrategy" in flattened
    assert "use_orig_params=False" in flattened
    assert flattened.endswith(SUPPORTED)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(("stage", "is_served"), [(1, True), (2, True), (3, False)])
def test_deepspeed(stage: int, is_served: bool) -> None:
    strategy = DeepSpeedStrategy(stage=stage)
    if is_served:
        check_supported(trainer_with(strategy))
        assert "`search.refine`" in refusal(strategy, "gradient")
    else:
        assert f"stage {stage}" in refusal(strategy)


def test_a_refused_strategy_ends_fit_before_anything_is_spent(tmp_path: Path) -> None:
    module = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu", strategy=OwnStrategy(), logger=False, callbacks=[make_rank_merge(str(tmp_path))], max_steps=1
    )
    with pytest.raises(UnsupportedError, match="OwnStrategy"):
        trainer.fit(module, DataLoader(points(8)), DataLoader(points(8)))
    assert module.trail == []
    assert not (tmp_path / "merges").exists()


def test_ddp_with_one_rank(tmp_path: Path) -> None:
    run = fit("ddp", str(tmp_path), make_rank_merge(str(tmp_path)), devices=1)
    assert same_trail(run, fit("ddp", str(tmp_path), None, devices=1))
    assert len(published(tmp_path)) >= 2
    assert not list((tmp_path / "merges" / "buffer").glob("rank=*"))


def refused(root: str) -> tuple[str, bool]:
    merge = make_rank_merge(root, search=SearchConfig(storage="mysql://user:secret@server/studies"))
    with pytest.raises(ConfigError) as error:
        fit("ddp", root, merge)
    return str(error.value), (Path(root) / "merges").exists()


def test_a_storage_that_rank_zero_cannot_open_is_refused_on_all(ranks: RankPool, tmp_path: Path) -> None:
    """Before training, and without a word of the password. Goes red if a rank waits for one that has given up."""
    first, second = ranks.run(refused, str(tmp_path))
    assert first == second
    message, has_begun = first
    assert "mysql://...@server/studies: No module named 'MySQLdb'. Install that driver" in message
    assert not has_begun
