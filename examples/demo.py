"""Pretrain a small GPT with the callback, and compare what merging gains, also on files that no search saw.

    python examples/demo.py [--decay-branch] [--follow] [--trainer.max_steps=800 and the like]

Everything is written under ``runs/gpt``, which a new run replaces.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from comparison import (
    LATEST,
    LastSearch,
    Measured,
    command_line,
    contenders,
    fit,
    fit_followed,
    measure,
    say_where,
    start,
    table,
    write_record,
)

CONFIG = Path(__file__).with_name("pretrain_gpt.yaml")
RUN = Path("runs/gpt")
DECAYED = "learning rate decayed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay-branch", action="store_true", help="also train the last fifth with a decaying rate")
    parser.add_argument("--follow", action="store_true", help="search in processes beside the training, not in it")
    args, overrides = parser.parse_known_args(command_line())
    start(RUN)

    cli = fit_followed(CONFIG, overrides, RUN) if args.follow else fit(CONFIG, overrides)
    ours, pair = (LastSearch.under(RUN / name, cli.model) for name in ("merges", "merges-pair"))
    losses = {name: measure(cli, weights) for name, weights in contenders(ours, pair).items()}
    if args.decay_branch:
        decay = ["--model.init_args.decay_fraction=0.2", "--trainer.callbacks=null", "--trainer.logger=false"]
        # With the run's own seed it would go through the windows of the run's first steps again.
        branch = fit(CONFIG, [*overrides, *decay, "--seed_everything=2"], next((RUN / "checkpoints").glob("*.ckpt")))
        losses[DECAYED] = measure(branch, branch.model.state_dict())

    print(f"\nLoss in nats a byte, after {cli.trainer.global_step} steps:\n")
    print(table(losses, {"share of the decay's gain": shares(losses)} if args.decay_branch else None))
    say_where(ours, pair)
    write_record(RUN / "comparison.json", losses, ours)


def shares(losses: Mapping[str, Measured]) -> dict[str, str]:
    """Return each contender's share of the decay branch's gain on the test files."""
    latest, decayed = losses[LATEST].test, losses[DECAYED].test
    return {name: f"{(latest - own.test) / (latest - decayed):.0%}" for name, own in losses.items() if name != LATEST}


if __name__ == "__main__":
    main()
