"""Directories of artifacts behind a URL, wherever fsspec reaches: how they are read.

A reader works on a local copy. Records and reports are copied when a URL is named, and again when they have changed;
what is large, such as weights, when somebody asks for it. Every file of an artifact is checked against its manifest, as
those of a local one are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
from lightning_ckmerge.artifact.runs import BEST_NAME, POINTER_NAME
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import replace_json, replacing, temporary
from lightning_ckmerge.tensorfiles.untrusted import inside, read_json

# `Path` makes `s3:/` of `s3://`. One letter before the colon is a drive.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:[:/]")
# The part of a URL at which a directory of runs ends.
BELOW_RUN = re.compile(rf"step=.*|run=\d+|{BEST_NAME}|{re.escape(POINTER_NAME)}")
PENDING_NAME = ".pending.json"
CACHE_VARIABLE = "CKMERGE_CACHE"
# These are copied at once, unless they are larger than anything of ours.
RECORD_SUFFIXES = {".json", ".jsonl", ".html", ".md", ".png"}
MAX_RECORD_BYTES = 1 << 26
# An artifact of a Pareto front lies two directories below its search's, which lies in a run's, in a directory of runs.
MAX_PARENTS = 5


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, be it one that ``Path`` has shortened.

    >>> [is_url(p) for p in ("s3://bucket/run", Path("gs://bucket"), "simplecache::s3://b", "runs/gpt", "C:/runs")]
    [True, True, True, False, False]
    """
    return URL.match(os.fspath(path)) is not None


def as_url(path: str | os.PathLike[str]) -> str:
    """Return a URL as it was before ``Path`` shortened it, without a slash at its end.

    >>> as_url(Path("s3://bucket/run")), as_url(Path("file:///runs")), as_url("memory://run/")
    ('s3://bucket/run', 'file:///runs', 'memory://run')
    """
    text = re.sub(r"(?<=\w):/(?!/)", "://", os.fspath(path)).rstrip("/")
    return re.sub(r"\bfile://(?!/)", "file:///", text)


def open_url(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there.

    Raises:
        ImportError: The package that knows this kind of URL is not installed.
        ValueError: There is no such kind.
    """
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(url)
    return fs, str(path).rstrip("/")


def local_copy(path: str | os.PathLike[str]) -> Path:
    """Return a local path that stands for ``path``: itself, or a copy of the directory at a URL.

    Args:
        path: An artifact, a run's ``best`` or a directory of runs, local or at a URL.

    Returns:
        A path below the cache: that of the environment variable ``CKMERGE_CACHE``, else ``lightning-ckmerge`` in the
        user's own.

    Raises:
        ArtifactError: Nothing is there, or it cannot be read.
    """
    if not is_url(path):
        return Path(path)
    parts = as_url(path).split("/")
    end = next((i for i, part in enumerate(parts) if i > 2 and BELOW_RUN.fullmatch(part)), len(parts))
    url = "/".join(parts[:end])
    with _reading(url):
        base = _mirror(url)
    return base.joinpath(*parts[end:])


def address(path: Path) -> str:
    """Return what people know a path by: the URL that it is a copy of, or itself.

    >>> address(Path("runs/merges"))
    'runs/merges'
    """
    base, found = _pending(path)
    if "url" not in found:
        return str(path)
    return "/".join([found["url"].rstrip("/"), *path.relative_to(base).parts])


def fetch_pending(directory: Path) -> None:
    """Copy what ``local_copy`` has left at the URL, of an artifact or of any directory; nothing where it was no URL.

    Raises:
        ArtifactError: It cannot be read.
    """
    base, pending = _pending(directory)
    names = [name for name in pending.get("files", {}) if (base / name).is_relative_to(directory)]
    if not names:
        return
    with _reading(pending["url"]):
        fs, root = open_url(pending["url"])
        for name in names:
            _copy(fs, f"{root}/{name}", inside(base, name))
    left = {name: size for name, size in pending["files"].items() if name not in names}
    replace_json(base / PENDING_NAME, {**pending, "files": left})


def pending_sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of each file of an artifact that is still at the URL alone, by its name there."""
    base, pending = _pending(directory)
    below = {base / name: size for name, size in pending.get("files", {}).items()}
    return {p.relative_to(directory).as_posix(): size for p, size in below.items() if p.is_relative_to(directory)}


def _mirror(url: str) -> Path:
    """Bring the copy of a directory of runs up to date."""
    fs, root = open_url(url)
    fs.invalidate_cache()
    sizes = {name.removeprefix(root).lstrip("/"): int(entry["size"]) for name, entry in _find(fs, root).items()}
    if not sizes:
        raise FileNotFoundError("there is no such directory, or nothing in it")
    base = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / PurePosixPath(root).name
    base.mkdir(parents=True, exist_ok=True)
    unchanged = _drop_outdated(fs, root, base, sizes)
    pending = {}
    for name, size in sizes.items():
        path = inside(base, name)
        if path.is_file() and path.stat().st_size == size and any(map(path.is_relative_to, unchanged)):
            continue
        if path.suffix in RECORD_SUFFIXES and size <= MAX_RECORD_BYTES:
            _copy(fs, f"{root}/{name}", path)
        else:
            pending[name] = size
    replace_json(base / PENDING_NAME, {"url": url, "files": pending})
    return base


def _find(fs: Any, root: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = fs.find(root, detail=True)
    return found


def _drop_outdated(fs: Any, root: str, base: Path, sizes: Mapping[str, int]) -> list[Path]:
    """Remove copies of what is there no more, or is another by now; return the artifacts that are as they were."""
    unchanged = []
    for manifest in sorted(base.rglob(MANIFEST_NAME)):
        name = manifest.relative_to(base).as_posix()
        if name in sizes and fs.cat_file(f"{root}/{name}") == manifest.read_bytes():
            unchanged.append(manifest.parent)
        else:
            shutil.rmtree(manifest.parent, ignore_errors=True)
    for path in sorted(base.rglob("*")):
        if path.is_file() and path.relative_to(base).as_posix() not in sizes:
            path.unlink()
    return unchanged


def _copy(fs: Any, remote: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, temporary(path.parent, path.name)) as staged:
        fs.get_file(remote, str(staged))


def _pending(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the copy that a directory lies in, and its record of what has not been copied."""
    for base in (directory, *directory.parents[:MAX_PARENTS]):
        with contextlib.suppress(OSError, ValueError):
            found = read_json(base / PENDING_NAME)
            if isinstance(found, dict):
                return base, found
    return directory, {}


def _cache() -> Path:
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-ckmerge"


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise ArtifactError(
            f"artifacts at a URL must be readable, got {type(error).__name__} for {url}: {error}. Check the address, "
            "its credentials, and that the package for it is installed, such as s3fs."
        ) from error
