"""A search shows on the Trainer's own progress bar, at every moment at which it can run."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_module

from lightning_ckmerge import CheckpointMergeCallback, SearchConfig
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.plugin.progress import harmless
from tests.support.bitwise import Case, assert_searched, fit, merges_dir
from tests.support.models import Classifier, points_loader
from tests.support.trainers import SearchNow, make_merge

BARS: dict[str, Callable[[], pl.Callback]] = {
    "tqdm": TQDMProgressBar,
    "rich": lambda: RichProgressBar(console_kwargs={"force_terminal": True, "width": 160}),
}
# Its metrics do not fit into one line, so that it is two rows high or more.
NARROW = {"rich, narrow": lambda: RichProgressBar(console_kwargs={"force_terminal": True, "width": 60})}
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
    text = output(tmp_path, capfd, BARS[bar](), SearchNow(min_step=3), every_n_epochs=100)
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


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("bar", [*BARS, *NARROW, "none"])
def test_what_is_said_stays_on_the_terminal(bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a bar is drawn over the plan, a verdict or the summary, or if a verdict is a warning.

    Bar and log share one terminal, whose screen is worked out from what they write. All warnings are ignored.
    """
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    # The package that was imported last, lightning.pytorch or pytorch_lightning, has the logger of both.
    logger = logging.getLogger(rank_zero_module.log.name.partition(".utilities")[0])
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(terminal)])
    monkeypatch.setattr(logger, "propagate", False)
    case = Case(
        trainer={"enable_progress_bar": bar != "none"},
        callbacks=lambda: [{**BARS, **NARROW}[bar]()] if bar != "none" else [],
    )
    run = fit(case, tmp_path, [make_merge(every_n_train_steps=8, search_on_train_end=True)])
    said = screen(terminal.getvalue())
    plan = ["lightning-ckmerge, the plan of this run:", "  model ", "  disk, buffer and artifacts "]
    verdicts = [f"Merge search at step {r['step']}: " for r in read_timeline(merges_dir(run))]
    summary = [f"lightning-ckmerge: {len(verdicts)} searches: ", "  Use: "]
    assert len(verdicts) == 2
    assert [line for line in [*plan, *verdicts, *summary] if sum(s.startswith(line) for s in said) != 1] == []


class Fails(pl.Callback):
    """Lets the buffer and a picture fail in mid-epoch, and shows warnings where the bar is."""

    def __init__(self, merge: CheckpointMergeCallback, terminal: io.StringIO) -> None:
        self.merge, self.terminal = merge, terminal

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != 6 or self.merge._run is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: print(f"warned: {message}", file=self.terminal)
            for step in (10, 11, 12):  # a disk that is full stays so
                self.merge._run._buffer.rolling._warnings.append(f"No room. Without step {step}.")
                self.merge._run._buffer.warn()
            with harmless("The picture", trainer):
                raise ValueError("no canvas")


@pytest.mark.parametrize("bar", BARS)
def test_what_is_warned_of_stays_on_the_terminal(bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, merge = Terminal(), make_merge(every_n_epochs=100)
    monkeypatch.setattr("sys.stdout", terminal)
    case = Case(trainer={"enable_progress_bar": True}, callbacks=lambda: [BARS[bar](), Fails(merge, terminal)])
    fit(case, tmp_path, [merge])
    said = [line for line in screen(terminal.getvalue()) if line.startswith("warned: ")]
    assert [line.partition(". The search")[0].rstrip() for line in said] == [
        "warned: No room. Without step 10.",
        "warned: No room. Without step 11. Further warnings of this kind are suppressed.",
        "warned: The picture failed: ValueError: no canvas",
    ]


def screen(written: str) -> list[str]:
    """Return the lines that stand on a terminal of any width after this was written."""
    lines, row, column = [""], 0, 0
    for up, erase, text in re.findall(r"\x1b\[(?:(1?A)|([012]?K)|[\d;?]*[a-zA-Z])|(\r|\n|[^\x1b\r\n]+)", written):
        if up:
            row -= 1
        elif erase:
            lines[row] = "" if erase == "2K" else lines[row][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        else:
            lines[row] = f"{lines[row][:column]:{column}}{text}{lines[row][column + len(text) :]}"
            column += len(text)
    return lines


def test_a_warning_of_the_run_is_shown_as_often_as_without_searches(tmp_path: Path) -> None:
    """Goes red where Python forgets what it has warned of: Optuna and others change the filters for a moment."""

    class Warns(Classifier):
        def training_step(self, *args: Any) -> Any:
            warnings.warn("in training", stacklevel=1)
            return super().training_step(*args)

        def validation_step(self, *args: Any) -> Any:
            warnings.warn("in validation", stacklevel=1)
            return super().validation_step(*args)

    def count(*merges: pl.Callback) -> Counter[str]:
        globals().pop("__warningregistry__", None)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            trainer = pl.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
            trainer.callbacks.extend(merges)
            trainer.fit(Warns(), points_loader(train=True), points_loader(train=False))
        return Counter(str(w.message) for w in shown if str(w.message).startswith("in "))

    merge = make_merge(dirpath=tmp_path / "merges", search=SearchConfig(n_trials=8, max_fraction_of_training=None))
    assert count(merge) == count() == {"in training": 1, "in validation": 1}
    assert read_timeline(tmp_path / "merges")
