"""Whether lower or higher values of a metric are better, by its name or by torchmetrics; to refuse a wrong ``mode``.

Nothing is inferred from this: where it speaks against the ``mode`` that was given, that is an error with a remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from lightning_ckmerge.config import Mode
from lightning_ckmerge.errors import ConfigError

HIGHER = """
acc accs accuracy accuracies auc auroc auprc aupr ap map mar iou miou jaccard dice f1 f1score fbeta fscore
precision recall sensitivity specificity tpr tnr mcc kappa ndcg mrr hits bleu sacrebleu rouge meteor chrf cider
bertscore psnr ssim msssim r2 pearson spearman pesq stoi sdr sisdr snr sisnr reward rewards elbo likelihood
loglikelihood
"""
LOWER = """
loss losses error errors err errs perplexity ppl nll mse mae rmse msle rmsle mape smape wer cer ter der eer fid
bpb bpc ce bce xent crossentropy kl kld kldiv fpr fnr ece brier lpips regret
"""
# With one of these, a name says the opposite of what its other words say, or nothing.
UNSURE = """
neg negative minus inv inverse inverted one gap drop diff difference delta change std var variance improvement
reduction decrease increase attack
"""
STAGE = re.compile(r"^(?:validation|valid|val|train|test|eval|dev)(?=.)")
PIECE = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")


class Monitored(Protocol):
    """A metric and the direction in which it is searched."""

    @property
    def monitor(self) -> str:
        """Its name."""

    @property
    def mode(self) -> Mode:
        """``min`` if lower is better, ``max`` if higher is."""


def mode_by_name(monitor: str) -> Mode | None:
    """Return the mode that a metric's name speaks for; ``None`` where it says nothing, or two things.

    >>> mode_by_name("val_acc"), mode_by_name("valid/mAP50"), mode_by_name("MeanSquaredError"), mode_by_name("rouge1")
    ('max', 'max', 'min', 'max')
    >>> mode_by_name("val_accumulated_loss"), mode_by_name("mapped_loss")
    ('min', 'min')
    >>> mode_by_name("val_acc_loss"), mode_by_name("accumulated"), mode_by_name("neg_reward")
    (None, None, None)
    """
    words = _words(monitor)
    says_higher, says_lower, is_unsure = (not words.isdisjoint(known.split()) for known in (HIGHER, LOWER, UNSURE))
    if says_higher == says_lower or is_unsure:
        return None
    return "max" if says_higher else "min"


def require_modes(monitored: Sequence[Monitored], higher_is_better: Mapping[str, bool] = MappingProxyType({})) -> None:
    """Raise ``ConfigError`` where a metric speaks against its ``mode``.

    Args:
        monitored: Metrics and their modes.
        higher_is_better: What torchmetrics says of logged metric objects, by the name they are logged under.
    """
    for metric in monitored:
        known: dict[str, Mode | None] = {
            "by its name": mode_by_name(metric.monitor),
            "as torchmetrics says": _mode(higher_is_better.get(metric.monitor)),
        }
        for source, mode in known.items():
            if mode is not None and mode != metric.mode:
                better = "higher" if mode == "max" else "lower"
                raise ConfigError(
                    f"`mode` must follow the metric, got {metric.mode!r} for {metric.monitor!r}, of which {better} "
                    f"values are better {source}. Set it to {mode!r}; or, if {metric.mode!r} is right all the same, "
                    "set `check_mode` to false."
                )


def _mode(higher_is_better: bool | None) -> Mode | None:
    return None if higher_is_better is None else "max" if higher_is_better else "min"


def _words(name: str) -> set[str]:
    """The words of a name, in any of the usual spellings; with and without figures and stages that stick to them."""
    chunks = re.findall(r"[A-Za-z0-9]+", name)
    words = {w.lower() for chunk in chunks for w in (chunk, *PIECE.findall(chunk))}
    words |= {STAGE.sub("", w) for w in words}
    return words | {w.rstrip("0123456789") for w in words}
