"""Groups of tensors: what the built-in rules make of the names of well-known models."""

from __future__ import annotations

import pytest

from lightning_ckmerge.core.spaces import Grouped
from lightning_ckmerge.core.spaces.groups import assign_groups, describe_groups
from lightning_ckmerge.errors import ConfigError

KIND_OF = {
    # transformers: GPT-2, Llama, BERT, ViT
    "model.transformer.wte.weight": "embeddings",
    "model.transformer.wpe.weight": "embeddings",
    "model.transformer.h.0.ln_1.weight": "norms",
    "model.transformer.h.0.attn.c_proj.bias": "attention",
    "model.transformer.h.0.mlp.c_proj.weight": "mlp",
    "model.transformer.ln_f.bias": "norms",
    "model.embed_tokens.weight": "embeddings",
    "model.layers.11.self_attn.q_proj.weight": "attention",
    "model.layers.11.mlp.gate_proj.weight": "mlp",
    "model.layers.11.post_attention_layernorm.weight": "norms",
    "lm_head.weight": "head",
    "bert.encoder.layer.3.attention.output.dense.weight": "attention",
    "bert.encoder.layer.3.intermediate.dense.weight": "mlp",
    "bert.encoder.layer.3.output.dense.weight": "mlp",
    "vit.embeddings.cls_token": "embeddings",
    "classifier.weight": "head",
    # A convolutional network
    "conv1.weight": "other",
    "layer1.0.bn1.running_mean": "norms",
}


def test_kinds_are_told_by_the_names_of_well_known_models() -> None:
    assert assign_groups(list(KIND_OF), "kind") == KIND_OF


def test_depth_has_three_bands_and_what_lies_outside_layers() -> None:
    names = ["wte.weight", *(f"h.{i}.mlp.weight" for i in range(7))]
    bands = [assign_groups(names, "depth")[name] for name in names]
    assert bands == ["other", *["depth-0"] * 3, *["depth-1"] * 2, *["depth-2"] * 2]
    assert assign_groups(["h.0.w", "h.1.w", "b"], "depth") == {"h.0.w": "depth-0", "h.1.w": "depth-1", "b": "other"}


def test_of_own_patterns_the_first_match_counts() -> None:
    groups = {"first": r"^a\.", "rest": r"\.w$"}
    assert assign_groups(["a.w", "b.w", "b.v"], groups) == {"a.w": "first", "b.w": "rest", "b.v": "other"}
    assert describe_groups({"a.w": "first", "b.w": "rest"}) == (
        "first: 1 tensor, such as a.w; rest: 1 tensor, such as b.w"
    )


def test_a_pattern_that_matches_nothing_is_refused_with_a_name() -> None:
    with pytest.raises(ConfigError, match=r"'attn' for 'attention'.*such as 'a\.w'"):
        assign_groups(["a.w"], {"attention": "attn"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": {"a": "("}}, r"regular expressions, got '\(' for 'a'"),
        ({"groups": "layers"}, "one of kind, depth, got 'layers'"),
        ({"max_deviation": 1.5}, r"max_deviation <= 1.*got 1\.5"),
        ({"factors": {"mlp": 0.0}}, r"factors\.mlp > 0"),
        ({"groups": {"a": "x"}, "factors": {"b": 1.0}}, "must name groups, got 'b'. The groups are a, other"),
        ({"groups": "depth", "factors": {"mlp": 1.0}}, "got 'mlp'. The groups are depth-0, depth-1, depth-2, other"),
        ({"factors": {"mpl": 1.0}}, "got 'mpl'. The groups are norms, head, embeddings, attention, mlp, other"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grouped(**arguments)  # type: ignore[arg-type]
