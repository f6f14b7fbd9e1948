"""JSON and file names of unknown origin: the one place that reads them, within bounds, and with one kind of error each.

An artifact, a checkpoint or a buffer may come from anyone. Whatever a file holds, reading it ends in a value, in
``ValueError`` with the reason (``OSError`` where there is no file), or in ``ArtifactError`` for a name that leaves its
directory. The caller adds the rule and the remedy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from lightning_ckmerge.errors import ArtifactError

# A manifest of ten thousand tensors has about 2 MB, and the index of the largest model on the Hub 12 MB.
MAX_BYTES = 64 << 20
# Our own files nest less than ten deep. Whoever walks through what was read may call itself.
MAX_DEPTH = 32
# Beyond 64 bits a whole number is no count, and a float cannot hold it.
MAX_DIGITS = 20
MAX_NAME_BYTES = 255
SURROGATE = re.compile(r"[\ud800-\udfff]")
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, allow_nan: bool = False) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        max_bytes: Its greatest length.
        allow_nan: Whether NaN and infinities are numbers, as in Python's JSON.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is no JSON, or exceeds the bounds of this module.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), max_bytes=max_bytes, allow_nan=allow_nan)


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the contents of a file, which is no pipe and no device: reading one of these may never end.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is something else, or longer than ``max_bytes``, or its name is no name.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    return data


def parse_json(data: bytes | str, *, max_bytes: int = MAX_BYTES, allow_nan: bool = False) -> Any:
    """Return the value of a JSON document, of bounded size and depth.

    Args:
        data: The document, in UTF-8 where it is bytes.
        max_bytes: Its greatest length.
        allow_nan: Whether NaN and infinities are numbers, as in Python's JSON.

    Raises:
        ValueError: It is no JSON, nests deeper than ``MAX_DEPTH``, names a key twice (readers would disagree on its
            value), or holds a number or text that Python cannot work with.

    >>> parse_json(b'{"step": 3}')
    {'step': 3}
    >>> parse_json(b"[" * 100_000)
    Traceback (most recent call last):
        ...
    ValueError: it nests deeper than 32
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else bytes(data)
    if len(raw) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_int,
            parse_float=float if allow_nan else _float,
            parse_constant=None if allow_nan else _refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    if ESCAPED_SURROGATE.search(raw):
        _check_texts(value)
    return value


def inside(directory: Path, name: object) -> Path:
    """Return the path of the file ``name`` in ``directory``.

    Raises:
        ArtifactError: It is no name of a file, or the name, or a link on its way, leaves the directory.
    """
    if isinstance(name, str) and _is_name(name):
        path = directory / name
        try:
            if path.resolve().is_relative_to(directory.resolve()):
                return path
        except (OSError, RuntimeError):  # links in a circle
            pass
    raise ArtifactError(
        f"the files of an artifact must lie inside it, got {_shortened(name)} in {directory}. Do not use this "
        "artifact: it may have been tampered with."
    )


def to_int(text: str) -> int:
    """Return a whole number in decimal digits.

    Raises:
        ValueError: It is none, or beyond 64 bits.
    """
    return _int(text)


def _is_name(name: str) -> bool:
    """Whether every system can hold a relative name of this kind, below a directory."""
    if "\\" in name or PureWindowsPath(name).drive or any(ord(c) < 32 or ord(c) == 127 for c in name):
        return False
    if SURROGATE.search(name):
        return False
    parts = name.split("/")
    return not any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES for part in parts) and (
        len(parts) <= MAX_DEPTH
    )


def _shortened(name: object) -> str:
    text = repr(name) if isinstance(name, (str, int, float, bool, type(None))) else type(name).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for node in level if isinstance(node, (dict, list)) for item in _items(node)]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH}")


def _check_texts(value: Any) -> None:
    """Half a character can be neither printed nor written."""
    level = [value]
    while level:
        keys = [key for node in level if isinstance(node, dict) for key in node]
        if any(isinstance(text, str) and SURROGATE.search(text) for text in (*level, *keys)):
            raise ValueError("it holds half a character")
        level = [item for node in level if isinstance(node, (dict, list)) for item in _items(node)]


def _items(node: dict[str, Any] | list[Any]) -> Any:
    return node.values() if isinstance(node, dict) else node


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names a key twice")
    return found


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds a whole number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {_shortened(text)}, which no number can be")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
