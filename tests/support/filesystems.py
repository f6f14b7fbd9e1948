"""File systems behind URLs: a server that speaks S3, and a disk that is slow, fails, or tells what it did."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import fsspec
from fsspec.implementations.local import LocalFileSystem


class OddDisk(LocalFileSystem):
    """A local disk behind ``odd://``.

    Attributes:
        done: What was written and removed, in this order.
        faults: How many writes still fail.
        pause_s: What a write takes.
        is_away: Whether files of artifacts cannot be written.
        gate: What they wait for.
        look: Called before each write and removal.
    """

    protocol = "odd"
    done: ClassVar[list[tuple[str, str]]] = []
    faults: ClassVar[int] = 0
    pause_s: ClassVar[float] = 0.0
    is_away: ClassVar[bool] = False
    gate: ClassVar[threading.Event] = threading.Event()
    look: ClassVar[Callable[[], object]] = staticmethod(lambda: None)

    @classmethod
    def _strip_protocol(cls, path: Any, *args: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return super()._strip_protocol(str(path).replace("odd://", "", 1))

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._do("write", rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._do("write", path)
        super().pipe_file(path, value, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self._do("remove", path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, **kwargs: Any) -> None:
        """One file after another, a manifest last: a store has no directory to remove."""
        for name in sorted(self.find(path), reverse=True):
            self.rm_file(name)
        super().rm(path, recursive=recursive, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        self._do("read", rpath)
        super().get_file(rpath, lpath, *args, **kwargs)

    @classmethod
    def _do(cls, what: str, path: str) -> None:
        time.sleep(cls.pause_s)
        if what != "read":
            cls.look()
        if what == "write" and "step=" in path:
            cls.gate.wait()
        if what == "write" and (cls.faults > 0 or (cls.is_away and "step=" in path)):
            cls.faults -= 1
            raise OSError("the server is away")
        cls.done.append((what, os.path.basename(path)))


@contextmanager
def odd_disk(
    *,
    faults: int = 0,
    pause_s: float = 0.0,
    is_away: bool = False,
    gate: threading.Event | None = None,
    look: Callable[[], object] = lambda: None,
) -> Iterator[type[OddDisk]]:
    """Let ``odd://`` be known, and forget what was done before."""
    fsspec.register_implementation("odd", OddDisk, clobber=True)
    OddDisk.done.clear()
    OddDisk.faults, OddDisk.pause_s, OddDisk.is_away = faults, pause_s, is_away
    OddDisk.look = staticmethod(look)
    OddDisk.gate = gate or threading.Event()
    if gate is None:
        OddDisk.gate.set()
    yield OddDisk


@contextmanager
def s3_server(bucket: str) -> Iterator[None]:
    """A server of one's own that speaks S3's language, and a bucket there; ``s3://`` leads to it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        with patch.dict(os.environ, own):
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(bucket)
            yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
