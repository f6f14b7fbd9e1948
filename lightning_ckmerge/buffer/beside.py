"""GPU work of the writer's thread, beside training's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def reached(device: torch.device) -> torch.cuda.Event | None:
    """Return what happens on a GPU once all work queued so far is done; ``None`` for the CPU, where it is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def beside_training(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Work on a stream of its own, once ``ready`` has happened; all of it is done in the end.

    Neither thread waits for the other: training's stream goes on, and copies to the host overlap with it.
    """
    if ready is None:
        yield
        return
    # A new thread starts on GPU 0, and pinning memory from there would open a context on it.
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
