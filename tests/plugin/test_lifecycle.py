"""Beginnings, ends, interruptions and mistakes."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint as OtherModelCheckpoint
from pytorch_lightning.loggers import CSVLogger as OtherCSVLogger
from torch.utils.data import DataLoader

from lightning_ckmerge import (
    ArtifactConfig,
    BufferConfig,
    CheckpointMergeCallback,
    EvaluationConfig,
    SearchConfig,
    pipeline,
)
from lightning_ckmerge.artifact.history import read_history
from lightning_ckmerge.artifact.load import load_merged
from lightning_ckmerge.artifact.timeline import read_timeline
from lightning_ckmerge.config import Constraint
from lightning_ckmerge.errors import ConfigError, MonitorError, UnsupportedError
from lightning_ckmerge.report.run import render_run_markdown
from lightning_ckmerge.search import engine
from tests.support.bitwise import Case, assert_same_run, assert_searched, compare_runs, fit, fit_plain, merges_dir
from tests.support.models import BATCH, NUM_TRAIN, Classifier, Points, points_loader
from tests.support.trainers import SearchNow, make_merge, manifests

NUM_BATCHES = NUM_TRAIN // (2 * BATCH)


def search_with(**options: Any) -> SearchConfig:
    return SearchConfig(**{"n_trials": 2, "max_fraction_of_training": None, **options})


class Fails(Classifier):
    """Its validation fails at one batch, counted over all searches; ``error`` says how."""

    def __init__(self, fail_at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.fail_at, self.error = fail_at, error

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if searching(self.trainer):
            Fails.num_searched += 1
            if Fails.num_searched == self.fail_at:
                raise self.error("no such batch")

    num_searched = 0


def searching(trainer: pl.Trainer) -> bool:
    return not trainer.sanity_checking and any(
        c._run is not None and c._run._is_searching for c in trainer.callbacks if isinstance(c, CheckpointMergeCallback)
    )


@pytest.mark.parametrize("fail_at", [3, 25])
def test_a_failing_search_changes_nothing_and_ends_nothing(fail_at: int, tmp_path: Path) -> None:
    Fails.num_searched = 0
    case = Case(model=partial(Fails, fail_at, ValueError), expected=["No merge at step .*: ValueError: no such batch"])
    plain = fit(case, tmp_path / "plain")
    merged = fit(case, tmp_path / "merged", [make_merge(on_error="warn")])
    compare_runs(plain, merged)
    assert [m["step"] for m in manifests(merges_dir(merged))] == [10]


def test_a_failing_search_ends_training_where_that_is_wanted(tmp_path: Path) -> None:
    Fails.num_searched = 0
    with pytest.raises(ValueError, match="no such batch"):
        fit(Case(model=partial(Fails, 20, ValueError)), tmp_path, [make_merge()])


class Witness(pl.Callback):
    """Keeps the weights before the search and when the exception arrives."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.after = {n: t.clone() for n, t in pl_module.state_dict().items()}


class Before(pl.Callback):
    def __init__(self, witness: Witness) -> None:
        self.witness = witness

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.witness.before = {n: t.clone() for n, t in pl_module.state_dict().items()}


def test_an_interrupt_inside_a_search_leaves_the_live_weights(tmp_path: Path) -> None:
    Fails.num_searched = 0
    witness = Witness()
    merge = make_merge(search_on_train_end=True)
    case = Case(model=partial(Fails, 20, KeyboardInterrupt), callbacks=lambda: [witness])
    with pytest.raises(SystemExit):
        fit(case, tmp_path, [Before(witness), merge])
    assert witness.before
    assert all(torch.equal(witness.before[n], witness.after[n]) for n in witness.after)
    assert not list(tmp_path.rglob("step=*"))  # nobody who presses Ctrl-C in a search wants another one


class Interrupts(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_with_a_search(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(
            Case(callbacks=lambda: [Interrupts()]), tmp_path, [make_merge(every_n_epochs=100, search_on_train_end=True)]
        )
    assert [m["step"] for m in manifests(tmp_path / "logs" / "version_0" / "merges")] == [9]


def test_a_search_does_not_start_another(tmp_path: Path) -> None:
    """A module may ask for a search in a hook that the search itself runs."""

    class Asks(Classifier):
        def on_validation_end(self) -> None:
            for callback in self.trainer.callbacks:
                if isinstance(callback, CheckpointMergeCallback) and searching(self.trainer):
                    assert callback.search_now() is None

    assert_searched(fit(Case(model=Asks), tmp_path, [make_merge()]), 2)


ENDLESS: dict[str, dict[str, Any]] = {
    "steps": {"max_epochs": -1, "max_steps": 14},
    "time": {"max_epochs": -1, "max_time": timedelta(hours=1), "limit_train_batches": 6},
    "stream": {"max_epochs": 2},
}


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 14


@pytest.mark.parametrize("name", ENDLESS)
def test_runs_of_unknown_length(name: str, tmp_path: Path) -> None:
    case = Case(
        trainer=ENDLESS[name],
        train=lambda: points_loader(train=True, iterable=name == "stream"),
        callbacks=lambda: [Stops()],
        merge={"search_on_train_end": True},
    )
    assert_same_run(case, tmp_path, min_searches=3)


def test_searches_by_the_clock(tmp_path: Path) -> None:
    buffer = BufferConfig(every_n_train_steps=1)
    merge = {"train_time_interval": timedelta(microseconds=1), "buffer": buffer}
    run = assert_same_run(Case(merge=merge, trainer={"max_epochs": 1}), tmp_path)
    assert len(read_timeline(merges_dir(run))) >= NUM_BATCHES - 2


def test_fast_dev_run_does_nothing(tmp_path: Path) -> None:
    merge = make_merge(search_on_train_end=True)
    fit(Case(trainer={"fast_dev_run": True}), tmp_path, [merge, SearchNow()])
    assert merge.best_artifact is None
    assert not list(tmp_path.rglob("merges"))


@pytest.mark.parametrize("several", [False, True])
def test_a_misspelt_monitor_is_found_before_the_first_step(several: bool, tmp_path: Path) -> None:
    case = Case(val=lambda: [points_loader(train=False) for _ in range(1 + several)])
    merge = make_merge(monitor="val_los")
    with pytest.raises(MonitorError, match=r"got 'val_los'. Logged are: .*val_loss"):
        fit(case, tmp_path, [merge])
    assert merge._run is None


def test_without_a_sanity_check_a_misspelt_monitor_is_only_warned_of(tmp_path: Path) -> None:
    case = Case(trainer={"num_sanity_val_steps": 0}, expected=["`monitor` must be a metric that validation logs"])
    merge = make_merge(monitor="val_los", on_error="warn", every_n_epochs=1)
    plain = fit(case, tmp_path / "plain")
    merged = fit(case, tmp_path / "merged", [merge])
    compare_runs(plain, merged)
    with pytest.warns(UserWarning, match="`monitor` must be a metric"):
        make_merge(monitor="val_los").on_validation_end(merged.trainer, merged.module)


class Keeping(Classifier):
    """Keeps the callbacks among its hyperparameters, as neuralforecast's models do."""

    def __init__(self, callbacks: list[pl.Callback]) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_module_may_keep_the_callback_among_its_hyperparameters(tmp_path: Path) -> None:
    """Goes red if a checkpoint of such a module, Lightning's or ours, would pickle the run in progress."""
    merge = make_merge(artifact=ArtifactConfig(formats=("safetensors", "ckpt")), dirpath=tmp_path / "merges")
    fit(Case(model=lambda: Keeping([merge])), tmp_path, [merge])
    for path in (tmp_path / "checkpoints" / "last.ckpt", *(tmp_path / "merges").glob("step=*/model.ckpt")):
        (kept,) = torch.load(path, weights_only=False)["hyper_parameters"]["callbacks"]
        assert kept.settings == merge.settings
        assert kept._run is None


class NamedByStage(Classifier):
    """Logs under the name of Lightning's stage, as pytorch-forecasting does."""

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(name.replace("val", str(self.trainer.state.stage.value)), *args, **kwargs)


@pytest.mark.parametrize("monitor", ["validate_loss", "validate_los"])
def test_names_that_follow_the_stage_are_judged_in_the_first_validation(monitor: str, tmp_path: Path) -> None:
    """Goes red if the sanity check, which logs other names than validation, refuses the run's `monitor`."""
    case = Case(model=NamedByStage, expected=["`monitor` must be a metric that validation logs"])
    merge = make_merge(monitor=monitor, dirpath=tmp_path / "merges", on_error="warn")
    fit(case, tmp_path, [merge])
    assert bool(manifests(tmp_path / "merges")) == (monitor == "validate_loss")


class Renamed(Classifier):
    """Logs its accuracy, an object of torchmetrics, under a name that says nothing."""

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log("quality" if name == "val_acc" else name, *args, **kwargs)


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize(
    "arguments",
    [{"monitor": "quality"}, {"search": SearchConfig(n_trials=1, constraints=[Constraint(monitor="quality")])}],
)
def test_a_mode_against_the_metric_object_is_refused(sanity: int, arguments: dict[str, Any], tmp_path: Path) -> None:
    """In the sanity check where there is one; without, no search publishes."""
    case = Case(model=Renamed, trainer={"num_sanity_val_steps": sanity})
    merge = make_merge(**arguments)
    with pytest.raises(
        ConfigError, match="got 'min' for 'quality', for which higher is better according to torchmetrics"
    ):
        fit(case, tmp_path, [merge])
    assert not list(tmp_path.rglob("manifest.json"))


def test_no_validation_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs validation batches"):
        fit(Case(trainer={"limit_val_batches": 0}), tmp_path, [make_merge()])


def test_a_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must start anew"):
        fit(
            Case(val=lambda: iter(points_loader(train=False)), trainer={"limit_val_batches": 4}),
            tmp_path,
            [make_merge()],
        )


def test_an_unknown_method_for_data_is_told(tmp_path: Path) -> None:
    merge = make_merge(evaluation=EvaluationConfig(dataloader="no_such"))
    with pytest.raises(ConfigError, match="got 'no_such'"):
        fit(Case(), tmp_path, [merge])


def test_several_callbacks_in_one_trainer(tmp_path: Path) -> None:
    plain = fit_plain(Case(), tmp_path / "plain")
    merges = [
        make_merge(dirpath=tmp_path / name, monitor=monitor) for name, monitor in (("a", "val_loss"), ("b", "val_hard"))
    ]
    merged = fit(Case(), tmp_path / "merged", merges)
    compare_runs(plain, merged)
    assert_searched(merged, 2)
    assert len({m.state_key for m in merges}) == 2
    saved = torch.load(merged.root / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert {m.state_key for m in merges} <= saved.keys()


def test_two_callbacks_cannot_share_a_directory(tmp_path: Path) -> None:
    merges = [make_merge(dirpath=tmp_path / "m"), make_merge(dirpath=tmp_path / "m", monitor="val_acc", mode="max")]
    with pytest.raises(ConfigError, match="`dirpath` of its own"):
        fit(Case(), tmp_path, merges)


def test_an_unsupported_strategy_is_refused_before_training(tmp_path: Path) -> None:
    class Elsewhere(pl.strategies.ParallelStrategy):
        def __init__(self) -> None:
            super().__init__()

        broadcast = all_gather = barrier = reduce = root_device = model_to_device = is_global_zero = None

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = Elsewhere
    with pytest.raises(UnsupportedError, match="Elsewhere"):
        CheckpointMergeCallback().setup(trainer, Classifier(), "fit")


def test_the_other_package_of_the_same_trainer(tmp_path: Path) -> None:
    """``import pytorch_lightning`` has classes of its own, also for modules and callbacks."""

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout(0.1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    weights = []
    for merges in ([], [make_merge(dirpath=tmp_path / "merges")]):
        pytorch_lightning.seed_everything(1, verbose=False)
        trainer = pytorch_lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=[*merges, OtherModelCheckpoint(tmp_path / f"{len(merges)}", monitor="val_loss")],
            logger=OtherCSVLogger(tmp_path / f"csv{len(merges)}"),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Other()
        trainer.fit(module, points_loader(train=True, noise="global"), points_loader(train=False, noise="global"))
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert len(manifests(tmp_path / "merges")) == 2


def test_the_merge_is_loaded_after_the_last_checkpoint(tmp_path: Path) -> None:
    """Checkpoints hold the weights that training ended with; the module then holds the merge."""
    plain = fit_plain(longer(), tmp_path / "plain")
    merge = make_merge(apply="on_train_end", every_n_epochs=100, search_on_train_end=True)
    merged = fit(longer(), tmp_path / "merged", [merge])
    artifact = merge.best_artifact
    assert artifact is not None
    assert artifact.manifest["step"] == merged.trainer.global_step
    expected = Classifier()
    load_merged(artifact, expected)
    ours, theirs = merged.module.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    saved = torch.load(merged.root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = torch.load(plain.root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[n], trained[n]) for n in trained)
    assert any(not torch.equal(saved[n], ours[n]) for n in ours)


def longer() -> Case:
    """A run with a constant, high learning rate, at whose end a merge does help, on data enough to say so."""
    return Case(
        model=partial(Classifier, scheduler=None, optimizer="sgd"),
        trainer={"max_epochs": 5},
        val=lambda: DataLoader(Points(320, 2), batch_size=8),
    )


LIMITS: dict[str, dict[str, Any]] = {
    "search.timeout_s": {"timeout_s": 1e-9, "max_fraction_of_training": None},
    "search.max_fraction_of_training": {"max_fraction_of_training": 1e-9},
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_search_that_cannot_keep_within_its_limit_is_skipped(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with `on_error: raise`: nothing is wrong. The second search knows beforehand what the first one lacked."""
    with caplog.at_level("INFO"):
        run = fit(Case(), tmp_path, [make_merge(search=SearchConfig(n_trials=2, **LIMITS[name]))])
    lines = [r.message for r in caplog.records if r.message.startswith("No merge search at step ")]
    assert len(lines) == 2
    assert all(f"Raise `{name}`, or search less often." in line for line in lines)
    assert "the shortest search needs" in lines[1]
    first, second = read_timeline(merges_dir(run))
    assert [r["status"] for r in (first, second)] == ["skipped", "skipped"]
    assert (first["step"], second["step"]) == (5, 10)
    assert lines[1].endswith(second["reason"])
    assert sum(first["cost"]["seconds"].values()) > sum(second["cost"]["seconds"].values())
    assert "No search took place" in render_run_markdown(read_history(merges_dir(run)))
    assert "No search took place" in (merges_dir(run) / "report.html").read_text()


def test_too_early_to_merge_is_no_fault(tmp_path: Path) -> None:
    buffer = BufferConfig(every_n_train_steps=100, update_every_n_steps=100)
    run = fit(Case(), tmp_path, [make_merge(buffer=buffer)])
    assert {r["status"] for r in read_timeline(merges_dir(run))} == {"skipped"}


def test_a_search_stops_early_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a batch takes a second, and all else no time."""
    now = 0.0

    class Slow(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            nonlocal now
            super().validation_step(batch, batch_idx)
            now += searching(self.trainer)

    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(engine, "time", clock)
    monkeypatch.setattr(pipeline, "time", clock)
    monkeypatch.setattr(pipeline, "Budget", partial(pipeline.Budget, clock=clock.monotonic))
    options = search_with(n_trials=500, timeout_s=60, min_gain_left=0)
    run = fit(Case(model=Slow), tmp_path, [make_merge(search=options, every_n_train_steps=8)])
    (manifest,) = manifests(merges_dir(run))
    assert 0 < len(manifest["trials"]) < 500
    assert "search.timeout_s" in manifest["cost"]["stopped_early"]
    assert sum(manifest["cost"]["seconds"].values()) < 70


def test_a_checkpoint_saved_after_training_holds_the_buffer(tmp_path: Path) -> None:
    merge = make_merge()
    run = fit(Case(), tmp_path, [merge])
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"][merge.state_key]
    assert state["schedule"]["step"] == run.trainer.global_step
    assert state["buffers"][0]["entries"]
