"""See the package."""

from __future__ import annotations

import argparse

import torch

import benchmarks.evidence
from benchmarks.evidence.protocol import PARTS, runs
from benchmarks.evidence.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=(benchmarks.evidence.__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or report; all by default")
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        for run in runs(part):
            train(run)
            print(part, run.directory.name, flush=True)


if __name__ == "__main__":
    main()
