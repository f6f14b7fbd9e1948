"""The metrics of a search, and the direction in which each is better.

A metric's name, and torchmetrics, may tell the direction. It is never inferred from them: where they contradict the
``mode`` that was given, that is an error with a remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, get_args

from lightning_ckmerge.checks import require_choice
from lightning_ckmerge.errors import ConfigError

Mode = Literal["min", "max"]
HIGHER = """
acc accs accuracy accuracies auc auroc auprc aupr ap map mar iou miou jaccard dice f1 f1score fbeta fscore
precision recall sensitivity specificity tpr tnr mcc kappa ndcg mrr hits bleu sacrebleu rouge meteor chrf cider
bertscore psnr ssim msssim r2 pearson spearman pesq stoi sdr sisdr snr sisnr reward rewards likelihood
loglikelihood
"""
LOWER = """
loss losses error errors err errs perplexity ppl nll mse mae rmse msle rmsle mape smape wer cer ter der eer fid
bpb bpc ce bce xent crossentropy kl kld kldiv fpr fnr ece brier lpips regret
"""
# With one of these, a name says the opposite of its other words, or nothing. scvi-tools logs a negative ELBO as `elbo`.
UNSURE = """
elbo neg negative minus inv inverse inverted one gap drop diff difference delta change std var variance improvement
reduction decrease increase attack
"""
STAGE = re.compile(r"^(?:validation|valid|val|train|test|eval|dev)(?=.)")
PIECE = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")


def sign_of(mode: Mode) -> int:
    """Return 1 if lower values are better, -1 if higher ones are."""
    return 1 if mode == "min" else -1


@dataclass(frozen=True)
class Objective:
    """A metric to search by.

    Args:
        monitor: Its name, as validation logs it.
        mode: ``min`` if lower is better, ``max`` if higher is.
    """

    monitor: str
    mode: Mode

    @property
    def sign(self) -> int:
        """1 if lower values are better, -1 if higher ones are."""
        return sign_of(self.mode)


def make_objectives(monitor: str | Sequence[str], mode: Mode | Sequence[Mode]) -> tuple[Objective, ...]:
    """Return the objectives that ``monitor`` and ``mode`` name; one mode stands for all.

    >>> make_objectives(["val_loss", "val_acc"], ["min", "max"])
    (Objective(monitor='val_loss', mode='min'), Objective(monitor='val_acc', mode='max'))

    Raises:
        ConfigError: They do not fit each other.
    """
    monitors = [monitor] if isinstance(monitor, str) else list(monitor)
    modes: list[Mode] = [mode] * len(monitors) if isinstance(mode, str) else list(mode)
    if not monitors or not all(monitors) or len(set(monitors)) != len(monitors):
        raise ConfigError(f"`monitor` must name one metric or several different ones, got {monitor!r}. Name each once.")
    if len(modes) != len(monitors):
        raise ConfigError(
            f"`mode` must be one for all metrics of `monitor` or one for each, got {len(modes)} for {len(monitors)}. "
            "Write `monitor: [val_loss, val_acc]` with `mode: [min, max]`."
        )
    for each in modes:
        require_choice("mode", each, get_args(Mode))
    return tuple(map(Objective, monitors, modes))


class Monitored(Protocol):
    """A metric and the direction in which it is searched."""

    @property
    def monitor(self) -> str:
        """Its name."""

    @property
    def mode(self) -> Mode:
        """``min`` if lower is better, ``max`` if higher is."""


def mode_by_name(monitor: str) -> Mode | None:
    """Return the mode that a metric's name implies; ``None`` where it implies none, or both.

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
    """Raise ``ConfigError`` where a metric contradicts its ``mode``.

    Args:
        monitored: Metrics and their modes.
        higher_is_better: Torchmetrics' attribute of logged metric objects, by the name they are logged under.
    """
    for metric in monitored:
        known: dict[str, Mode | None] = {
            "judging by its name": mode_by_name(metric.monitor),
            "according to torchmetrics": _mode(higher_is_better.get(metric.monitor)),
        }
        for source, mode in known.items():
            if mode is not None and mode != metric.mode:
                better = "higher" if mode == "max" else "lower"
                raise ConfigError(
                    f"`mode` must match the metric, got {metric.mode!r} for {metric.monitor!r}, for which {better} is "
                    f"better {source}. Use {mode!r}, or set `check_mode: false` if {metric.mode!r} is intended."
                )


def _mode(higher_is_better: bool | None) -> Mode | None:
    return None if higher_is_better is None else "max" if higher_is_better else "min"


def _words(name: str) -> set[str]:
    """The words of a name, in any of the usual spellings; with and without figures and stages that stick to them."""
    chunks = re.findall(r"[A-Za-z0-9]+", name)
    words = {w.lower() for chunk in chunks for w in (chunk, *PIECE.findall(chunk))}
    words |= {STAGE.sub("", w) for w in words}
    return words | {w.rstrip("0123456789") for w in words}
