"""Which tensors a rank owns, and how ranks agree."""
