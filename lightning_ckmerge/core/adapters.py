"""PEFT's adapters in a module: which weights they leave alone, and the exact merge of LoRA's products.

peft is not imported: its models and layers are known by the attributes that it documents for authors of adapters.

A LoRA layer adds ``s B A``, with a number ``s``. The average of the factors keeps their rank, but
``(sum_k c_k B_k) (sum_k c_k A_k)`` is not ``sum_k c_k B_k A_k``. The latter is
``[c_1 B_1 ... c_K B_K] [A_1; ...; A_K]``, a LoRA layer of rank ``K r``.

Letters: K snapshots, oldest first; r the rank of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ckmerge.errors import ConfigError

Side = Literal["A", "B"]
# Where a layer keeps its factors, and which of their dimensions is the rank.
SIDES: dict[str, Side] = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
RANK_DIM: dict[Side, int] = {"A": 0, "B": 1}
# DoRA fills the last one; it is known by its variant.
PLAIN_LORA = {*SIDES, "lora_magnitude_vector"}


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapter in one LoRA layer.

    Args:
        path: The layer's place in the module.
        adapter: The adapter's name.
        layer: PEFT's layer.
        holders: Of ``A`` and of ``B``: the module that has the factor as a parameter, and under which name.
    """

    path: str
    adapter: str
    layer: Any
    holders: tuple[tuple[nn.Module, str], tuple[nn.Module, str]]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``A`` and ``B`` as they are now."""
        a, b = (getattr(holder, key) for holder, key in self.holders)
        return a, b

    def put(self, factors: tuple[nn.Parameter, nn.Parameter]) -> None:
        """Put other parameters, of any rank, in the factors' place. Those that were there do not change."""
        for (holder, key), factor in zip(self.holders, factors, strict=True):
            holder._parameters[key] = factor


def peft_models(module: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost models that PEFT has put adapters into, by their place."""
    found: dict[str, nn.Module] = {}
    for path, submodule in module.named_modules():
        is_inside = any(p in ("", path) or path.startswith(f"{p}.") for p in found)
        if not is_inside and _has_adapters(submodule):
            found[path] = submodule
    return found


def frozen_base(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that PEFT has frozen, by name; tied ones under each of their names.

    Other frozen parameters are not among them, nor are frozen adapters: to need no gradient is not to stay constant. A
    teacher follows its student, and callbacks unfreeze layers. The base of adapters is meant to stay as it is.
    """
    found = {}
    for path, model in peft_models(module).items():
        adapters = {id(p) for p in _adapter_parameters(model)}
        for name, parameter in model.named_parameters(prefix=path, remove_duplicate=False):
            if not parameter.requires_grad and id(parameter) not in adapters:
                found[name] = parameter
    return found


def left_out(entries: Iterable[str], known: Collection[str], frozen: Collection[str]) -> list[str]:
    """Return which entries of a ``state_dict`` belong to the frozen base.

    Args:
        entries: The names in the ``state_dict``.
        known: Names of parameters and buffers.
        frozen: Names of the base's parameters.

    >>> left_out(["q.weight", "q.weight.absmax", "lora_A.weight"], ["q.weight", "lora_A.weight"], ["q.weight"])
    ['q.weight', 'q.weight.absmax']
    """
    # A quantised layer's entries beside its weight are no parameters.
    layers = tuple({f"{name.rpartition('.')[0]}." for name in frozen})
    return [n for n in entries if n in frozen or (n not in known and n.startswith(layers))]


def lora_pairs(module: nn.Module) -> list[LoraPair]:
    """Return the factors of all LoRA layers, one pair a layer and adapter."""
    found = []
    for path, layer in module.named_modules():
        if "lora_A" in getattr(type(layer), "adapter_layer_names", ()):
            parts: Any = layer
            found += [LoraPair(path, adapter, parts, _holders(parts, adapter)) for adapter in parts.r]
    return found


def trained_pairs(module: nn.Module) -> list[LoraPair]:
    """Return the pairs of the adapters that are being trained, all of whose layers compute plain ``s B A``.

    Raises:
        ConfigError: There are none, or a layer computes something else.
    """
    pairs = lora_pairs(module)
    trained = {p.adapter for p in pairs if any(f.requires_grad for f in p.factors)}
    if not trained:
        raise ConfigError(
            '`artifact.adapters` "products" needs LoRA layers of PEFT that are trained, got none in '
            f'{type(module).__name__}. Use "factors".'
        )
    chosen = [p for p in pairs if p.adapter in trained]
    for pair in chosen:
        if not _is_plain(pair):
            raise ConfigError(
                f'`artifact.adapters` "products" needs plain LoRA, got {type(pair.layer).__name__} at {pair.path!r} '
                'with a variant, experts or groups of its own. Use "factors".'
            )
    return chosen


@torch.no_grad()
def stack(side: Side, factors_K: Sequence[Tensor], c_K: Sequence[float]) -> Tensor:
    """Return one factor of ``sum_k c_k B_k A_k``: the snapshots' factors side by side, those of ``B`` weighted.

    A single snapshot with a coefficient of 1 comes out as it is.

    Args:
        side: Which factor.
        factors_K: K tensors ``(r, ...)`` of ``A``, or ``(out, r, ...)`` of ``B``, which are weighted in float32.
        c_K: K coefficients.

    >>> A_K, B_K = [torch.ones(1, 2), torch.eye(2)[:1]], [torch.ones(3, 1), torch.ones(3, 1)]
    >>> stack("B", B_K, [0.25, 0.75]) @ stack("A", A_K, [0.25, 0.75])
    tensor([[1.0000, 0.2500],
            [1.0000, 0.2500],
            [1.0000, 0.2500]])
    """
    if side == "B":
        factors_K = [_times(f, c) for f, c in zip(factors_K, c_K, strict=True)]
    return torch.cat(list(factors_K), RANK_DIM[side])


def side_of(name: str) -> Side | None:
    """Return which factor of a LoRA layer a tensor is, by its name; ``None``: it is none."""
    return next((SIDES[part] for part in name.split(".") if part in SIDES), None)


def fits(name: str, shape: tuple[int, ...], other: tuple[int, ...], *, at_any_rank: bool) -> bool:
    """Return whether two shapes of one tensor are equal; ``at_any_rank``: but for the rank, if it is a LoRA factor."""
    side = side_of(name) if at_any_rank else None
    if side is None or len(shape) != len(other):
        return shape == other
    return all(a == b for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if dim != RANK_DIM[side])


def at_rank(config: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Return the changes of a LoRA config at ``ratio`` times its rank and the same scaling.

    >>> at_rank({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}}, 3)
    {'r': 12, 'lora_alpha': 24, 'rank_pattern': {'q': 6}, 'alpha_pattern': {}}
    """

    def alpha(value: float) -> float:
        scaled = value * (ratio**0.5 if config.get("use_rslora") else ratio)
        return int(scaled) if float(scaled).is_integer() else scaled

    return {
        "r": round(config["r"] * ratio),
        "lora_alpha": alpha(config["lora_alpha"]),
        "rank_pattern": {k: round(v * ratio) for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: alpha(v) for k, v in (config.get("alpha_pattern") or {}).items()},
    }


@torch.no_grad()
def give_ranks(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give LoRA layers, and the configs that speak of them, the ranks of ``shapes`` at the same scaling.

    Args:
        module: Changed in place; the contents of factors of another rank are lost.
        shapes: Of factors, by name.
    """
    names = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
    ratios: dict[str, float] = {}
    for pair in lora_pairs(module):
        wanted = [shapes.get(names[id(f)], tuple(f.shape)) for f in pair.factors]
        old, new = pair.factors[0].shape[0], wanted[0][0]
        if old == new:
            continue
        for factor, shape in zip(pair.factors, wanted, strict=True):
            factor.data = factor.new_empty(shape)
        own = {key: getattr(pair.layer, key)[pair.adapter] for key in ("r", "lora_alpha", "use_rslora")}
        for key in ("r", "lora_alpha"):
            getattr(pair.layer, key)[pair.adapter] = at_rank(own, new / old)[key]
        ratios[pair.adapter] = new / old
    for model in peft_models(module).values():
        configs: Any = model.peft_config
        for adapter in ratios.keys() & configs.keys():
            for key, value in at_rank(vars(configs[adapter]), ratios[adapter]).items():
                setattr(configs[adapter], key, value)


def _times(factor: Tensor, c: float) -> Tensor:
    wide = torch.promote_types(factor.dtype, torch.float32)
    return (factor.to(wide) * c).to(factor.dtype)


def _has_adapters(module: nn.Module) -> bool:
    """Whether it is a PeftModel, or one that got adapters by ``inject_adapter_in_model`` and still has them."""
    is_peft_model = hasattr(type(module), "peft_config")
    # Not `hasattr` of the module: wrappers such as torch.compile's forward every attribute.
    configs = getattr(module, "peft_config") if is_peft_model or "peft_config" in vars(module) else None  # noqa: B009
    if not isinstance(configs, dict) or not all(hasattr(config, "peft_type") for config in configs.values()):
        return False
    return is_peft_model or next(_adapter_parameters(module), None) is not None


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for layer in model.modules():
        for attribute in getattr(type(layer), "adapter_layer_names", ()):
            part = attrgetter(attribute)(layer)
            yield from part.parameters() if isinstance(part, nn.Module) else ()


def _holders(layer: Any, adapter: str) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
    if adapter in layer.lora_embedding_A:
        return (layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)
    if isinstance(layer.lora_A, nn.ParameterDict):
        return (layer.lora_A, adapter), (layer.lora_B, adapter)
    return (layer.lora_A[adapter], "weight"), (layer.lora_B[adapter], "weight")


def _is_plain(pair: LoraPair) -> bool:
    layer, adapter = pair.layer, pair.adapter
    return (
        set(type(layer).adapter_layer_names) <= PLAIN_LORA
        and not getattr(layer, "lora_variant", {}).get(adapter)
        and not layer.use_dora.get(adapter)
        and getattr(layer, "num_experts", 1) == 1
        and getattr(layer.get_base_layer(), "groups", 1) == 1
    )
