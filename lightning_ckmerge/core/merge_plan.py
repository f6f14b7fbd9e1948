"""All tensors of a model at once, prepared once for the many merges of a search.

Letters: K snapshots, oldest first; N tensors of one snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ckmerge.core.layout import Role
from lightning_ckmerge.core.merge import check_shapes, inner_products, merge_tensor
from lightning_ckmerge.core.native.fused import DTYPES, Kernel, Pieces, load_kernel
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.errors import SnapshotError

# Compiling takes a second; a smaller model's merges take less than that in a whole search.
MIN_FUSED_NUMEL = 1 << 22
# Where a tensor is, and how C code would read it.
Memory = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]


class MergePlan:
    """Merges N tensors of K snapshots into N others, any number of times, in no more memory than one block.

    Tensors may get other memory between two merges (``p.data = ...``, ``module.to(...)``): the plan is then made again.

    Args:
        targets_N: The tensors to overwrite: floating, any shape, dtype, device and strides.
        sources_KN: K times N tensors of the same shapes. Left unchanged.
        roles_N: As ``merge_tensor`` treats them.
        groups_N: The tensors' groups, where coefficients differ between groups.

    Raises:
        SnapshotError: A source has another shape than its target.

    >>> targets = [torch.empty(2), torch.empty(())]
    >>> plan = MergePlan(targets, [[torch.tensor([1.0, 2.0]), torch.tensor(0.0)], [torch.zeros(2), torch.tensor(8.0)]],
    ...                  ["parameter", "parameter"])
    >>> plan.merge([0.75, 0.25])
    >>> targets
    [tensor([0.7500, 1.5000]), tensor(2.)]
    """

    def __init__(
        self,
        targets_N: Sequence[Tensor],
        sources_KN: Sequence[Sequence[Tensor]],
        roles_N: Sequence[Role],
        groups_N: Sequence[str] | None = None,
    ) -> None:
        self._targets_N = targets_N
        self._sources_KN = sources_KN
        self._roles_N = roles_N
        self._groups_N = groups_N or [""] * len(targets_N)
        self._memory = self._find_memory()
        self._sort()

    def merge(self, c: Coefficients, targets_N: Sequence[Tensor] | None = None) -> None:
        """Overwrite the targets with ``sum_k c_k source_k``; the bits are ``merge_tensor``'s.

        Args:
            c: The coefficients, of each group or of all.
            targets_N: The tensors that are in the targets' place now, where a module may have put others there.

        Raises:
            SnapshotError: A target's shape has changed, or its memory was freed.
        """
        if targets_N is not None:
            self._targets_N = targets_N
        memory = self._find_memory()
        if memory != self._memory:
            self._memory = memory
            self._sort()
        by_group = c if isinstance(c, Mapping) else dict.fromkeys(self._groups_N, c)
        kernel = load_kernel() if self._numel >= MIN_FUSED_NUMEL else None
        for n in self._single if kernel else range(len(self._targets_N)):
            c_K = by_group[self._groups_N[n]]
            merge_tensor(self._targets_N[n], [s[n] for s in self._sources_KN], c_K, self._roles_N[n])
        if kernel:
            self._merge_fused(kernel, by_group)

    def inner_products(self, gradients_N: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return for each group the sum over its tensors of ``merge.inner_products``.

        Args:
            gradients_N: N tensors of the targets' shapes, on their devices; those of buffers do not count.
        """
        num_snapshots = len(self._sources_KN)
        totals = {g: torch.zeros(num_snapshots, num_snapshots, dtype=torch.float64) for g in self._groups_N}
        for n, (gradient, group, role) in enumerate(zip(gradients_N, self._groups_N, self._roles_N, strict=True)):
            if role == "parameter":
                totals[group] += inner_products(gradient, [sources_N[n] for sources_N in self._sources_KN])
        return totals

    def _find_memory(self) -> list[list[Memory]]:
        return [[_memory(t) for t in tensors_N] for tensors_N in (self._targets_N, *self._sources_KN)]

    def _sort(self) -> None:
        """Tell the tensors that C code can merge from those that are merged one by one."""
        alike: dict[tuple[str, tuple[torch.dtype, ...]], list[int]] = {}
        self._single: list[int] = []
        for n, (target, role) in enumerate(zip(self._targets_N, self._roles_N, strict=True)):
            tensors = [target, *(sources_N[n] for sources_N in self._sources_KN)]
            check_shapes(target, tensors[1:])
            can_fuse = role == "parameter" and all(map(_is_readable_by_c, tensors))
            key = (self._groups_N[n], tuple(t.dtype for t in tensors))
            (alike.setdefault(key, []) if can_fuse else self._single).append(n)
        self._alike = list(alike.values())
        self._numel = sum(self._targets_N[n].numel() for tensors in self._alike for n in tensors)
        self._pieces: list[tuple[str, Pieces]] | None = None

    def _merge_fused(self, kernel: Kernel, by_group: Mapping[str, Sequence[float]]) -> None:
        if self._pieces is None:
            self._pieces = [
                (
                    self._groups_N[tensors[0]],
                    Pieces([self._targets_N[n] for n in tensors], [[s[n] for n in tensors] for s in self._sources_KN]),
                )
                for tensors in self._alike
            ]
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            for group, pieces in self._pieces:
                kernel(pieces, by_group[group])
            return
        with ThreadPoolExecutor(num_threads, thread_name_prefix="ckmerge-merge") as pool:
            for group, pieces in self._pieces:
                merge = partial(kernel, pieces, by_group[group])
                edges = [len(pieces) * i // (4 * num_threads) for i in range(4 * num_threads + 1)]
                list(pool.map(merge, edges, edges[1:]))


def _memory(tensor: Tensor) -> Memory:
    # Where something else than memory is behind a subclass, there is no address, and C code does not read it.
    address = tensor.data_ptr() if _has_memory(tensor) else 0
    if tensor.numel() and not address and _has_memory(tensor) and tensor.device.type == "cpu":
        raise SnapshotError(
            f"a tensor must have memory to be merged, got none behind one of shape {tuple(tensor.shape)}. Free a "
            "model's storage after the search, not during it."
        )
    return address, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _is_readable_by_c(tensor: Tensor) -> bool:
    return _has_memory(tensor) and tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()
