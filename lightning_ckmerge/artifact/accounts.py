"""``explain.json`` and ``explain.html``: an account of a merge, beside its artifact's files and not among them.

An artifact's files are listed with their hashes when it is published, and never change. An account comes later, if at
all, and may be written anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.tensorfiles.durable import replace_text
from lightning_ckmerge.tensorfiles.untrusted import read_json

ACCOUNT_NAME = "explain.json"
PAGE_NAME = "explain.html"
SCHEMA_VERSION = 1
NEEDED = {"schema_version", "manifest_sha256", "complete", "monitor", "mode", "figures", "left_out", "points"}

KINDS: dict[str, type] = {"manifest_sha256": str, "monitor": str, "figures": dict, "left_out": object, "points": object}

Account = dict[str, Any]


def manifest_digest(artifact: Path) -> str:
    """Return the SHA-256 of an artifact's manifest, by which an account names what it is of."""
    return hashlib.sha256((artifact / MANIFEST_NAME).read_bytes()).hexdigest()


def write_account(artifact: Path, account: Account) -> Path:
    """Write ``explain.json`` beside an artifact's files in one rename, and return its path."""
    path = artifact / ACCOUNT_NAME
    replace_text(path, json.dumps(account, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_account(artifact: Path) -> Account | None:
    """Return an artifact's account; ``None`` if there is none, or it is of another artifact of this name.

    Raises:
        ArtifactError: It is damaged.
    """
    path = artifact / ACCOUNT_NAME
    if not path.is_file():
        return None
    try:
        account = read_json(path)
        missing = sorted(NEEDED - account.keys())
        if not all(isinstance(account[key], kind) for key, kind in KINDS.items() if key in account):
            raise ValueError("an entry of another type")
        if missing or account["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"no {missing[0]}" if missing else f"schema version {account['schema_version']}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(
            f"an account must be the {ACCOUNT_NAME} that `ckmerge explain` writes, got {path}: {error}. Remove it, and "
            "explain the artifact again."
        ) from error
    return dict(account) if account["manifest_sha256"] == manifest_digest(artifact) else None


def has_page(artifact: Path) -> bool:
    """Whether an artifact has the page of an account."""
    return (artifact / PAGE_NAME).is_file()
