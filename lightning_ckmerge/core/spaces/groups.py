"""Which tensors share coefficients: groups by kind, by depth, or by the user's own patterns on tensors' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from lightning_ckmerge.checks import require_choice
from lightning_ckmerge.errors import ConfigError

GroupRule = Literal["kind", "depth"]

# The first pattern that matches a name decides: a norm inside an attention block is a norm.
KINDS = {
    "norms": r"norm|(^|[._])(ln|bn)(_?\w+)?\.",
    "head": r"(^|\.)(lm_head|head|classifier|unembed\w*)\.",
    "embeddings": r"embed|(^|[._])(wte|wpe|tok(en)?|pos(ition)?)(\.|_|$)|cls_token",
    "attention": r"att(n|ention)|query|key|value|qkv|(^|\.)([qkvo]_proj|out_proj|project|to_[qkv])\.",
    "mlp": r"mlp|ffn|feed_?forward|expert|intermediate|(^|\.)(fc\d*|c_fc|(gate|up|down)_proj|widen|shrink|output)\.",
}
OTHER = "other"
NUM_BANDS = 3


def assign_groups(names: Sequence[str], groups: GroupRule | Mapping[str, str]) -> dict[str, str]:
    """Return tensor name -> group.

    Args:
        names: The model's tensors.
        groups: ``kind``: embeddings, attention, mlp, norms, head, and other for the rest. ``depth``: three bands of
            layers, the first number in a name telling its layer, and other for tensors outside layers. Or group ->
            regular expression on the name, searched in this order; unmatched tensors are in ``other``.

    Raises:
        ConfigError: A pattern matches nothing.

    >>> assign_groups(["wte.weight", "h.0.attn.weight", "h.0.ln_1.weight"], "kind")
    {'wte.weight': 'embeddings', 'h.0.attn.weight': 'attention', 'h.0.ln_1.weight': 'norms'}
    """
    if groups == "depth":
        return _by_depth(names)
    if groups == "kind":
        return {name: _first_match(name, KINDS) for name in names}
    assert not isinstance(groups, str)
    found = {name: _first_match(name, groups) for name in names}
    for group, pattern in groups.items():
        if group not in found.values():
            raise ConfigError(
                f"each pattern of `groups` must match a tensor that no earlier one matches, got {pattern!r} for "
                f"{group!r}. The names are those of the module's `state_dict`, such as {names[0]!r}."
            )
    return found


def check_patterns(groups: GroupRule | Mapping[str, str]) -> None:
    """Raise ``ConfigError`` unless ``groups`` is a rule's name, or has regular expressions for patterns."""
    if isinstance(groups, str):
        require_choice("groups", groups, get_args(GroupRule))
        return
    for group, pattern in groups.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"`groups` must map names to regular expressions, got {pattern!r} for {group!r}: {error}. "
                "A plain part of the tensors' names, such as 'mlp', is one."
            ) from error


def check_members(groups: GroupRule | Mapping[str, str], named: Collection[str], argument: str) -> None:
    """Raise ``ConfigError`` unless each of the ``named`` groups may exist."""
    if groups == "kind":
        known = [*KINDS, OTHER]
    elif groups == "depth":
        known = [*(f"depth-{band}" for band in range(NUM_BANDS)), OTHER]
    else:
        known = [*groups, OTHER]
    for name in named:
        if name not in known:
            raise ConfigError(f"`{argument}` must name groups, got {name!r}. The groups are {', '.join(known)}.")


def describe_groups(group_of: Mapping[str, str]) -> str:
    """Return a line with the matches of each group.

    >>> describe_groups({"a.weight": "mlp", "b.weight": "mlp", "n.weight": "norms"})
    'mlp: 2 tensors, such as a.weight; norms: 1 tensor, such as n.weight'
    """
    members: dict[str, list[str]] = {}
    for name, group in group_of.items():
        members.setdefault(group, []).append(name)
    return "; ".join(
        f"{group}: {len(names)} tensor{'s' if len(names) > 1 else ''}, such as {names[0]}"
        for group, names in members.items()
    )


def _first_match(name: str, patterns: Mapping[str, str]) -> str:
    return next((group for group, pattern in patterns.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _by_depth(names: Sequence[str]) -> dict[str, str]:
    layers = {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}
    num_layers = max(layers.values(), default=0) + 1
    bands = min(NUM_BANDS, num_layers)
    return {name: f"depth-{layers[name] * bands // num_layers}" if name in layers else OTHER for name in names}
