from __future__ import annotations

from typing import Any

import pytest

from lightning_ckmerge import CheckpointMergeCallback
from lightning_ckmerge.config import Constraint, SearchConfig
from lightning_ckmerge.core.objectives import mode_by_name
from lightning_ckmerge.errors import ConfigError

HIGHER = (
    "val_acc val_accuracy ValAccuracy valid/top1_acc acc5 val.auc AUROC BinaryAUROC val_f1 MulticlassF1Score mIoU mAP "
    "val/mAP_50 map50 bleu rougeL rouge2 val_psnr ssim val_r2 precision recall@5 val_reward val_acc/dataloader_idx_0 "
    "valacc log_likelihood"
)
LOWER = (
    "loss val_loss valLoss val_loss_epoch train/nll error err1 top1_err perplexity val_ppl MeanSquaredError mse RMSE "
    "mae WER cer fid bpb bpc val_accumulated_loss mapped_loss recalled_loss macro_loss"
)
SAYS_NOTHING = (
    "val_acc_loss loss_iou precision_loss error_recall accumulated mapped quality score a val mapping recaller "
    "lossless neg_reward negative_log_likelihood acc_drop auc_std 1_minus_acc one_minus_acc attack_acc "
    "elbo_validation"
)


@pytest.mark.parametrize(
    ("names", "mode"), [(HIGHER, "max"), (LOWER, "min"), (SAYS_NOTHING, None)], ids=["higher", "lower", "nothing"]
)
def test_a_name_speaks_word_by_word(names: str, mode: str | None) -> None:
    assert {name: mode_by_name(name) for name in names.split()} == dict.fromkeys(names.split(), mode)


WRONG: list[dict[str, Any]] = [
    {"monitor": "val_acc"},
    {"monitor": "val_acc", "mode": "min"},
    {"monitor": "val_loss", "mode": "max"},
    {"monitor": ["val_loss", "val_acc"]},
    {"monitor": ["val_acc", "val_loss"], "mode": ["max", "max"]},
    {"search": SearchConfig(constraints=[Constraint(monitor="val_f1")])},
    {"search": SearchConfig(constraints=[Constraint(monitor="val_loss", mode="max")])},
]


@pytest.mark.parametrize("arguments", WRONG)
def test_a_mode_against_the_name_is_refused_unless_it_is_insisted_on(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"`mode` must match the metric.*\. Use 'm(in|ax)', or set `check_mode: false`"
    ):
        CheckpointMergeCallback(**arguments)
    CheckpointMergeCallback(**arguments, check_mode=False)
