"""The pilot study of a run's checkpoints: which, how many, and how to merge. No Trainer in sight."""
