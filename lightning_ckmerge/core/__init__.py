"""Pure parts: where snapshots lie in a run, spaces, merge arithmetic, records. Imports torch and nothing else."""
