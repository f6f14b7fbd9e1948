"""A search shows on the Trainer's own progress bar, at every moment at which it can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from tests.plugin.runs import Case, SearchAtValidationEnd, assert_searched, fit, make_merge

BARS: dict[str, Callable[[], pl.Callback]] = {
    "tqdm": TQDMProgressBar,
    "rich": lambda: RichProgressBar(console_kwargs={"force_terminal": True, "width": 160}),
}
MOMENTS: dict[str, dict[str, Any]] = {
    "batch end": {"every_n_train_steps": 5},
    "epoch end": {"every_n_epochs": 1},
    "train end": {"every_n_epochs": 100, "search_on_train_end": True},
}


def output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], bar: pl.Callback, *more: pl.Callback, **merge: Any
) -> str:
    case = Case(trainer={"enable_progress_bar": True}, callbacks=lambda: [bar, *more])
    run = fit(case, tmp_path, [make_merge(**merge)])
    assert_searched(run)
    text = "".join(capfd.readouterr())
    assert "Traceback" not in text
    assert "Error" not in text
    return text


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("bar", BARS)
def test_a_search_has_a_line_of_its_own(
    bar: str, moment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = output(tmp_path, capfd, BARS[bar](), **MOMENTS[moment])
    assert "Merge search at step" in text
    assert "best " in text
    assert "Epoch 1" in text  # the training bar went on


@pytest.mark.parametrize("bar", BARS)
def test_a_search_within_validation_leaves_its_bar_alone(
    bar: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = output(tmp_path, capfd, BARS[bar](), SearchAtValidationEnd(), every_n_epochs=100)
    assert "Merge search at step" in text
    assert "Validation" in text


def test_another_bar_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bar of the user's own need not be able to show one more line."""

    class Own(pl.callbacks.ProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.enabled = True

        def disable(self) -> None:
            self.enabled = False

        def enable(self) -> None:
            self.enabled = True

    output(tmp_path, capfd, Own(), every_n_train_steps=5)  # which asserts that searches took place
