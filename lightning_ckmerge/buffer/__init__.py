"""The rolling buffer of snapshots: what is kept, how it is stored, how it survives a restart."""

from lightning_ckmerge.buffer.rolling import RollingBuffer, Snapshot
from lightning_ckmerge.buffer.storage import DiskStorage, MemoryStorage, Storage

__all__ = ["DiskStorage", "MemoryStorage", "RollingBuffer", "Snapshot", "Storage"]
