"""The Trainer's module as one rank holds it, and how merges get into it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ckmerge.artifact.load import Artifact, load_merged
from lightning_ckmerge.buffer.merger import Merger
from lightning_ckmerge.checks import parse_size
from lightning_ckmerge.config import AdapterMerge, MergeSettings
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.merge import merge_tensor
from lightning_ckmerge.core.mixing import slerp_tensors
from lightning_ckmerge.core.outcome import Coefficients
from lightning_ckmerge.core.spaces import ByTensor, make_space
from lightning_ckmerge.distributed.comm import Comm, connect, together
from lightning_ckmerge.distributed.gather import scatter
from lightning_ckmerge.distributed.ownership import Ownership
from lightning_ckmerge.plugin.rank.peft_adapters import Load, find_adapters


class RankModel:
    """This rank's part of the module, for one ``fit``. All ranks make theirs together.

    A module may change while it is trained (pruning, a new head): ``changes`` says so, and ``begin`` looks again.

    Args:
        module: The LightningModule, on its device.
        settings: Of the callback: the space, which is bound to the module's tensors and so knows their groups, how
            adapters are merged, and the most extra memory that a merge takes while ranks send each other their parts.
        comm: The ranks; ``None``: those of the process group.

    Attributes:
        comm: The ranks.
        ownership: Knows this rank's tensors.
        layout: Of the tensors that it owns, which are buffered and merged here.
        local_layout: Of all that it holds.
        space: The bound space.
        adapters: PEFT's adapters, if the module has any.

    Raises:
        ConfigError: As ``find_adapters``.
        UnsupportedError: As ``find_adapters``.
    """

    def __init__(
        self,
        module: LightningModule,
        settings: MergeSettings,
        comm: Comm | None = None,
    ) -> None:
        self._module = module
        self._space = settings.search.space
        self._artifact = settings.artifact
        self._refines = settings.search.refine is not None
        self._bucket_bytes = parse_size(settings.buffer.bucket_size)
        self.comm = comm or connect()
        self._left_out: set[str] = set()
        self.begin()

    def begin(self, left_out: Collection[str] = ()) -> None:
        """Look at the module as it is now. A collective.

        Args:
            left_out: Names of buffers that are averaged no more from now on, the same on all ranks.

        Raises:
            ConfigError: As ``find_adapters``.
            UnsupportedError: As ``find_adapters``.
        """
        module = self._module
        self._left_out.update(left_out)
        self.ownership = Ownership(module, self.comm, self._bucket_bytes, self._left_out)
        self.layout = TensorLayout(self.ownership.owned())
        self.local_layout = TensorLayout(self.ownership.local())
        names = list(self.ownership.shapes)
        space = make_space(self._space).bind(names)
        self.space = ByTensor(space, names) if self._refines else space
        self.adapters = find_adapters(
            module, self._artifact, self.comm, self.space.group_of, is_sharded=self.ownership.is_sharded
        )

    @property
    def adapter_merge(self) -> AdapterMerge | None:
        """How adapters are merged; ``None``: there are none."""
        return self.adapters.merge if self.adapters is not None else None

    def live(self) -> list[Tensor]:
        """Return the tensors that this rank owns, in the layout's order.

        Raises:
            SnapshotError: The module has changed.
        """
        self.ownership.settle()
        return self.layout.order(self.ownership.owned())

    def changes(self, *, everywhere: bool) -> list[str]:
        """Return, as ``Ownership.changes`` does, the names of tensors that have changed since ``begin``."""
        self.ownership.settle()
        return self.ownership.changes(everywhere=everywhere)

    def select(self, held: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the parts that this rank owns, in order, from stand-ins by name for all that it holds."""
        return self.layout.order(self.ownership.select(held))

    def merging(self, merger: Merger) -> contextlib.AbstractContextManager[Load]:
        """Yield a writer of merges into the module, on all ranks."""

        def load(c: Coefficients) -> None:
            merger.merge(c)
            self._publish()

        if self.adapters is None:
            return contextlib.nullcontext(load)
        return self.adapters.merging(load, len(merger.snapshots_K))

    def slerp(self, merger: Merger, older: int, newer: int, lam: float) -> None:
        """Write the point at ``lam`` on the great circle between two snapshots into the module, tensor by tensor.

        Buffers, such as BatchNorm's statistics, are no directions: they are merged along the straight line.

        Args:
            merger: Holds the snapshots.
            older: Place of the one at ``lam`` 0.
            newer: Place of the one at ``lam`` 1.
            lam: Below 0 and above 1 the circle goes on.

        Source:
            Shoemake 1985, as mergekit's documentation applies it to models.
        """
        pair = [[t.detach().cpu() for t in merger.snapshots_K[k].tensors] for k in (older, newer)]
        with torch.no_grad():
            for slot, target, a, b in zip(self.layout.slots, self.live(), *pair, strict=True):
                if slot.role == "parameter":
                    target.copy_(slerp_tensors(a, b, lam))
                else:
                    merge_tensor(target, [a.to(target.device), b.to(target.device)], [1 - lam, lam], slot.role)
        self._publish()

    def load(self, artifact: Artifact) -> None:
        """Load an artifact's weights into the module, on all ranks. Which weights are better is the caller's to say."""
        with together(self.comm):
            artifact.check_files()
        self.read(artifact)

    def read(self, artifact: Artifact) -> None:
        """Read an artifact's weights into the module, on all ranks. Its files are known to be whole."""
        if self.ownership.is_sharded:
            self.ownership.settle()
            scatter(self._module, artifact.tensors())
        else:
            load_merged(artifact, self._module, verify=False)

    def _publish(self) -> None:
        self.comm.exchange(None)  # nobody has failed: publishing cannot be left half done
        self.ownership.publish()
        self.ownership.settle()
