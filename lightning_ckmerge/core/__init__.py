"""Pure parts: segments of a run, spaces, merge arithmetic, records. Imports torch and nothing else."""
