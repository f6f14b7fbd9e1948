"""Evidence for the default beyond the runs that gave it its constants, as docs/protocol.md fixes it.

python -m benchmarks.evidence [PART ...]           trains what is missing, measures what is missing, writes the results
python -m benchmarks.evidence --train [PART ...]   trains only
python -m benchmarks.evidence report               writes the tables of docs/evidence.md from the committed results

Parts: ladder, regimes, architectures, referees, verdicts. A command that was stopped goes on where it was: trained
runs lie in ``benchmarks/evidence/runs``, their scores beside them, and ``results/<part>.json`` is written after each
run. With ``--again`` they are measured again, which takes no training: as after a change of the default.
"""

from pathlib import Path

RUNS = Path(__file__).parent / "runs"
RESULTS = Path(__file__).parent / "results"
