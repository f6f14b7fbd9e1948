"""How much of a learning-rate decay's gain each way of merging recovers, on small GPTs trained from scratch.

python -m benchmarks.quality.train       trains the runs and keeps their trails (hours on two cores)
python -m benchmarks.quality.measure     scores every method of methods.py on every run, and keeps what it has
python -m benchmarks.quality.warm        compares what a search may take over from the run's previous one
python -m benchmarks.quality.report      writes results.json, docs/quality.md and its chart
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).parent / "runs"
# The model and its data are those of the examples, which are scripts and no package.
sys.path.insert(0, str(ROOT / "examples"))
