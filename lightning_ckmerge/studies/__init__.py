"""What a run's checkpoints and merges can tell: the pilot study, and an account of why a merge works."""
