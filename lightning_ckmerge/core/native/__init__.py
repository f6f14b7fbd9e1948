"""Merges in C, bit for bit those of PyTorch; docs/native.md says when they run and how to switch them off."""
