"""Checks arguments against their own annotations, so that no field needs a type check of its own.

Equivalent values are converted to the annotated type: NumPy's numbers into Python's, any sequence into a list or tuple,
a mapping into the config class whose fields it names.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import operator
import os
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_ckmerge.errors import ConfigError

# Files that `torch.save` writes.
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

Function = TypeVar("Function", bound=Callable[..., Any])

# Classes of libraries that a config need not import. They are known by name, their subclasses too.
FOREIGN = {name: type(name, (), {}) for name in ("BaseSampler", "BaseTerminator")}
NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    timedelta: "a timedelta",
    type(None): "None",
}
# Nothing that an argument can be.
UNFIT = object()


def checked(section: str = "") -> Callable[[Function], Function]:
    """Return a decorator for ``__init__``: arguments must be as annotated, and arrive as annotated.

    Args:
        section: Prefix of the arguments' names in messages.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checking(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise _misnamed(function, signature, kwargs, error) from None
            hints = _hints(function)
            for name in bound.arguments.keys() & hints.keys():
                dotted = _dotted(section, name)
                default = signature.parameters[name].default
                bound.arguments[name] = check(dotted, bound.arguments[name], hints[name], default)
            return function(*bound.args, **bound.kwargs)

        return checking  # type: ignore[return-value]

    return decorate


def check_fields(config: Any, section: str = "") -> None:
    """Convert the fields of a frozen dataclass to their annotations.

    Args:
        config: The dataclass.
        section: Prefix of the fields' names in messages.

    Raises:
        ConfigError: One of them cannot be that.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = check(_dotted(section, field.name), getattr(config, field.name), hints[field.name], default)
        object.__setattr__(config, field.name, value)


def _misnamed(
    function: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError
) -> TypeError:
    """Return the error of a call whose arguments do not fit, with the class's name and the likeliest argument."""
    owner, known = function.__qualname__.split(".")[-2], [name for name in signature.parameters if name != "self"]
    unknown = next((name for name in kwargs if name not in known), None)
    if unknown is None:
        return TypeError(f"{owner}: {error}")
    return TypeError(f"{owner} has no argument {unknown!r}. {_nearest(unknown, known, 'arguments')}")


def _nearest(name: str, known: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Its {kind} are {', '.join(known)}."


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def build(config: Any, value: object, name: str) -> Any:
    """Return a config class's object, made of a mapping where ``value`` is one.

    >>> from lightning_ckmerge.config import BufferConfig
    >>> build(BufferConfig, {"capacity": 4}, "buffer").capacity
    4

    Raises:
        ConfigError: It is neither, or names a field that there is not.
    """
    if _is_a(value, config):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"`{name}` must be a {config.__name__} or a mapping of its fields, got {value!r}. Leave it out for the "
            "defaults."
        )
    fields = dataclasses.fields(config)
    names = [f.name for f in fields]
    for key in value:
        if key not in names:
            hint = _nearest(str(key), names, "fields")
            raise ConfigError(f"`{name}` must have the fields of {config.__name__}, got {key!r}. {hint}")
    for field in fields:
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"`{name}` must name its `{field.name}`, got {dict(value)}. Add it.")
    return config(**{str(key): item for key, item in value.items()})


def check(name: str, value: object, hint: Any, default: object = inspect.Parameter.empty) -> Any:
    """Return ``value`` as its annotation says.

    Args:
        name: The argument's dotted name, for messages.
        value: The given value.
        hint: The annotation.
        default: Its default.

    Raises:
        ConfigError: It cannot be that.
    """
    options = _options(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    for option in options:
        fit = _fit(name, value, option)
        if fit is not UNFIT:
            return fit
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if choices and isinstance(value, str):
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Check the spelling.")
    wanted = " or ".join(_described(option) for option in options if option is not type(None))
    raise ConfigError(f"`{name}` must be {wanted}, got {value!r}. {_remedy(value, options, default)}")


def parse_size(size: str, name: str = "size") -> int:
    """Turn ``"5GB"`` into bytes, as Hugging Face does: decimal units, ``GiB`` for binary ones.

    Raises:
        ConfigError: Not a positive number with a unit.

    >>> parse_size("5GB"), parse_size("1.5 MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B\s*", size, flags=re.IGNORECASE)
    power = "KMGT".index(match[2][0].upper()) + 1 if match and match[2] else 0
    base = 1024 if match and match[2] and match[2].lower().endswith("i") else 1000
    num_bytes = int(float(match[1]) * base**power) if match else 0
    if num_bytes < 1:
        raise ConfigError(
            f"`{name}` must be a positive number with a unit, got {size!r}. Write it as '5GB' or '500MB'."
        )
    return num_bytes


def require_at_least(name: str, value: float | None, low: float, remedy: str) -> None:
    """Raise ``ConfigError`` unless ``value`` is ``None`` or at least ``low``."""
    if value is not None and not value >= low:
        raise ConfigError(f"`{name} >= {low}` must hold, got {value}. {remedy}")


def require_positive(name: str, value: float | None, remedy: str) -> None:
    """Raise ``ConfigError`` unless ``value`` is ``None`` or greater than 0."""
    if value is not None and not value > 0:
        raise ConfigError(f"`{name} > 0` must hold, got {value}. {remedy}")


def require_fraction(name: str, value: float | None, remedy: str) -> None:
    """Raise ``ConfigError`` unless ``value`` is ``None`` or in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"`0 < {name} <= 1` must hold, got {value}. {remedy}")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Check the spelling.")


def _fit(name: str, value: Any, option: Any) -> Any:
    """Return ``value`` as one option of an annotation wants it; ``UNFIT`` if it is something else."""
    origin = get_origin(option)
    if option is Any:
        return value
    if origin is Literal:
        return value if isinstance(value, str) and value in get_args(option) else UNFIT
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return UNFIT
        return {key: check(f"{name}.{key}", item, get_args(option)[1]) for key, item in value.items()}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return UNFIT
        container = origin if origin in (list, tuple) else list
        return container(check(name, item, get_args(option)[0]) for item in value)
    if option is bool:
        return bool(value) if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") else UNFIT
    if option in (int, float):
        return _number(value, option)
    if option is Path:
        return value if isinstance(value, os.PathLike) else UNFIT
    if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
        return build(option, value, name)
    return value if _is_a(value, option) else UNFIT


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool):
        return UNFIT
    if isinstance(value, Integral):
        return operator.index(value)
    return float(value) if kind is float and isinstance(value, Real) else UNFIT


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the kinds of value that an annotation allows."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for part in get_args(hint) for option in _options(part))
    return (hint,)


def _is_a(value: object, kind: Any) -> bool:
    return any(cls is kind or cls.__name__ == kind.__name__ for cls in type(value).__mro__)


def _described(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(get_args(option))}"
    if get_args(option):
        return f"a list, each {' or '.join(map(_described, _options(get_args(option)[0])))}"
    return NAMES.get(option) or f"a {getattr(option, '__name__', option)} object"


def _remedy(value: object, options: Sequence[Any], default: object) -> str:
    if isinstance(value, str) and any(get_args(option) and get_origin(option) is not Literal for option in options):
        return f"Write [{value!r}]."
    if timedelta in options:
        return "Write `timedelta(minutes=30)`; in YAML, '00:30:00'."
    if isinstance(value, Mapping):
        return "Build the object first; in YAML, name its `class_path` and `init_args`."
    if default in (inspect.Parameter.empty, dataclasses.MISSING):
        return "Write it without quotes." if isinstance(value, str) else "Change it."
    simple = isinstance(default, (str, int, float, list, tuple, type(None)))
    return f"The default is {default!r}." if simple else "Leave it out for the default."


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, localns=FOREIGN)
