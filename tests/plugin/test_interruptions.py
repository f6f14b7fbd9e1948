"""What comes from outside in the middle of a search waits until the run's own weights are back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_ckmerge.artifact.timeline import read_timeline
from tests.plugin.test_lifecycle import searching
from tests.support.bitwise import Case, Run, compare_runs, fit, merges_dir
from tests.support.models import Classifier
from tests.support.trainers import make_merge, merge_callbacks

Outside = Callable[["Interrupted"], None]


class Interrupted(Classifier):
    """Something happens in the third batch of the first search."""

    num_searched = 0

    def __init__(self, outside: Outside) -> None:
        super().__init__()
        self.outside = outside

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        if searching(self.trainer):
            Interrupted.num_searched += 1
            if Interrupted.num_searched == 3:
                self.outside(self)
        return loss


class Keeps(pl.Callback):
    """The run's own weights before each search; on a class, which the guard around a search does not put back."""

    weights: ClassVar[dict[str, Any]] = {}
    handler: ClassVar[Any] = None
    trainer: ClassVar[Any] = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        Keeps.weights = {n: t.clone() for n, t in pl_module.state_dict().items()}


def train(root: Path, outside: Outside, **options: Any) -> Run:
    Interrupted.num_searched = 0
    case = Case(model=partial(Interrupted, outside), **options)
    return fit(case, root, [Keeps(), make_merge()])


def assert_live(path: Path, but: str = "") -> None:
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() == Keeps.weights.keys()
    assert all(torch.equal(saved[name], Keeps.weights[name]) for name in saved.keys() - {but})


def statuses(run: Run) -> list[str]:
    return [r["status"] for r in read_timeline(merges_dir(run))]


@contextmanager
def handling(signum: int, handler: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signum, handler)
    try:
        yield
        assert signal.getsignal(signum) is handler
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT], ids=["SIGUSR1", "SIGINT"])
def test_a_handler_runs_once_a_signal_with_the_runs_own_weights(signum: signal.Signals, tmp_path: Path) -> None:
    """The search is given up at the next batch, and what the handler asks for is done."""
    calls: list[int] = []

    def handler(received: int, frame: Any) -> None:
        calls.append(received)
        Keeps.trainer.save_checkpoint(tmp_path / f"{len(calls)}.ckpt")
        Keeps.trainer.should_stop = True

    def outside(module: Interrupted) -> None:
        Keeps.trainer = module.trainer
        for sent in (signum, signum, signal.SIGUSR2):
            signal.raise_signal(sent)
            signal.raise_signal(signal.SIGWINCH)  # tells of the terminal, and ends nothing
        assert calls == []

    with handling(signal.SIGUSR2, handler), handling(signum, handler):
        run = train(tmp_path, outside)
    assert calls == [signum, signum, signal.SIGUSR2]
    assert Interrupted.num_searched == 3
    for n in (1, 2, 3):
        assert_live(tmp_path / f"{n}.ckpt")
    (record,) = read_timeline(merges_dir(run))
    assert record["status"] == "skipped"
    assert f"{signum.name} arrived" in record["reason"]
    assert run.trainer.global_step == record["step"] == 5


def test_slurm_requeues_with_the_runs_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    environment = {"plugins": [SLURMEnvironment(auto_requeue=True)]}
    train(tmp_path, lambda module: os.kill(os.getpid(), signal.SIGUSR1), trainer=environment)
    assert_saved_at(tmp_path / "hpc_ckpt_1.ckpt", step=5)


def assert_saved_at(path: Path, step: int) -> None:
    assert torch.load(path, weights_only=True)["global_step"] == step


def test_sigterm_ends_training_as_it_does_without_us(tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        train(tmp_path, lambda module: os.kill(os.getpid(), signal.SIGTERM))
    assert Interrupted.num_searched == 3


def test_a_handler_set_in_mid_search_stays(tmp_path: Path) -> None:
    """Also one that calls the one before it, in this search and the next."""
    calls: list[str] = []

    def outside(module: Interrupted) -> None:
        before = signal.getsignal(signal.SIGUSR1)
        assert callable(before)
        Keeps.handler = lambda *a: (calls.append("new"), before(*a))
        signal.signal(signal.SIGUSR1, Keeps.handler)

    class Sends(pl.Callback):
        def on_train_end(self, *_: Any) -> None:
            assert signal.getsignal(signal.SIGUSR1) is Keeps.handler
            signal.raise_signal(signal.SIGUSR1)

    with handling(signal.SIGUSR1, lambda *_: calls.append("old")):
        run = train(tmp_path, outside, callbacks=lambda: [Sends()])
    assert statuses(run).count("skipped") == 0
    assert calls == ["new", "old"]


def test_what_a_hook_of_validation_asks_for_in_a_search_is_not_done(tmp_path: Path) -> None:
    """A search validates candidates; without it there would be neither these checkpoints nor this stop."""

    def outside(module: Interrupted) -> None:
        module.trainer.should_stop = True
        for save in (module.trainer.save_checkpoint, partial(module.trainer.strategy.save_checkpoint, {})):
            save(tmp_path / "hook.ckpt")
            thread = threading.Thread(target=save, args=(tmp_path / "hook.ckpt",))
            thread.start()
            thread.join()

    merged = train(tmp_path / "merged", outside, expected=["A validation hook saves checkpoints"])
    plain = fit(Case(model=partial(Interrupted, outside)), tmp_path / "plain", [Keeps()])
    compare_runs(plain, merged)
    assert not (tmp_path / "hook.ckpt").exists()
    assert "skipped" not in statuses(merged)


def test_another_thread_saves_the_runs_own_weights_and_may_end_training(tmp_path: Path) -> None:
    """One that was there before the search, such as a timer's."""
    go, stopped = threading.Event(), threading.Event()

    def watch() -> None:
        go.wait()
        Keeps.trainer.should_stop = True
        stopped.set()
        Keeps.trainer.save_checkpoint(tmp_path / "thread.ckpt")

    def outside(module: Interrupted) -> None:
        Keeps.trainer = module.trainer
        go.set()
        stopped.wait()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    run = train(tmp_path, outside)
    thread.join()
    assert run.trainer.global_step == 5
    assert type(run.trainer) is pl.Trainer
    assert not {"save_checkpoint"} & (vars(run.trainer).keys() | vars(run.trainer.strategy).keys())
    assert torch.load(tmp_path / "thread.ckpt", weights_only=True)["global_step"] == 5
    # The run's own validation, which goes on beside the thread, counts.
    assert_live(tmp_path / "thread.ckpt", but="num_seen")


def test_a_search_waits_until_another_thread_has_saved(tmp_path: Path) -> None:
    """Goes red if a search puts a candidate where a checkpoint is still being written from."""
    go, saving = threading.Event(), threading.Event()

    class Slow(Interrupted):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if threading.current_thread() is thread:
                saving.set()
                time.sleep(1)

    class SearchesAgain(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert saving.wait(600)
            merge_callbacks(trainer)[0].search_now()

    def save() -> None:
        assert go.wait(600)
        Keeps.trainer.save_checkpoint(tmp_path / "thread.ckpt")

    def outside(module: Interrupted) -> None:
        Keeps.trainer = module.trainer
        go.set()

    Interrupted.num_searched = 0
    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    case = Case(model=partial(Slow, outside), trainer={"max_epochs": 1})
    fit(case, tmp_path, [Keeps(), SearchesAgain(), make_merge(every_n_train_steps=6)])
    thread.join()
    assert_live(tmp_path / "thread.ckpt", but="num_seen")


def test_a_heartbeat_ends_no_search(tmp_path: Path) -> None:
    """Goes red if a signal that comes again and again keeps every search from its end, or runs its handler in one."""
    calls: list[bool] = []

    def outside(module: Interrupted) -> None:
        Keeps.trainer = module.trainer
        for _ in range(3):
            signal.raise_signal(signal.SIGALRM)
        assert calls == []

    with handling(signal.SIGALRM, lambda *_: calls.append(searching(Keeps.trainer))):
        run = train(tmp_path, outside)
    assert len(calls) == 1
    assert "skipped" not in statuses(run)
