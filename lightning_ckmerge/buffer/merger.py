"""The inputs of a search: the buffer's snapshots and the latest weights.

Letters: K snapshots, oldest first, the last one being the latest weights; N tensors of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_ckmerge.buffer.rolling import Snapshot
from lightning_ckmerge.core.layout import TensorLayout
from lightning_ckmerge.core.merge_plan import MergePlan
from lightning_ckmerge.core.outcome import Coefficients, SnapshotRecord
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.specs import split_name


class Merger:
    """Writes merges of K snapshots into the model's own tensors.

    Args:
        layout: The model's layout, which every snapshot shares.
        find_targets: Returns the N live tensors, in the layout's order. Asked at each merge: hooks may put others in
            their place, or give them other memory.
        snapshots: The buffer's snapshots.
        latest: N tensors: the live weights as they were when the search began.
        step: Optimizer steps taken so far.
        group_of: Tensor name -> group, where coefficients differ between groups.
    """

    def __init__(
        self,
        layout: TensorLayout,
        find_targets: Callable[[], Sequence[Tensor]],
        snapshots: Sequence[Snapshot],
        latest: Sequence[Tensor],
        step: int,
        group_of: Mapping[str, str] | None = None,
    ) -> None:
        # A point taken at this very step is the latest weights.
        snapshots = [s for s in snapshots if s.segment.kind == "mean" or s.segment.last_step < step]
        first = min(step, snapshots[-1].segment.last_step + 1 if snapshots else 1)
        covered = bool(snapshots) and snapshots[-1].segment.last_step >= step
        own = Segment(kind="point", first_step=first, last_step=step, covered=covered)
        self.snapshots_K = [*snapshots, Snapshot(segment=own, sha256=None, tensors=list(latest))]
        sources_KN = [s.tensors for s in self.snapshots_K]
        groups_N = [group_of[split_name(s.name, s.shape)[0]] for s in layout.slots] if group_of else None
        self._find_targets = find_targets
        self._plan = MergePlan(find_targets(), sources_KN, [slot.role for slot in layout.slots], groups_N)

    @property
    def segments_K(self) -> tuple[Segment, ...]:
        """The snapshots' places in the run."""
        return tuple(s.segment for s in self.snapshots_K)

    def merge(self, c: Coefficients) -> None:
        """Overwrite the live tensors with ``sum_k c_k snapshot_k``.

        Raises:
            SnapshotError: The model has other tensors, or of other shapes, than when the search began.
        """
        self._plan.merge(c, self._find_targets())

    def inner_products(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return each group's inner products, as ``MergePlan`` does, of N derivatives by the live tensors."""
        return self._plan.inner_products(gradients)

    def records(self) -> tuple[SnapshotRecord, ...]:
        """Return the snapshots as the manifest names them."""
        return tuple(
            SnapshotRecord(
                kind=s.segment.kind,
                first_step=s.segment.first_step,
                last_step=s.segment.last_step,
                num_updates=s.segment.num_updates,
                sha256=None if s.files_sha256 else s.sha256,
                files_sha256=s.files_sha256,
            )
            for s in self.snapshots_K
        )
