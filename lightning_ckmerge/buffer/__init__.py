"""The rolling buffer of snapshots: its contents, their storage, and how they survive a restart."""

from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage

__all__ = ["DiskStorage", "MemoryStorage", "RollingBuffer", "Snapshot", "Storage"]
