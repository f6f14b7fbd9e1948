"""The exception tree. Every message gives the rule, the value that broke it, and the remedy.

CkmergeError
├── ConfigError        an argument is wrong; raised while the callback is built or in ``setup``
├── UnsupportedError   this Trainer, strategy or model cannot be served; raised in ``setup``
├── MonitorError       ``monitor`` is not among the metrics that validation logs
├── SnapshotError      a snapshot is missing, damaged, or does not fit the model
├── SearchError        a search could not be carried out
│   ├── SkipError      nothing is wrong, but there is no search now; all ranks raise it together
│   └── FinalError     the next search would fail too, so there is none in this run
│       └── TraceError a search has left a trace in the run
├── PeerError          another rank failed, and this one gives up with it
└── ArtifactError      an artifact is missing, damaged, or could not be written
"""


class CkmergeError(Exception):
    """Root of all errors that this package raises on purpose."""


class ConfigError(CkmergeError, ValueError):
    """An argument is outside its range, or two arguments contradict each other."""


class UnsupportedError(CkmergeError):
    """The Trainer, strategy or model cannot be served."""


class MonitorError(CkmergeError, KeyError):
    """``monitor`` names a metric that validation does not log."""

    # KeyError prints the repr of its argument, which would hide the remedy behind escapes.
    __str__ = Exception.__str__


class SnapshotError(CkmergeError):
    """A snapshot is missing, damaged, or does not fit the model."""


class SearchError(CkmergeError):
    """A search could not be carried out."""


class SkipError(SearchError):
    """No search is possible now, though nothing is wrong. All ranks raise it together.

    Args:
        reason: Why not, with a remedy.
        needed_s: Seconds that the shortest search would have needed, where time is the reason.
    """

    def __init__(self, reason: str, *, needed_s: float = 0.0) -> None:
        super().__init__(reason)
        self.needed_s = needed_s


class FinalError(SearchError):
    """A search could not be carried out, and neither could the next one: searching ends for this run."""


class TraceError(FinalError):
    """A search has left a trace in the run."""


class PeerError(CkmergeError):
    """Another rank failed, and this one gives up with it."""


class ArtifactError(CkmergeError):
    """An artifact is missing, damaged, or could not be written."""


def explain(error: Exception) -> str:
    """Return an error's text for people: our own messages are complete, others need their type.

    >>> explain(SearchError("there is nothing to merge.")), explain(OSError("disk full"))
    ('there is nothing to merge.', 'OSError: disk full')
    """
    return str(error) if isinstance(error, CkmergeError) else f"{type(error).__name__}: {error}"
