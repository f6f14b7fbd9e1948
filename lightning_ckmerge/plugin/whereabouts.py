"""Where a run's artifacts are, for a process that only launched the run: attributes do not come back from its ranks."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from pathlib import Path


class Whereabouts:
    """A path that a launched process leaves for the launching one, in a file whose name both know."""

    def __init__(self) -> None:
        self._launcher = os.getpid()
        self._note = Path(tempfile.gettempdir()) / f"ckmerge-{uuid.uuid4().hex}"
        weakref.finalize(self, _remove, self._note, self._launcher)

    def leave(self, path: Path) -> None:
        """Write the path down, unless this process is the one that would read it."""
        if os.getpid() == self._launcher:
            self._note.unlink(missing_ok=True)
        else:
            self._note.write_text(str(path), encoding="utf-8")

    def find(self) -> Path | None:
        """Return the path that was left; ``None`` if none was."""
        return Path(self._note.read_text(encoding="utf-8")) if self._note.is_file() else None


def _remove(note: Path, launcher: int) -> None:
    if os.getpid() == launcher:  # a forked process has a copy of this object
        note.unlink(missing_ok=True)
