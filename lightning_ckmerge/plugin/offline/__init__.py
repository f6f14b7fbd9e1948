"""Work over checkpoints on disk, scored by the run's own validation as in training."""
