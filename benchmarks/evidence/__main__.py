"""See the package."""

from __future__ import annotations

import argparse

import torch

import benchmarks.evidence
from benchmarks.evidence import measure, report, verdicts
from benchmarks.evidence.protocol import PARTS, SEEDS, runs
from benchmarks.evidence.train import train

REPORT = "report"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.evidence.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or {REPORT}; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), help="only these")
    parser.add_argument("--models", nargs="+", help="only these sizes of GPT, or architectures")
    parser.add_argument("--methods", nargs="+", default=[], help="only these, by the names of the results")
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--trained", action="store_true", help="measure only runs that have been trained")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, REPORT}:
        parser.error(f"a part must be one of {', '.join(PARTS)} or {REPORT}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    # Seed by seed, so that an unfinished part has all its cells with fewer seeds.
    for seed in args.seeds:
        for part in args.parts or PARTS:
            for run in runs(part) if part != REPORT else ():
                if run.seed != seed or (args.models and run.model not in args.models):
                    continue
                if args.trained and not run.is_trained:
                    continue
                train(run)
                print(part, run.directory.name, flush=True)
                if args.train:
                    continue
                if part == "verdicts":
                    verdicts.measure(run, again=args.again)
                else:
                    measure.measure(part, run, again=args.again, only=args.methods)
    if not args.train:
        report.main()


if __name__ == "__main__":
    main()
