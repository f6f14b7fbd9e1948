"""Weights on their way from their device to running means in host memory.

The training stream copies them into slots of a fixed size on the device, where no later step can change them. A stream
of its own empties the slots into host memory, and a thread averages what has arrived. So training waits on the device
while the slots are too few for all of the weights, and on the host only for the update before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_ckmerge.buffer.writer import Writer, reached
from lightning_ckmerge.core.layout import Flats, TensorLayout

# One is filled while the other is emptied.
NUM_SLOTS = 2
# Tensors of every dtype may begin here.
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Weights that pass together: a range of the flat memory of one dtype.

    Args:
        dtype: Their precision.
        start: Where the range begins.
        parts: The pieces that it is made of, in order: a tensor's number in the layout, and a range of its elements.
    """

    dtype: torch.dtype
    start: int
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def numels(self) -> list[int]:
        """Elements of each part."""
        return [stop - start for _, start, stop in self.parts]


class HostStaging:
    """Carries one state of the weights at a time. On the CPU it copies from memory to memory, in the same order.

    Args:
        layout: The weights, in their own precision.
        device: Where they are.
        max_bytes: Memory on the device, at most. A tensor that is not contiguous takes a copy of itself for a moment.
    """

    def __init__(self, layout: TensorLayout, device: torch.device, max_bytes: int) -> None:
        self._layout = layout
        self._device = device
        slot_bytes = num_staged_bytes(layout.num_bytes, max_bytes) // NUM_SLOTS
        self._buckets = cut_layout(layout, slot_bytes)
        self._slot_bytes = slot_bytes
        self._worker = Writer("ckmerge-means")
        self._failures: list[Exception] = []
        self._arrived: Flats = {}
        self._slots: list[Tensor] = []
        self._emptied: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        self._side: torch.cuda.Stream | None = None

    @torch.no_grad()
    def send(self, weights: Sequence[Tensor], receive: Callable[[Sequence[Tensor]], None]) -> None:
        """Let ``receive`` have a copy of the weights in host memory, in a thread of its own.

        They may change again, in the order of the training stream, once this returns.

        Raises:
            Exception: One before could not be received.
        """
        self.wait()
        if not self._slots:
            self._allocate()
        last = None
        for i, bucket in enumerate(self._buckets):
            last = self._carry(bucket, weights, i % NUM_SLOTS)
        self._worker.submit(lambda: self._receive(receive, last))

    def wait(self) -> None:
        """Wait until all that was sent has been received.

        Raises:
            Exception: Some of it, ever, could not be: what is made of it is not whole.
        """
        self._worker.flush()
        self._failures += self._worker.take_failures()
        if self._failures:
            raise self._failures[0]

    def close(self) -> None:
        """Receive what was sent, whether that fails or not, and end the thread; a later call starts a new one."""
        self._worker.close()
        self._worker.take_failures()
        self._failures.clear()

    def _allocate(self) -> None:
        is_cuda = self._device.type == "cuda"
        self._arrived = self._layout.allocate("cpu", pinned=is_cuda)
        self._views = self._layout.views(self._arrived)
        self._slots = [torch.empty(self._slot_bytes, dtype=torch.uint8, device=self._device) for _ in range(NUM_SLOTS)]
        self._side = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]

    def _carry(self, bucket: Bucket, weights: Sequence[Tensor], slot: int) -> torch.cuda.Event | None:
        """Return an event that the device reaches once these weights are in host memory; ``None`` on the CPU."""
        numels = bucket.numels
        staged = self._slots[slot][: sum(numels) * bucket.dtype.itemsize].view(bucket.dtype)
        emptied = self._emptied[slot]
        if emptied is not None:
            torch.cuda.current_stream(self._device).wait_event(emptied)
        pieces = [weights[n].reshape(-1)[start:stop] for n, start, stop in bucket.parts]
        torch._foreach_copy_(list(torch.split(staged, numels)), pieces)
        filled = reached(self._device)
        with torch.cuda.stream(self._side):
            if self._side is not None and filled is not None:
                self._side.wait_event(filled)
            self._arrived[bucket.dtype][bucket.start : bucket.start + len(staged)].copy_(staged, non_blocking=True)
            self._emptied[slot] = reached(self._device)
        return self._emptied[slot]

    def _receive(self, receive: Callable[[Sequence[Tensor]], None], arrived: torch.cuda.Event | None) -> None:
        """Runs in the thread."""
        if arrived is not None:
            # A new thread starts on GPU 0, and pinning memory from there would open a context on it.
            torch.cuda.set_device(self._device)
            arrived.synchronize()
        receive(self._views)


def num_staged_bytes(num_bytes: int, max_bytes: int) -> int:
    """Return the bytes of all slots for weights of so many bytes, which need no more than these.

    >>> num_staged_bytes(10**9, 64_000_000), num_staged_bytes(1000, 64_000_000)
    (64000000, 1024)
    """
    unit = NUM_SLOTS * ALIGNMENT
    return max(unit, min(max_bytes // unit, -(-num_bytes // unit)) * unit)


def cut_layout(layout: TensorLayout, num_bytes: int) -> list[Bucket]:
    """Return buckets of at most ``num_bytes``, which together hold every element once."""
    buckets: dict[tuple[torch.dtype, int], Bucket] = {}
    for n, slot in enumerate(layout.slots):
        numel = num_bytes // slot.dtype.itemsize
        start = 0
        while start < slot.numel:
            index = (slot.offset + start) // numel
            stop = min(slot.numel, (index + 1) * numel - slot.offset)
            empty = Bucket(dtype=slot.dtype, start=index * numel)
            buckets.setdefault((slot.dtype, index), empty).parts.append((n, start, stop))
            start = stop
    return list(buckets.values())
