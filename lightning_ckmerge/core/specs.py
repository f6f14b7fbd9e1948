"""What must be known of tensors to store them, without PyTorch: their types have safetensors' names here."""

from __future__ import annotations

from dataclasses import dataclass

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
        dtype: A name of ``TENSOR_TYPES``; PyTorch's own for what safetensors cannot hold.
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
