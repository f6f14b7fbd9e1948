"""What the callback costs, beside targets: only ratios, of medians of interleaved rounds, since machines are shared.

python -m benchmarks.speed                 everything (half an hour on two cores)
python -m benchmarks.speed merge means     these alone; rows of the others stay as they were

Results go to ``results.json`` and into the table of ``docs/performance.md``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "performance.md"
# The examples' model and data are scripts and no package.
sys.path.insert(0, str(ROOT / "examples"))
