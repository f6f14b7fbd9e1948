"""The PEFT adapters of the Trainer's module: how a search merges them, and the artifact's record of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_ckmerge.config import ArtifactConfig
from lightning_ckmerge.core.adapters import LoraPair, at_rank, peft_models, stack, trained_pairs
from lightning_ckmerge.core.outcome import Coefficients, counted
from lightning_ckmerge.distributed.comm import Comm
from lightning_ckmerge.distributed.gather import GatheredWeights
from lightning_ckmerge.errors import ConfigError, UnsupportedError

Load = Callable[[Coefficients], None]


def find_adapters(
    module: nn.Module, config: ArtifactConfig, comm: Comm, group_of: Mapping[str, str], *, is_sharded: bool
) -> Adapters | None:
    """Return the module's adapters, ``None`` if it has none. A collective.

    Arguments are those of ``Adapters``.

    Raises:
        ConfigError: They cannot be merged, or written, as ``config`` says.
        UnsupportedError: Products of sharded factors.
    """
    if peft_models(module):
        return Adapters(module, config, GatheredWeights(module, comm), group_of, is_sharded=is_sharded)
    if config.adapters == "products":
        trained_pairs(module)  # says that there are none
    return None


class Adapters:
    """The adapters of one run.

    Args:
        module: The LightningModule, which holds at least one model with adapters.
        config: The settings of the artifact.
        weights: The artifact's weights.
        group_of: Tensor name -> group, where coefficients differ between groups.
        is_sharded: Whether ranks hold parts of the factors.

    Raises:
        ConfigError: As ``find_adapters``.
        UnsupportedError: As ``find_adapters``.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ArtifactConfig,
        weights: GatheredWeights,
        group_of: Mapping[str, str],
        *,
        is_sharded: bool,
    ) -> None:
        self.merge = config.adapters
        self._left_out = weights.left_out
        if self.merge == "products" and is_sharded:
            raise UnsupportedError(
                '`artifact.adapters` "products" needs whole factors on every rank, got sharded ones. Use "factors", '
                "or a strategy that holds the model whole, such as `ddp`."
            )
        self._pairs = trained_pairs(module) if self.merge == "products" else []
        self._groups = _groups(module, self._pairs, group_of)
        models = peft_models(module)
        self._exported = _exported(*next(iter(models.items())), weights.specs) if len(models) == 1 else {}
        if "hf" in config.formats and not self._exported:
            raise ConfigError(
                f'`artifact.formats` with "hf" needs one model whose adapters PEFT can save, got {len(models)} models '
                "with adapters. Leave the format out, and use `load_merged` after training."
            )

    def describe(self, c: Coefficients) -> dict[str, Any]:
        """Return the manifest's entry for the adapters of a merge with these coefficients."""
        num_merged = len(counted(c))
        stacked = {pair.adapter for pair in self._pairs}
        exported = {
            adapter: {**parts, "config": {**parts["config"], **at_rank(parts["config"], num_merged)}}
            if adapter in stacked
            else parts
            for adapter, parts in self._exported.items()
        }
        return {"merge": self.merge, "left_out": self._left_out, "peft": exported}

    @contextlib.contextmanager
    def merging(self, load: Load, num_snapshots: int) -> Iterator[Load]:
        """Yield a writer of merges into the module, where factors may be of another rank meanwhile.

        Args:
            load: Averages all tensors, factors too, and makes the result visible on all ranks.
            num_snapshots: K.
        """
        if self.merge == "factors":
            yield load
            return
        originals = [pair.factors for pair in self._pairs]
        snapshots_K = [_factors_of(self._pairs, load, k, num_snapshots) for k in range(num_snapshots)]

        def restore() -> None:
            for pair, original in zip(self._pairs, originals, strict=True):
                pair.put(original)

        def load_products(c: Coefficients) -> None:
            restore()
            load(c)
            # The same snapshots in all groups, so that all layers have one rank, which the adapter's config can say.
            used = counted(c)
            for i, (pair, group) in enumerate(zip(self._pairs, self._groups, strict=True)):
                all_K = c[group] if isinstance(c, Mapping) else c
                c_K, (a_K, b_K) = [all_K[k] for k in used], zip(*(snapshots_K[k][i] for k in used), strict=True)
                pair.put((_parameter(stack("A", a_K, c_K)), _parameter(stack("B", b_K, c_K))))

        try:
            yield load_products
        finally:
            restore()


def _groups(module: nn.Module, pairs: Sequence[LoraPair], group_of: Mapping[str, str]) -> list[str]:
    """Return each pair's group; an empty text where coefficients do not differ between groups."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for pair in pairs:
        a, b = (names[id(factor)] for factor in pair.factors)
        if group_of.get(a) != group_of.get(b):
            raise ConfigError(
                f'`artifact.adapters` "products" needs both factors of a LoRA layer in one group of `search.space`, '
                f"got {a} in {group_of[a]!r} and {b} in {group_of[b]!r}. Write `groups` that match the layer's name, "
                'or use "factors".'
            )
        found.append(group_of.get(a, ""))
    return found


def _factors_of(pairs: Sequence[LoraPair], load: Load, k: int, num_snapshots: int) -> list[tuple[Any, Any]]:
    """Return copies of one snapshot's factors, whichever ranks own them."""
    load([float(i == k) for i in range(num_snapshots)])
    return [(a.detach().clone(), b.detach().clone()) for a, b in (pair.factors for pair in pairs)]


def _parameter(tensor: Any) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _exported(path: str, model: Any, names: Collection[str]) -> dict[str, Any]:
    """Return each adapter's config, and its tensors' names by their names in PEFT's files.

    Empty where PEFT saves something that is no tensor of the ``state_dict``, such as virtual tokens.
    """
    peft: Any = sys.modules["peft"]  # whose models there are
    prefix = f"{path}." if path else ""
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    # A model from `inject_adapter_in_model` lacks the PeftModel around it, which PEFT's files describe.
    inner = "" if hasattr(type(model), "peft_config") else "base_model.model."
    found = {}
    for adapter, config in model.peft_config.items():
        tensors = peft.get_peft_model_state_dict(
            model, state_dict=own, adapter_name=adapter, save_embedding_layers=False
        )
        if not all(isinstance(name, str) for name in tensors.values()):
            return {}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        found[adapter] = {
            "config": json.loads(json.dumps({**plain, "inference_mode": True})),
            "tensors": {f"{inner}{name}": full for name, full in tensors.items()},
        }
    return found
