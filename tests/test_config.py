"""Arguments: each wrong value gives one line of rule, value and remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import ArtifactConfig, BufferConfig, Constraint, EvaluationConfig, SearchConfig
from lightning_ckmerge.core.objectives import Objective, make_objectives
from lightning_ckmerge.core.spaces import Decay
from lightning_ckmerge.errors import CkmergeError, ConfigError

WRONG = [
    (BufferConfig, "capacity", 1, "`buffer.capacity >= 2`"),
    (BufferConfig, "layout", "linear", "`buffer.layout` must be one of geometric, uniform"),
    (BufferConfig, "every_n_train_steps", 0, "`buffer.every_n_train_steps >= 1`"),
    (BufferConfig, "snapshot", "ema", "`buffer.snapshot` must be one of mean, point"),
    (BufferConfig, "update_every_n_steps", 0, "`buffer.update_every_n_steps >= 1`"),
    (BufferConfig, "accumulate_on", "gpu", "`buffer.accumulate_on` must be one of device, host"),
    (BufferConfig, "storage", "gpu", "`buffer.storage` must be one of disk, cpu, device"),
    (BufferConfig, "dtype", "int8", "`buffer.dtype` must be one of float32, bfloat16, float16"),
    (BufferConfig, "bucket_size", "64", "`buffer.bucket_size` must be a positive number with a unit"),
    (SearchConfig, "space", "simplx", "`search.space` must be one of grouped, decay, pairwise"),
    (SearchConfig, "n_trials", 0, "`search.n_trials >= 1`"),
    (SearchConfig, "anchors", ("swa",), "`search.anchors` must be one of uniform, ema, wsm-linear"),
    (SearchConfig, "seed", -1, "`search.seed >= 0`"),
    (SearchConfig, "min_gain_left", -0.1, "`0 <= search.min_gain_left < 1`"),
    (SearchConfig, "min_gain_left", 1.0, "`0 <= search.min_gain_left < 1`"),
    (SearchConfig, "timeout_s", 0.0, "`search.timeout_s > 0`"),
    (SearchConfig, "timeout_s", math.nan, "`search.timeout_s > 0`"),
    (SearchConfig, "max_fraction_of_training", 0.0, "`0 < search.max_fraction_of_training <= 1`"),
    (SearchConfig, "max_fraction_of_training", 1.5, "`0 < search.max_fraction_of_training <= 1`"),
    (SearchConfig, "at_low_lr", "warn", "`search.at_low_lr` must be one of tail, skip, search"),
    (EvaluationConfig, "limit_batches", 1, "`evaluation.limit_batches >= 2`"),
    (EvaluationConfig, "limit_batches", 0.0, "`0 < evaluation.limit_batches <= 1`"),
    (EvaluationConfig, "limit_batches", 2.0, "`0 < evaluation.limit_batches <= 1`"),
    (EvaluationConfig, "confirm_fraction", 0.0, "`0 < evaluation.confirm_fraction < 1`"),
    (EvaluationConfig, "confirm_fraction", 1.0, "`0 < evaluation.confirm_fraction < 1`"),
    (EvaluationConfig, "confirm_fraction", math.nan, "`0 < evaluation.confirm_fraction < 1`"),
    (EvaluationConfig, "recalibrate_batches", -1, "`evaluation.recalibrate_batches >= 0`"),
    (ArtifactConfig, "adapters", "product", "`artifact.adapters` must be one of factors, products"),
    (SearchConfig, "refine", "newton", "`search.refine` must be one of gradient"),
    (SearchConfig, "where", "elsewhere", "`search.where` must be one of training, follower"),
    (EvaluationConfig, "cache_batches", -1, "`evaluation.cache_batches >= 0`"),
    (EvaluationConfig, "cache_batches", "64", "`evaluation.cache_batches` must be a positive number with a unit"),
    (ArtifactConfig, "formats", ("onnx",), "`artifact.formats` must be one of safetensors, ckpt"),
    (ArtifactConfig, "max_shard_size", "5", "`artifact.max_shard_size` must be a positive number with a unit"),
]
CONFIGS = [BufferConfig, SearchConfig, EvaluationConfig, ArtifactConfig]


@pytest.mark.parametrize(("config", "name", "value", "rule"), WRONG, ids=lambda p: str(p)[:40])
def test_a_wrong_value_gives_rule_value_and_remedy(
    config: Callable[..., Any], name: str, value: object, rule: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{name: value})
    message = str(caught.value)
    shown = value[0] if isinstance(value, tuple) else value
    got = f", got {shown!r}. "
    assert message.startswith(rule)
    assert got in message
    assert message.split(got)[1].endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("monitor", "mode", "rule"),
    [
        ([], "min", "`monitor` must name one metric or several different ones"),
        (["a", "a"], "min", "`monitor` must name one metric or several different ones"),
        (["a", "b"], ["min"], "`mode` must be one for all metrics of `monitor` or one for each, got 1 for 2"),
        ("a", ["min", "max"], "`mode` must be one for all metrics of `monitor` or one for each, got 2 for 1"),
        (["a", "b"], ["min", "less"], "`mode` must be one of min, max, got 'less'"),
    ],
)
def test_objectives_that_do_not_fit_are_refused(monitor: Any, mode: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_objectives(monitor, mode)
    assert str(caught.value).startswith(rule)


def test_one_mode_stands_for_all_metrics() -> None:
    assert make_objectives(["a", "b"], "max") == (Objective("a", "max"), Objective("b", "max"))
    assert make_objectives("a", "min") == (Objective("a", "min"),)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"allowance": -0.1}, "`search.constraints.allowance >= 0`"),
        ({"mode": "less"}, "`search.constraints.mode` must"),
    ],
)
def test_a_wrong_constraint_is_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Constraint(monitor="other", **wrong)
    assert str(caught.value).startswith(rule)


def test_every_argument_with_a_range_is_tested() -> None:
    """Goes red when one is added without a wrong value for it here."""
    free = {(SearchConfig, n) for n in ("sampler", "terminator", "constraints", "storage")}
    free |= {(BufferConfig, "dirpath"), *((EvaluationConfig, n) for n in ("dataloader", "staged"))}
    arguments = {(c, f.name) for c in CONFIGS for f in dataclasses.fields(c)}
    assert arguments - {(c, n) for c, n, _, _ in WRONG} == free


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_hold_and_stay(config: Callable[..., Any]) -> None:
    default = config()
    assert config(**vars(default)) == default
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.anything = 1
    with pytest.raises(TypeError):
        config(10)


def test_the_limits_of_ranges_are_allowed() -> None:
    assert EvaluationConfig(limit_batches=1.0).limit_batches == 1.0
    assert EvaluationConfig(limit_batches=2).limit_batches == 2
    assert [EvaluationConfig(cache_batches=size).cache_bytes for size in (0, "0", 7, "1KB")] == [0, 0, 7, 1000]
    assert SearchConfig(max_fraction_of_training=1.0, timeout_s=0.1).max_fraction_of_training == 1.0
    assert SearchConfig(max_fraction_of_training=None).max_fraction_of_training is None
    assert BufferConfig(capacity=2, every_n_train_steps=1, update_every_n_steps=1, dtype="bfloat16").capacity == 2
    assert isinstance(SearchConfig(space=Decay(ratio=2.0)).space, Decay)


def test_formats_from_yaml_are_a_tuple() -> None:
    assert ArtifactConfig(formats=["safetensors", "ckpt"]).formats == ("safetensors", "ckpt")


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("1B", 1),
        ("10KB", 10_000),
        ("10kb", 10_000),
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("2TB", 2_000_000_000_000),
        ("1KiB", 1024),
        ("1.5 MiB", 1_572_864),
        (" 2GiB ", 2_147_483_648),
        ("1TiB", 2**40),
        ("0.5GB", 500_000_000),
    ],
)
def test_sizes(size: str, num_bytes: int) -> None:
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0GB", "0.1B", "1e3MB", "5 GB or so", "5PB", "5,5GB", "5iB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(size, "artifact.max_shard_size")
    assert str(caught.value) == (
        f"`artifact.max_shard_size` must be a positive number with a unit, got {size!r}. Write it as '5GB' or '500MB'."
    )


@given(text=st.text(max_size=8))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 1


def test_a_config_error_is_ours_and_a_value_error() -> None:
    assert issubclass(ConfigError, CkmergeError)
    assert issubclass(ConfigError, ValueError)


def test_products_of_adapters_fit_no_checkpoint() -> None:
    with pytest.raises(ConfigError, match='Leave "ckpt" out'):
        ArtifactConfig(adapters="products", formats=("safetensors", "ckpt"))


def test_means_on_the_host_keep_snapshots_off_the_device() -> None:
    with pytest.raises(ConfigError, match=r'`buffer.accumulate_on` "host" keeps the device'):
        BufferConfig(accumulate_on="host", storage="device")
