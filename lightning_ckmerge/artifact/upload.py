"""Directories of artifacts behind a URL: how a run's own gets there, behind training.

The run writes to a local directory, and a thread brings the directory at the URL to the same state. An artifact's
manifest is written last and removed first, so that a reader never takes a part for the whole.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.load import ARTIFACT_NAME, best_target
from lightning_ckmerge.artifact.manifest import MANIFEST_NAME
from lightning_ckmerge.artifact.remote import open_url
from lightning_ckmerge.artifact.runs import POINTER_NAME, RUN_NAME
from lightning_ckmerge.artifact.standing import STANDING_NAME
from lightning_ckmerge.artifact.timeline import TIMELINE_NAME
from lightning_ckmerge.errors import explain
from lightning_ckmerge.tensorfiles.durable import list_files
from lightning_ckmerge.tensorfiles.untrusted import inside, parse_json

# Beside artifacts; each is replaced as a whole.
RUN_FILES = (TIMELINE_NAME, STANDING_NAME, "report.html", "report.md", "study.journal", RUN_NAME)
# Seconds before each attempt.
PAUSES_S = (0.0, 1.0, 4.0, 16.0)
PROBE_NAME = ".ckmerge-probe"


def find_remote_fault(url: str) -> str | None:
    """Say why nothing can be written to a URL, by trying; nothing is left behind."""
    try:
        fs, root = open_url(url)
        fs.makedirs(root, exist_ok=True)
        probe = f"{root}/{PROBE_NAME}-{uuid.uuid4().hex}"  # another run may begin at the same time
        fs.pipe_file(probe, b"")
        fs.rm_file(probe)
    except Exception as error:  # each file system has errors of its own
        return (
            f"`dirpath` must be a directory or URL that can be written to, got {url}: {explain(error)}. Name another "
            "one, check its credentials, or install the package for it, such as s3fs."
        )
    return None


def claim_url(url: str, run_id: str) -> str:
    """Return the URL of a run's own directory: ``url`` or, if that is another run's, ``url/run=2`` and so on.

    No lock holds it: two runs that begin in the same moment may both take it, unless the URL names what is theirs.
    """
    fs, root = open_url(url)
    fs.invalidate_cache()
    number = 1
    while True:
        place = root if number == 1 else f"{root}/run={number}"
        owner = _owner(fs, place)
        if owner is None:
            fs.makedirs(place, exist_ok=True)
            fs.pipe_file(
                f"{place}/{RUN_NAME}", json.dumps({"run_id": run_id, "started": 0.0, "resumable": True}).encode()
            )
            owner = _owner(fs, place)
        if owner == run_id:
            return url if number == 1 else f"{url}/run={number}"
        number += 1


def _owner(fs: Any, place: str) -> str | None:
    """Return the run that a directory belongs to; of an unknown one, an empty name; ``None``: nobody's."""
    try:
        return str(parse_json(fs.cat_file(f"{place}/{RUN_NAME}"))["run_id"])
    except FileNotFoundError:
        return "" if fs.exists(f"{place}/{TIMELINE_NAME}") else None
    except (ValueError, TypeError, KeyError):
        return ""


def bring_back(url: str, dirpath: Path) -> bool:
    """Copy a run's directory from its URL where the local one has been lost; return whether it was.

    Raises:
        ArtifactError: A name at the URL would lead out of the directory.
    """
    fs, root = open_url(url)
    if (dirpath / TIMELINE_NAME).exists() or not fs.exists(f"{root}/{TIMELINE_NAME}"):
        return False
    names = [name.removeprefix(root).lstrip("/") for name in fs.find(root)]
    # A later run's directory may lie below; the timeline comes last, so that a copy that is stopped begins anew.
    own = [n for n in names if n.partition("/")[0].startswith("step=") or n in (*RUN_FILES, POINTER_NAME)]
    for name in sorted(own, key=lambda n: n == TIMELINE_NAME):
        if name != RUN_NAME:
            path = inside(dirpath, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{name}", str(path))
    return True


class Uploader:
    """Brings the directory at a URL to the state of a local one, in a thread. For one rank.

    Args:
        dirpath: The run's directory.
        url: Where it goes, the run's own.
        warn: Called, in that thread, with a message for people when an upload has failed for good.

    Attributes:
        url: Where it goes.
    """

    def __init__(self, dirpath: Path, url: str, warn: Callable[[str], None]) -> None:
        self.url = url
        self._dirpath, self._warn = dirpath, warn
        self._fs: Any = None
        self._root = ""
        self._sent: dict[str, bytes] = {}  # manifests of what is there, by artifact
        self._states: dict[str, object] = {}  # of other files
        self._is_due, self._is_closing = threading.Event(), False
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="ckmerge-upload", daemon=True)
        self._thread.start()

    def sync(self) -> None:
        """Let the thread look for what is new; nothing waits."""
        self._is_due.set()

    def close(self) -> None:
        """Wait until all is there, or has failed."""
        self._is_closing = True
        self._is_due.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._is_due.wait()
            self._is_due.clear()
            is_last = self._is_closing
            self._attempt()
            if is_last:
                return

    def _attempt(self) -> None:
        fault: Exception | None = None
        for pause_s in PAUSES_S:
            threading.Event().wait(pause_s)
            try:
                self._bring()
            except Exception as error:  # each file system has errors of its own
                fault = error
            else:
                self._failed = False
                return
        if fault is not None and (self._is_closing or not self._failed):
            self._failed = True
            when = "Copy it by hand, or resume the run." if self._is_closing else "The next search tries again."
            reason = explain(fault).rstrip(".")
            self._warn(f"Uploading to {self.url} failed: {reason}. All of it is in {self._dirpath}. {when}")

    def _bring(self) -> None:
        if self._fs is None:
            self._fs, self._root = open_url(self.url)
            self._fs.invalidate_cache()
            # What an earlier process brought and the run has removed since is removed there, too.
            self._sent = dict.fromkeys(self._names(), b"")
        local = {p.name: p for p in sorted(self._dirpath.glob("step=*")) if ARTIFACT_NAME.fullmatch(p.name)}
        for name, path in local.items():
            self._bring_artifact(name, path)
        self._point()
        for name in RUN_FILES:
            self._bring_file(name)
        for name in self._sent.keys() - local.keys():
            self._remove(name)

    def _names(self) -> set[str]:
        """Return the names of artifacts at the URL, whole or not."""
        with contextlib.suppress(FileNotFoundError):
            found = {str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
            return {name for name in found if ARTIFACT_NAME.fullmatch(name)}
        return set()

    def _bring_artifact(self, name: str, path: Path) -> None:
        remote = f"{self._root}/{name}"
        try:
            manifest = (path / MANIFEST_NAME).read_bytes()
            if self._sent.get(name) == manifest:
                return
            with contextlib.suppress(FileNotFoundError):
                if self._fs.cat_file(f"{remote}/{MANIFEST_NAME}") == manifest:
                    self._sent[name] = manifest
                    return
                self._remove(name)
            files = [f for f in list_files(path) if f != MANIFEST_NAME]
            for file in files:
                self._put(path / file, f"{remote}/{file}")
            self._write(f"{remote}/{MANIFEST_NAME}", manifest)
            self._sent[name] = manifest
        except FileNotFoundError:
            if path.exists():
                raise
            self._remove(name)  # `save_top_k` was faster

    def _bring_file(self, name: str) -> None:
        path = self._dirpath / name
        with contextlib.suppress(FileNotFoundError):
            state = (path.stat().st_mtime_ns, path.stat().st_size)
            if self._states.get(name) != state:
                self._put(path, f"{self._root}/{name}")
                self._states[name] = state

    def _point(self) -> None:
        """Let ``best.json`` name what ``best`` names here."""
        best = best_target(self._dirpath)
        if best is None and POINTER_NAME in self._states:
            self._fs.rm_file(f"{self._root}/{POINTER_NAME}")
            del self._states[POINTER_NAME]
        elif best is not None and best.name != self._states.get(POINTER_NAME):
            self._write(f"{self._root}/{POINTER_NAME}", json.dumps({"artifact": best.name}).encode())
            self._states[POINTER_NAME] = best.name

    def _put(self, path: Path, remote: str) -> None:
        self._fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(path), remote)

    def _write(self, remote: str, content: bytes) -> None:
        self._fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(remote, content)

    def _remove(self, name: str) -> None:
        remote = f"{self._root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{remote}/{MANIFEST_NAME}")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(remote, recursive=True)
        self._sent.pop(name, None)
