"""Arguments of another type: one line each, for every field of every config class and for the callback itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections import UserDict, UserList
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from lightning_ckmerge import CheckpointMergeCallback, Decay, Grouped, Pairwise, Window
from lightning_ckmerge.checks import FOREIGN
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, Constraint, EvaluationConfig, SearchConfig
from lightning_ckmerge.errors import ConfigError

SECTIONS: dict[str, Any] = {
    "buffer": BufferConfig,
    "search": SearchConfig,
    "evaluation": EvaluationConfig,
    "artifact": ArtifactConfig,
}
OWNERS: dict[str, Any] = {**SECTIONS, "search.constraints": Constraint, "": CheckpointMergeCallback}
SPACES = [Decay, Grouped, Pairwise, Window]
# What people write by mistake, each with the annotations that allow it.
MISTAKES: list[tuple[object, tuple[type, ...]]] = [
    ("ten", (str, Path)),
    (2.5, (float,)),
    (True, (bool,)),
    (object(), ()),
    (5, (int, float)),
    (["a", 3], ()),
    ({"x": 1}, ()),
    (b"x", ()),
]


def arguments() -> list[tuple[str, str, Any]]:
    found = []
    for section, owner in OWNERS.items():
        function = owner.__init__ if section == "" else owner
        hints = get_type_hints(function, localns=FOREIGN)
        found += [(section, name, hint) for name, hint in hints.items() if name != "return"]
    return found


def kinds(hint: Any) -> set[Any]:
    return {hint} | {kind for part in getattr(hint, "__args__", ()) for kind in kinds(part)}


def make(owner: Any, name: str, value: object) -> Any:
    needed = {"monitor": "a"} if owner is Constraint and name != "monitor" else {}
    return owner(**needed, **{name: value})


def test_an_unknown_argument_is_told_with_the_class_and_the_likeliest() -> None:
    with pytest.raises(TypeError, match=r"^CheckpointMergeCallback has no argument 'moniter'\. Did you mean 'monitor'"):
        CheckpointMergeCallback(moniter="val_loss")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Decay has no argument 'zzz'\. Its arguments are "):
        Decay(zzz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(("section", "name", "hint"), arguments(), ids=lambda p: p if isinstance(p, str) else "")
def test_any_other_type_is_one_line_with_the_arguments_name(section: str, name: str, hint: Any) -> None:
    dotted = f"{section}.{name}" if section else name
    for value, allowed_by in MISTAKES:
        if kinds(hint) & set(allowed_by):
            continue
        with pytest.raises(ConfigError) as caught:
            make(OWNERS[section], name, value)
        message = str(caught.value)
        assert message.startswith(f"`{dotted}"), message
        assert ", got " in message
        assert message.endswith((".", "?")), message
        assert "\n" not in message


@pytest.mark.parametrize("space", SPACES)
def test_the_arguments_of_spaces_are_checked_alike(space: Any) -> None:
    for name in inspect.signature(space).parameters:
        with pytest.raises(ConfigError, match=f"`{name}` must be"):
            space(**{name: object()})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"search": {"n_trials": "ten"}}, "`search.n_trials` must be a whole number, got 'ten'. The default is 16."),
        ({"every_n_train_steps": 2.5}, "`every_n_train_steps` must be a whole number, got 2.5. The default is None."),
        (
            {"artifact": {"formats": "ckpt"}},
            "`artifact.formats` must be a list, each one of safetensors, ckpt, hf, got 'ckpt'. Write ['ckpt'].",
        ),
        (
            {"train_time_interval": 5},
            "`train_time_interval` must be a timedelta, got 5. Write `timedelta(minutes=30)`; in YAML, '00:30:00'.",
        ),
        ({"search": {"n_trails": 3}}, "`search` must have the fields of SearchConfig, got 'n_trails'. Did you mean"),
        ({"buffer": {"colour": 3}}, "`buffer` must have the fields of BufferConfig, got 'colour'. Its fields are"),
        ({"buffer": None}, "`buffer` must be a BufferConfig or a mapping of its fields, got None. Leave it out"),
        ({"buffer": SearchConfig(n_trials=1)}, "`buffer` must be a BufferConfig or a mapping of its fields, got Sea"),
        ({"search": {"constraints": [{"allowance": 1}]}}, "`search.constraints` must name its `monitor`, got {'allo"),
        ({"search": {"constraints": [{"monitor": "a", "allow": 1}]}}, "`search.constraints` must have the fields of"),
        ({"search": {"constraints": [{"monitor": "a", "allowance": float("nan")}]}}, "`search.constraints.allowance"),
        ({"search": {"space": {"class_path": "lightning_ckmerge.Decay"}}}, "`search.space` must be one of grouped"),
        ({"search": {"sampler": "tpe"}}, "`search.sampler` must be a BaseSampler object, got 'tpe'."),
        ({"save_top_k": "1"}, "`save_top_k` must be a whole number, got '1'."),
        ({"monitor": None}, "`monitor` must be a text or a list, each a text, got None. The default is 'val_loss'."),
        ({"apply": "never"}, "`apply` must be one of emit, on_train_end, got 'never'. Check the spelling."),
    ],
    ids=lambda p: str(p)[:50],
)
def test_the_message_names_rule_value_and_remedy(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointMergeCallback(**wrong)
    assert str(caught.value).startswith(message), str(caught.value)


class Omega(UserDict[str, Any]):
    """Hydra hands over mappings and sequences of its own, nested."""


@pytest.mark.parametrize("mapping", [dict, Omega])
@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("buffer", "capacity", np.int64(4)),
        ("search", "timeout_s", np.float32(2.5)),
        ("evaluation", "staged", np.bool_(False)),
        ("artifact", "formats", UserList(["ckpt"])),
    ],
)
def test_a_mapping_is_the_config_class_that_it_names(
    mapping: Callable[..., Mapping[str, Any]], section: str, field: str, value: Any
) -> None:
    callback: Any = CheckpointMergeCallback(**{section: mapping({field: value})})
    built = getattr(callback.settings, section)
    assert isinstance(built, SECTIONS[section])
    found = getattr(built, field)
    assert found == (tuple(value) if isinstance(value, UserList) else value)
    assert type(found).__module__ == "builtins"
    assert built == dataclasses.replace(SECTIONS[section](), **{field: value})


def test_constraints_are_built_and_numbers_are_pythons() -> None:
    callback = CheckpointMergeCallback(
        monitor=("val_loss",),  # type: ignore[arg-type]
        every_n_train_steps=np.int32(7),  # type: ignore[arg-type]
        search=Omega(constraints=UserList([Omega(monitor="val_acc", allowance=1, mode="max")])),  # type: ignore[arg-type]
        dirpath=Path("merges"),
    )
    assert callback.settings.search.constraints == [Constraint(monitor="val_acc", allowance=1.0, mode="max")]
    assert type(callback.settings.triggers.every_n_train_steps) is int
    assert callback.settings.monitors == ["val_loss"]
    assert (
        CheckpointMergeCallback(train_time_interval=timedelta(hours=1)).settings.triggers.train_time_interval
        is not None
    )
