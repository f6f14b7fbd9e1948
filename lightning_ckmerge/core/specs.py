"""Descriptions of tensors, whole and in parts, without PyTorch: types have safetensors' names.

Letters: D dimensions of the whole tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ckmerge.errors import SnapshotError

# A buffer's file names a part as `layer.weight[0:64,0:128]`, and a whole tensor as `layer.weight`.
PART = re.compile(r"(?P<name>.*)\[(?P<ranges>[0-9]{1,18}:[0-9]{1,18}(?:,[0-9]{1,18}:[0-9]{1,18})*)\]", flags=re.DOTALL)
# PyTorch's name, and bytes an element.
TENSOR_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor, but for its values.

    Args:
        shape: Its shape.
        dtype: A name of ``TENSOR_TYPES``; PyTorch's own for a dtype that safetensors cannot hold.
        itemsize: Bytes an element.
    """

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        num_bytes = self.itemsize
        for size in self.shape:
            num_bytes *= size
        return num_bytes

    @property
    def is_floating(self) -> bool:
        """Whether its elements are real numbers that can be averaged."""
        return self.dtype.startswith(("F", "BF", "torch.float"))

    @property
    def is_complex(self) -> bool:
        """Whether its elements are complex numbers; they can be averaged, too."""
        return self.dtype in ("C64", "torch.complex128", "torch.complex32")


@dataclass(frozen=True)
class Box:
    """Index ranges ``[start, stop)``, one a dimension of the whole tensor."""

    ranges_D: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's shape."""
        return tuple(stop - start for start, stop in self.ranges_D)

    @property
    def numel(self) -> int:
        """The part's number of elements."""
        return math.prod(self.shape)

    def intersection(self, other: Box) -> Box | None:
        """Return the common part of two boxes of one tensor; ``None`` if there is none."""
        both = zip(self.ranges_D, other.ranges_D, strict=True)
        common = Box(tuple((max(a, c), min(b, d)) for (a, b), (c, d) in both))
        return None if any(start >= stop for start, stop in common.ranges_D) else common

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return this box as slices into a tensor that holds ``outer``."""
        both = zip(self.ranges_D, outer.ranges_D, strict=True)
        return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in both)


def whole(shape: Sequence[int]) -> Box:
    """Return the box of all of a tensor."""
    return Box(tuple((0, n) for n in shape))


def part_name(name: str, box: Box, shape: Sequence[int]) -> str:
    """Return the name under which a buffer's file holds a part."""
    if box == whole(shape):
        return name
    return f"{name}[{','.join(f'{start}:{stop}' for start, stop in box.ranges_D)}]"


def split_name(part: str, shape: Sequence[int]) -> tuple[str, Box]:
    """Return a part's tensor and box; ``shape`` is that of the stored part.

    A complex tensor is stored with a last dimension of 2, of which its name does not tell.

    >>> split_name("w[0:49,8:12]", (49, 4))
    ('w', Box(ranges_D=((0, 49), (8, 12))))

    Raises:
        SnapshotError: Name and shape disagree.
    """
    match = PART.fullmatch(part)
    if match is None:
        return part, whole(shape)
    ranges = [r.split(":") for r in match["ranges"].split(",")]
    named = tuple((int(start), int(stop)) for start, stop in ranges)
    box = Box((*named, *whole(shape[len(named) :]).ranges_D))
    if box.shape != tuple(shape):
        raise SnapshotError(
            f"a part must have the shape that its name says, got {tuple(shape)} for {part!r}. "
            "The file is damaged: remove it."
        )
    return match["name"], box
