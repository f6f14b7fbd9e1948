"""A training script, for what only Lightning's own launchers show: python -m tests.support.launch ddp_spawn DIR

Prints what the process that called ``fit`` knows of the best artifact.
"""

from __future__ import annotations

import os
import sys

from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_ckmerge import EvaluationConfig
from tests.support.rank_runs import fit, make_rank_merge, points


def main(strategy: str, root: str) -> None:
    # No `dirpath`: it depends on the logger's version, which only the ranks find out.
    merge = make_rank_merge(root, dirpath=None, evaluation=EvaluationConfig(), every_n_train_steps=24)
    val = DataLoader(points(1283), batch_size=16)  # enough to accept a merge
    # The run validates once, at its end: the search is the point.
    rarely = {"max_epochs": 4, "check_val_every_n_epoch": 4, "val_check_interval": 1.0, "num_sanity_val_steps": 0}
    run = fit(strategy, root, merge, logger=CSVLogger(root, name="logs"), val=val, **rarely)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("steps", run.trainer.global_step)
        print("best", merge.best_artifact and merge.best_artifact.path)


if __name__ == "__main__":
    main(*sys.argv[1:])
