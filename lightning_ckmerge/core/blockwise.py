"""The weighted mean of ``mix_tensors`` on blocks of bytes, in C where there is a compiler.

Then a merge needs no PyTorch, whose import takes longer than merging 2 GB, and 140 MiB of memory.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_ckmerge.core.native.mixing import TYPES, MixKernel, load_mix_kernel, total_weight


def mix_blocks(
    blocks_K: Sequence[memoryview], types_K: Sequence[str], w_K: Sequence[float], target: memoryview, target_type: str
) -> None:
    """Fill ``target`` with ``sum_k w_k block_k / sum_k w_k``; the bits are ``mix_tensors``'.

    Args:
        blocks_K: K writable blocks of memory of equally many elements, oldest first; at least one.
        types_K: Their types: floating ones of ``TENSOR_TYPES``.
        w_K: K weights; their sum must not be 0.
        target: Memory for as many elements.
        target_type: Its type: the common one of ``types_K``.

    >>> import struct
    >>> blocks = [memoryview(bytearray(struct.pack("2f", *x))) for x in ((1, 2), (3, 6))]
    >>> target = memoryview(bytearray(8))
    >>> mix_blocks(blocks, ["F32", "F32"], [1, 3], target, "F32")
    >>> struct.unpack("2f", target)
    (2.5, 5.0)
    """
    if kernel := prepare_to_mix({*types_K, target_type}):
        kernel(blocks_K, types_K, w_K, total_weight(w_K), target, target_type)
        return
    from lightning_ckmerge.core.mixing import mix_bytes

    mix_bytes(blocks_K, types_K, w_K, target, target_type)


def prepare_to_mix(types: Collection[str]) -> MixKernel | None:
    """Return the kernel for blocks of these types; ``None``, with PyTorch imported, where it cannot be had."""
    if kernel := load_mix_kernel() if TYPES.issuperset(types) else None:
        return kernel
    import lightning_ckmerge.core.mixing  # noqa: F401

    return None
