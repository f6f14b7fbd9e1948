"""What a search measures is what validation would have logged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_ckmerge import BufferConfig, Constraint, EvaluationConfig, SearchConfig
from lightning_ckmerge.artifact.load import load_merged
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.errors import ConfigError, MonitorError
from lightning_ckmerge.plugin.evaluate.candidate import Candidate
from lightning_ckmerge.plugin.evaluate.halves import confirms
from lightning_ckmerge.plugin.evaluate.validation import Validation
from lightning_ckmerge.plugin.restore.paused_run import PausedRun
from lightning_ckmerge.report.view import build_view
from tests.support.bitwise import Case, fit, merges_dir
from tests.support.models import NUM_VAL, Classifier, Points, Stream, TinyGPT, points_loader, tokens_loader
from tests.support.trainers import make_merge, make_trainer, manifests
from tests.support.warnings import only_expected

# The loss falls while these train, so that, searching for high ones, older weights win; too few batches for a verdict,
# so weights are published in any case.
HIGHEST: dict[str, Any] = {"mode": "max", "check_mode": False, "every_n_train_steps": 10}
FEW = 8
QUICK: dict[str, Any] = {"max_steps": 5, "max_epochs": -1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 9}
GPT = Case(model=TinyGPT, train=partial(tokens_loader, train=True), val=partial(tokens_loader, train=False))


class Proposes(optuna.samplers.BaseSampler):
    """Proposes the same coordinates each time."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return param_distribution.high


class ValidationLoss(pl.Callback):
    """What the run's own validation logs."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Score]]:
    """Collects what the real evaluation returns."""
    collected: list[tuple[str, Score]] = []
    original = Validation.run

    def run(self: Validation, half: Any, keep_going: Any = None) -> Score:
        score = original(self, half, keep_going)
        collected.append((half, score))
        return score

    monkeypatch.setattr(Validation, "run", run)
    return collected


def losses_of(module: pl.LightningModule, loader: DataLoader[Any]) -> list[float]:
    """The logged loss of each batch alone, by a plain ``Trainer.validate``."""
    size = loader.batch_size
    assert size is not None
    starts = range(0, len(loader.dataset), size)  # type: ignore[arg-type]
    found = []
    for start in starts:
        batch = Subset(loader.dataset, range(start, min(start + size, len(loader.dataset))))  # type: ignore[arg-type]
        with only_expected():
            (logged,) = make_trainer().validate(module, DataLoader(batch, batch_size=size), verbose=False)
        found.append(logged["val_loss"])
    return found


def test_values_are_those_of_a_plain_validation_of_the_artifact(
    tmp_path: Path, scores: list[tuple[str, Score]]
) -> None:
    run = fit(GPT, tmp_path, [make_merge(**HIGHEST, evaluation=EvaluationConfig(limit_batches=FEW))])
    (manifest,) = manifests(merges_dir(run))
    winner = manifest["verdict"]["winner"]
    search, confirm = ([s for h, s in scores if h == half] for half in ("search", "confirm"))
    names = [t["name"] for t in [*manifest["anchors"], *manifest["trials"]]]
    measured = {"search": search[names.index(winner)], "confirm": [s for s in confirm if s.complete][-1]}
    module = TinyGPT()
    load_merged(merges_dir(run) / "step=000000010", module)
    losses = losses_of(module, tokens_loader(train=False))[:FEW]
    for half, score in measured.items():
        expected = [x for b, x in enumerate(losses) if confirms(b, 0.5) == (half == "confirm")]
        assert score.values_B == pytest.approx(expected, abs=1e-6)
        assert score.sizes_B == (4.0,) * 4
    assert manifest["verdict"]["value"] == pytest.approx(measured["confirm"].value)


def test_both_halves_of_the_latest_weights_make_up_the_real_validation(tmp_path: Path) -> None:
    """The last batch is a short one: the halves are weighted by their samples."""
    logged = ValidationLoss()
    case = Case(**{**vars(GPT), "callbacks": lambda: [logged]})
    run = fit(case, tmp_path, [make_merge(every_n_epochs=1)])
    for manifest in manifests(merges_dir(run)):
        latest, evaluation = manifest["anchors"][0], manifest["evaluation"]
        sizes = evaluation["search_samples"], evaluation["confirm_samples"]
        values = latest["search"]["value"], latest["confirm"]["value"]
        assert sum(sizes) == 38
        mean = sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes)
        assert mean == pytest.approx(logged.values[manifest["step"]], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_candidate_scored_again_has_the_same_value(workers: int, tmp_path: Path) -> None:
    """Bit for bit, though samples are noisy and shuffled, and validation writes state that it reads."""
    search = SearchConfig(n_trials=3, max_fraction_of_training=None, sampler=Proposes())
    merge = make_merge(every_n_train_steps=8, search=search, evaluation=EvaluationConfig(staged=False))
    noisy = partial(points_loader, train=False, noise="own" if not workers else "global", shuffle=True)
    run = fit(Case(val=partial(noisy, num_workers=workers)), tmp_path, [merge])
    (manifest,) = manifests(merges_dir(run))
    first, *others = [t["search"] for t in manifest["trials"]]
    assert len(others) == 2
    assert others == [first, first]


@pytest.mark.parametrize(("monitor", "mode"), [("val_acc", "max"), ("val_hard", "min"), ("val_loss_epoch", "min")])
def test_any_logged_metric_can_be_the_monitor(
    monitor: str, mode: Any, tmp_path: Path, scores: list[tuple[str, Score]]
) -> None:
    """A metric object and one of an epoch hook have no batches to compare: the verdict compares blocks of them."""
    model = Classifier if monitor != "val_loss_epoch" else StepsAsWell
    run = fit(Case(model=model), tmp_path, [make_merge(monitor=monitor, mode=mode)])
    for manifest in manifests(merges_dir(run)):
        assert (manifest["monitor"], manifest["mode"]) == (monitor, mode)
        trials = [*manifest["anchors"], *manifest["trials"]]
        complete = [t["search"]["value"] for t in trials if t["search"]["complete"]]
        best = (max if mode == "max" else min)(complete)
        winner = next(t for t in trials if t["name"] == manifest["verdict"]["winner"])
        assert winner["search"]["value"] == best
    # An artifact's own check takes one block.
    confirmed = [s for half, s in scores if half == "confirm" and s.values_B is not None and len(s.values_B) > 1]
    assert confirmed
    assert all(len(s.values_B or ()) == 5 for s in confirmed)
    if mode == "max":
        assert all(s.metrics["val_acc"] == s.value for s in confirmed)


def test_a_metric_that_is_no_mean_lacks_blocks_not_batches(tmp_path: Path) -> None:
    few = EvaluationConfig(limit_batches=FEW)
    run = fit(Case(), tmp_path, [make_merge(**HIGHEST, monitor="val_hard", evaluation=few)])
    (manifest,) = manifests(merges_dir(run))
    assert manifest["verdict"]["status"] == "unconfirmed"
    assert "and 4 blocks are too few" in manifest["verdict"]["sentence"]


class StepsAsWell(Classifier):
    """Logs each step of its validation, so that the epoch's mean has a name of its own."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        super().log(name, value, **{**options, "on_step": name == "val_loss" or options.get("on_step")})


def test_every_metric_on_every_loader_is_kept_of_those_that_the_verdict_compares(tmp_path: Path) -> None:
    """Chosen by one loader's loss; a step's hook logs each metric once a loader, an epoch's once."""
    case = Case(val=lambda: [points_loader(train=False), points_loader(train=False, shuffle=True)])
    run = fit(case, tmp_path, [make_merge(monitor="val_loss/dataloader_idx_1", every_n_train_steps=8)])
    (manifest,) = manifests(merges_dir(run))
    view = build_view(manifest)
    assert view.metrics_half == "confirmation"
    assert {view.compared[0], view.compared[-1]} == {"latest", manifest["verdict"]["winner"]}
    assert [(row.name, row.role) for row in view.metrics] == [
        ("val_loss/dataloader_idx_1", "monitored"),
        ("val_acc/dataloader_idx_0", ""),
        ("val_acc/dataloader_idx_1", ""),
        ("val_hard", ""),
        ("val_loss/dataloader_idx_0", ""),
    ]
    assert all("–" not in (*row.values, row.change) for row in view.metrics)


def test_batch_statistics_are_estimated_anew(tmp_path: Path) -> None:
    """The published BatchNorm statistics are the mean over the first training batches; frozen layers keep theirs."""
    evaluation = EvaluationConfig(recalibrate_batches=2, limit_batches=FEW)
    train = partial(points_loader, train=True, shuffle=False)
    run = fit(Case(train=train), tmp_path, [make_merge(**HIGHEST, evaluation=evaluation)])
    module = Classifier()
    load_merged(merges_dir(run) / "step=000000010", module)
    inputs = [module.net[0](x).detach() for x, _ in list(train())[:2]]
    norm = module.net[1]
    torch.testing.assert_close(norm.running_mean, mean_of([x.mean(0) for x in inputs]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, mean_of([x.var(0) for x in inputs]), rtol=1e-5, atol=1e-6)
    frozen = Classifier().frozen[1]
    assert isinstance(frozen, nn.BatchNorm1d)
    torch.testing.assert_close(module.frozen[1].running_mean, frozen.running_mean)


def mean_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def test_a_constraint_is_held(tmp_path: Path) -> None:
    constraint = Constraint(monitor="val_acc", mode="max", allowance=0.02)
    search = SearchConfig(n_trials=4, max_fraction_of_training=None, constraints=[constraint])
    merge = make_merge(
        search=search, evaluation=EvaluationConfig(staged=False), buffer=BufferConfig(every_n_train_steps=1)
    )
    run = fit(Case(), tmp_path, [merge])
    seen = set()
    for manifest in manifests(merges_dir(run)):
        trials = [*manifest["anchors"], *manifest["trials"]]
        before = trials[0]["search"]["metrics"]["val_acc"]
        for trial in trials:
            assert trial["feasible"] == (before - trial["search"]["metrics"]["val_acc"] <= 0.02)
            seen.add(trial["feasible"])
        assert next(t for t in trials if t["name"] == manifest["verdict"]["winner"])["feasible"]
    assert seen == {True, False}


def test_a_misspelt_constraint_is_told(tmp_path: Path) -> None:
    search = SearchConfig(n_trials=1, max_fraction_of_training=None, constraints=[Constraint(monitor="val_ac")])
    with pytest.raises(MonitorError, match="got 'val_ac'"):
        fit(Case(), tmp_path, [make_merge(search=search)])


class Pairs(Classifier):
    """Validates on batches of several loaders, where one may be at its end."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for part in batch if isinstance(batch[0], (list, tuple)) else [batch]:
            if part is not None:
                super().validation_step(part, batch_idx, dataloader_idx)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])
def test_uneven_loaders_are_confirmed_in_blocks(mode: Any, tmp_path: Path, scores: list[tuple[str, Score]]) -> None:
    """Of 10 and 5 batches 5 and 2 are in the confirmation half; a metric object has no value by batch."""

    def loaders() -> CombinedLoader:
        short = DataLoader(Points(NUM_VAL // 2, 3), batch_size=4)
        return CombinedLoader([points_loader(train=False), short], mode)

    case = Case(model=Pairs, val=loaders, trainer=QUICK)
    (manifest,) = manifests(merges_dir(fit(case, tmp_path, [make_merge(monitor="val_hard")])))
    assert manifest["anchors"][0]["confirm"] is not None
    confirmed = [s for half, s in scores if half == "confirm"]
    assert {len(s.values_B or ()) for s in confirmed[:2]} == {2 if mode == "min_size" else 5}


@pytest.mark.parametrize(
    ("val", "monitor"),
    [
        (lambda: [Subset(points_loader(train=False).dataset, range(4)), None], "val_loss/dataloader_idx_0"),
        (lambda: [Stream(4, 3)], "val_loss"),
        (lambda: [Stream(4, 3)], "val_hard"),
    ],
    ids=["one of several", "without a length", "without a length, no mean"],
)
def test_one_batch_of_the_monitored_loader_leaves_the_search_unconfirmed(
    val: Any, monitor: str, tmp_path: Path
) -> None:
    """It was a `MonitorError` after the whole search."""

    def loaders() -> Any:
        return [points_loader(train=False) if d is None else DataLoader(d, batch_size=4) for d in val()]

    run = fit(Case(val=loaders, trainer=QUICK), tmp_path, [make_merge(monitor=monitor, mode="max", check_mode=False)])
    (manifest,) = manifests(merges_dir(run))
    assert manifest["verdict"]["status"] == "unconfirmed"
    assert any("nothing could be confirmed" in w for w in manifest["verdict"]["warnings"])


def test_a_share_of_all_batches_needs_no_length(tmp_path: Path) -> None:
    """It took one batch; any other share of an unknown number is refused."""
    val = partial(points_loader, train=False, iterable=True)
    case = Case(val=val, trainer=QUICK)
    (manifest,) = manifests(
        merges_dir(fit(case, tmp_path, [make_merge(evaluation=EvaluationConfig(limit_batches=1.0))]))
    )
    evaluation = manifest["evaluation"]
    assert (evaluation["search_batches"], evaluation["confirm_batches"]) == ([5], [5])
    with pytest.raises(ConfigError, match="needs loaders with a length"):
        fit(case, tmp_path, [make_merge(evaluation=EvaluationConfig(limit_batches=0.5))])


def test_everything_is_put_back_before_a_candidate_is_written_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if an evaluation begins where the one before has left random numbers or metrics."""
    seen: list[str] = []

    def watch(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, name, watched)

    for cls, name in ((PausedRun, "begin"), (Candidate, "put"), (Validation, "run")):
        watch(cls, name)
    run = fit(Case(trainer={**QUICK, "max_steps": 10}), tmp_path, [make_merge(**HIGHEST)])
    assert len(manifests(merges_dir(run))) == 1
    # To publish, a candidate is loaded, not scored; to check the artifact, loaded, read and scored.
    *scored, _, _, _, _, _, _ = seen
    assert scored == ["begin", "put", "run"] * (len(scored) // 3)
    assert seen[len(scored) :] == ["begin", "put", "begin", "put", "put", "run"]
