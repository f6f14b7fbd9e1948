"""The rolling buffer of snapshots: its contents, their storage, and how they survive a restart."""
