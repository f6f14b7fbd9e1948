from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ckmerge.core.adapters import (
    fits,
    frozen_base,
    give_ranks,
    left_out,
    lora_pairs,
    peft_models,
    stack,
    trained_pairs,
)
from lightning_ckmerge.errors import ConfigError

peft: Any = pytest.importorskip("peft")


class Net(nn.Module):
    """One layer of each kind that LoRA knows, a norm with statistics, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.linear = nn.Linear(32, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(ids).view(-1, 1, 4, 4)))
        result: Tensor = self.head(self.linear(x.flatten(1)))
        return result


def adapted(net: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    targets = ["embed", "conv", "linear"]
    config = {"r": 2, "lora_alpha": 6, "target_modules": targets, "modules_to_save": ["head"], **options}
    return peft.get_peft_model(net or fresh_net(), peft.LoraConfig(**config))


def randomise(module: nn.Module, seed: int) -> None:
    """Give all that is trained values of its own; LoRA's ``B`` begins at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))


@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_stacked_factors_multiply_to_the_sum_of_products(ranks: list[int], seed: int, data: st.DataObject) -> None:
    c_K = data.draw(st.lists(st.sampled_from([0.0, -0.3, 0.5, 1.0, 2.0]), min_size=len(ranks), max_size=len(ranks)))
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    a_K, b_K = [draw(r, 6) for r in ranks], [draw(5, r) for r in ranks]
    a, b = stack("A", a_K, c_K), stack("B", b_K, c_K)
    torch.testing.assert_close(b @ a, sum(c * y @ x for c, x, y in zip(c_K, a_K, b_K, strict=True)))
    assert a.shape[0] == sum(ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_snapshot_comes_out_bit_for_bit(dtype: torch.dtype) -> None:
    factors_K = [torch.randn(4, 3).to(dtype) for _ in range(3)]
    for side in ("A", "B"):
        assert torch.equal(stack(side, factors_K[1:2], [1.0]), factors_K[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_of_every_kind_take_the_stacked_factors(rslora: bool) -> None:
    """PEFT's own sum of the snapshots' deltas, layer by layer, is the delta of the stacked factors."""
    model, c_K = adapted(use_rslora=rslora), [0.5, -0.2, 0.7]
    pairs = trained_pairs(model)
    assert [p.path.rpartition(".")[2] for p in pairs] == ["embed", "conv", "linear"]
    snapshots_K, deltas_K = [], []
    for k in range(3):
        randomise(model, seed=k)
        snapshots_K.append([tuple(f.detach().clone() for f in p.factors) for p in pairs])
        deltas_K.append([p.layer.get_delta_weight("default").detach() for p in pairs])
    before = [p.factors for p in pairs]
    for i, pair in enumerate(pairs):
        a_K, b_K = zip(*(snapshot[i] for snapshot in snapshots_K), strict=True)
        pair.put((nn.Parameter(stack("A", a_K, c_K)), nn.Parameter(stack("B", b_K, c_K))))
        expected = sum(c * deltas[i] for c, deltas in zip(c_K, deltas_K, strict=True))
        torch.testing.assert_close(pair.layer.get_delta_weight("default").detach(), expected)
    model.eval()(torch.arange(6))
    for pair, original in zip(pairs, before, strict=True):
        pair.put(original)
        assert all(now is then for now, then in zip(pair.factors, original, strict=True))


def test_only_what_peft_froze_is_left_out() -> None:
    """Goes red if a frozen parameter beside the adapters, or a frozen adapter, is taken for the base."""
    holder = nn.ModuleDict({"lm": adapted(), "teacher": Net().requires_grad_(False)})
    own = dict(holder.named_parameters())
    kept = set(own) - set(frozen_base(holder))
    trained = {n for n, p in own.items() if p.requires_grad}
    assert len(trained) == 3 * 2 + 2
    assert kept == trained | {n for n in own if n.startswith("teacher.")}
    holder["lm"].requires_grad_(False)
    assert set(own) - set(frozen_base(holder)) == kept
    holder["lm"].requires_grad_(True)
    assert not frozen_base(holder)


def test_adapters_are_found_without_a_peft_model_around_them() -> None:
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["linear"]), Net())
    assert list(peft_models(net)) == [""]
    assert len(dict(net.named_parameters())) - len(frozen_base(net)) == 2
    plain = adapted().merge_and_unload()
    plain.head.requires_grad_(True)
    assert not frozen_base(plain)
    assert not peft_models(torch.nn.Linear(2, 2))


def test_a_quantised_layers_extras_are_left_out_with_it() -> None:
    names = ["q.base_layer.weight", "q.base_layer.weight.absmax", "q.base_layer.SCB", "q.lora_A.weight", "head.scale"]
    known = ["q.base_layer.weight", "q.lora_A.weight"]
    assert left_out(names, known, ["q.base_layer.weight"]) == names[:3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Net, "got none in Net"),
        (partial(adapted, use_dora=True, target_modules=["linear"]), "needs plain LoRA, got Linear at"),
        (lambda: adapted(Grouped(), target_modules=["conv"], modules_to_save=None), "needs plain LoRA, got Conv2d at"),
    ],
)
def test_products_of_anything_else_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained_pairs(make())


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, groups=2)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"conv": 4}, "alpha_pattern": {"conv": 5}}]
)
def test_a_model_of_another_rank_is_one_that_peft_saves_and_opens(tmp_path: Any, options: dict[str, Any]) -> None:
    """Goes red if the config keeps the old rank, or a scaling changes."""
    model = adapted(**options)
    scalings = [p.layer.scaling["default"] for p in lora_pairs(model)]
    names = {id(p): n for n, p in model.named_parameters()}
    wide = [[(3 * a.shape[0], *a.shape[1:]), (b.shape[0], 3 * b.shape[1], *b.shape[2:])] for a, b in factors_of(model)]
    shapes = {
        names[id(f)]: s for fs, ss in zip(factors_of(model), wide, strict=True) for f, s in zip(fs, ss, strict=True)
    }
    give_ranks(model, shapes)
    randomise(model, seed=5)
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(fresh_net(), tmp_path)
    ids = torch.arange(6)
    assert torch.equal(opened.eval()(ids), model.eval()(ids))
    assert [p.layer.scaling["default"] for p in lora_pairs(opened)] == pytest.approx(scalings)
    assert [tuple(tuple(f.shape) for f in fs) for fs in factors_of(opened)] == [tuple(map(tuple, ss)) for ss in wide]


def factors_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [p.factors for p in lora_pairs(model)]


def fresh_net() -> Net:
    """The base that ``adapted`` starts from."""
    torch.manual_seed(0)
    return Net()


def test_shapes_fit_at_any_rank_or_not_at_all() -> None:
    name = "q.lora_B.default.weight"
    assert fits(name, (5, 2), (5, 6), at_any_rank=True)
    assert not fits(name, (5, 2), (5, 6), at_any_rank=False)
    assert not fits(name, (5, 2), (4, 2), at_any_rank=True)
    assert not fits("q.weight", (5, 2), (5, 6), at_any_rank=True)
    assert fits("q.lora_A.default.weight", (2, 7), (6, 7), at_any_rank=True)
