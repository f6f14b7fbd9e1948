"""Ensembles of merges, over checkpoints and over a run's merges, under real Trainers."""

from __future__ import annotations

import copy
import html
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_ckmerge import (
    BufferConfig,
    CheckpointMergeCallback,
    MergedEnsemble,
    SearchConfig,
    build_ensemble,
    load_ensemble,
)
from lightning_ckmerge.artifact.ensembles import PAGE_NAME, publish_ensemble
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.plugin.ensemble import build
from lightning_ckmerge.plugin.ensemble.members import state_of
from lightning_ckmerge.plugin.ensemble.predicting import read_prediction
from lightning_ckmerge.search.averaging import Averaging

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_STEPS, EVERY = 60, 10
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Blobs(pl.LightningModule):
    """Tells three blobs apart, at a rate too high to settle; with BatchNorm, dropout and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(2, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.square = nn.Linear(6, 6)
        self.again = self.square
        self.head = nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.norm(self.widen(x)).relu(), 0.1, self.training)
        logits: Tensor = self.head(self.again(self.square(hidden).relu()) * self.frozen)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (640,), generator=generator)
    centres = torch.tensor([[0.0, 1.0], [1.0, -0.5], [-1.0, -0.5]])
    return TensorDataset(centres[y] + 0.8 * torch.randn(640, 2, generator=generator), y)


def loader(first: int, stop: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(Subset(points(), range(first, stop)), **options)


VAL = loader(320, 640, batch_size=16)
# Batches are dealt in turn; the first one is for the search.
CONFIRM = DataLoader(Subset(points(), [320 + 16 * b + i for b in range(1, 20, 2) for i in range(16)]), batch_size=16)
SEARCH = SearchConfig(space="decay", n_trials=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blobs]:
    """One run, with checkpoints and merges."""
    root = tmp_path_factory.mktemp("run")
    pl.seed_everything(1, verbose=False)
    callbacks = [
        ModelCheckpoint(root / "checkpoints", every_n_train_steps=EVERY, save_top_k=-1),
        CheckpointMergeCallback(
            dirpath=root / "merges",
            buffer=BufferConfig(every_n_train_steps=6),
            search=SearchConfig(n_trials=2, max_fraction_of_training=None),
            on_error="raise",
        ),
    ]
    module = Blobs()
    trainer = pl.Trainer(max_steps=NUM_STEPS, callbacks=callbacks, limit_val_batches=20, **QUIET)
    trainer.fit(module, loader(0, 320, batch_size=16, shuffle=True), VAL)
    return root, module


@pytest.fixture(scope="module")
def built(run: tuple[Path, Blobs]) -> tuple[MergedEnsemble, Path]:
    out = run[0] / "ensemble"
    checkpoints = run[0] / "checkpoints"
    return build_ensemble(
        Blobs(), VAL, checkpoints, out=out, size=3, search=SEARCH, weight_trials=3, with_snapshots=False
    ), out


def states(num: int) -> list[dict[str, Tensor]]:
    """Weights of models that were never trained, each with statistics of its own."""
    found = []
    for seed in range(num):
        torch.manual_seed(seed)
        module = Blobs()
        module.train()
        module(torch.randn(32, 2) * (seed + 1))
        found.append(state_of(module))
    return found


def probabilities(state: dict[str, Tensor], x: Tensor) -> Tensor:
    module = Blobs()
    module.load_state_dict(state, strict=False)  # a tied tensor has one name
    return module.eval()(x).softmax(-1)


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
def test_equal_members_predict_as_one_of_them(averaging: Averaging) -> None:
    (state,), x = states(1), torch.randn(9, 2)
    ensemble = MergedEnsemble(Blobs(), [state] * 3, [0.2, 0.3, 0.5], averaging)
    torch.testing.assert_close(ensemble(x).softmax(-1), probabilities(state, x))


def test_members_have_statistics_of_their_own() -> None:
    """Goes red if BatchNorm's statistics, or the tied layer, are the module's instead of the member's."""
    both, x = states(2), torch.randn(9, 2)
    ensemble = MergedEnsemble(Blobs(), both, [0.25, 0.75])
    expected = 0.25 * probabilities(both[0], x) + 0.75 * probabilities(both[1], x)
    torch.testing.assert_close(ensemble(x).softmax(-1), expected)


def test_an_ensemble_of_linear_models_is_their_merge() -> None:
    """So for outputs that are linear in the weights a merge has all that an ensemble can give, at one pass."""

    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)
            return found

    models, w_M, x = [Linear() for _ in range(3)], (0.5, 0.3, 0.2), torch.randn(7, 4)
    ensemble = MergedEnsemble(models[0], [state_of(m) for m in models], w_M, "outputs")
    merge = copy.deepcopy(models[0])
    for name, parameter in merge.named_parameters():
        parameter.data = sum(w * m.get_parameter(name).data for w, m in zip(w_M, models, strict=True))
    torch.testing.assert_close(ensemble(x), merge(x))


def test_what_is_equal_in_all_members_is_held_once() -> None:
    ensemble = MergedEnsemble(Blobs(), states(3), [0.5, 0.25, 0.25])
    assert set(ensemble.shared.tensors()) == {"frozen", "norm.num_batches_tracked", "norm.weight", "norm.bias"}  # type: ignore[operator]
    assert "widen.weight" in ensemble.states()[2]


def test_the_module_is_left_as_it_was() -> None:
    module = Blobs().train()
    before = copy.deepcopy(module.state_dict())
    ensemble, x = MergedEnsemble(module, states(2), [0.5, 0.5]), torch.randn(50, 2)
    # Goes red if dropout is on, or BatchNorm takes the batch's statistics.
    assert torch.equal(ensemble.train()(x), ensemble(x))
    assert all(m.training for m in module.modules())
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_the_ensemble_moves_as_a_whole() -> None:
    ensemble = MergedEnsemble(Blobs(), states(2), [0.5, 0.5]).double()
    assert {t.dtype for s in ensemble.states() for t in s.values()} == {torch.float64, torch.int64}
    assert ensemble(torch.randn(3, 2).double()).dtype == torch.float64


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0]], ids=["sum", "negative", "few"])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        MergedEnsemble(Blobs(), states(2), weights)


def test_its_account_holds_together(built: tuple[MergedEnsemble, Path]) -> None:
    manifest = built[0].manifest
    assert [c["name"] for c in manifest["comparison"]] == ["latest", "merge", "snapshots", "ensemble"]
    latest, merge, snapshots, ensemble = manifest["comparison"]
    assert sum(m["weight"] for m in manifest["members"]) == pytest.approx(1)
    assert ensemble["forward_passes"] == len(manifest["members"]) == built[0].num_members <= 3
    assert (latest["forward_passes"], merge["forward_passes"]) == (1, 1)
    assert ensemble["gain_over_merge"]["loss"]["gain"] == pytest.approx(merge["loss"] - ensemble["loss"])
    assert manifest["verdict"]["gain"] == pytest.approx(ensemble["gain_over_merge"]["loss"]["gain"])
    assert manifest["verdict"]["notes"] == []
    # Each step of the choice lowers the loss on the search half, and the weights do not raise it again.
    chosen = [step["loss_so_far"] for step in manifest["selection"]["ensemble"]["chosen"]]
    assert chosen == sorted(chosen, reverse=True)
    assert manifest["selection"]["ensemble"]["loss"] <= chosen[-1] + 1e-9
    names = {p["name"] for p in manifest["selection"]["pool"]}
    assert {"block-1-of-3", "block-3-of-3", "latest", f"snapshot-{EVERY}"} <= names
    assert {m["name"] for m in manifest["members"]} <= names - {"latest"}
    assert set(snapshots["members"]) <= {"latest", *(f"snapshot-{s}" for s in range(EVERY, NUM_STEPS, EVERY))}


def test_figures_are_those_of_trainer_validate_on_the_confirmation_half(built: tuple[MergedEnsemble, Path]) -> None:
    """Goes red if a batch of the search half counts, or the figures are those of other members."""
    (found,) = pl.Trainer(**QUIET).validate(built[0], CONFIRM, verbose=False)
    figures = built[0].manifest["comparison"][3]
    assert found["val_loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(figures["accuracy"])
    assert found["val_calibration_error"] == pytest.approx(figures["calibration_error"], rel=1e-4)
    outputs = torch.cat([built[0](x) for x, _ in CONFIRM])
    targets = torch.cat([y for _, y in CONFIRM])
    one_hot = F.one_hot(targets, 3)
    assert figures["brier"] == pytest.approx(float((outputs.softmax(-1) - one_hot).square().sum(-1).mean()), rel=1e-4)
    expected = multiclass_calibration_error(outputs.softmax(-1), targets, 3, n_bins=15)
    assert figures["calibration_error"] == pytest.approx(float(expected), rel=1e-4)


def test_a_published_ensemble_predicts_the_same_bits(built: tuple[MergedEnsemble, Path]) -> None:
    ensemble, out = built
    loaded, x = load_ensemble(out, Blobs()), torch.randn(20, 2)
    assert torch.equal(loaded(x), ensemble(x))
    assert loaded.weights == ensemble.weights
    assert loaded.verdict == json.loads((out / "ensemble.json").read_text())["verdict"]
    trainer = pl.Trainer(**QUIET)
    assert trainer.test(loaded, CONFIRM, verbose=False)[0].keys() >= {"test_loss", "test_calibration_error"}
    batches = trainer.predict(loaded, CONFIRM)
    assert batches is not None
    assert batches[0].shape == (16, 3)  # type: ignore[union-attr]


def test_a_tampered_member_is_refused(built: tuple[MergedEnsemble, Path], tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "ensemble"
    shutil.copytree(built[1], own)
    path = own / "member-0" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        load_ensemble(own, Blobs())


def test_a_page_that_fails_is_a_warning_and_the_ensemble_stands(
    built: tuple[MergedEnsemble, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, path = built
    assert ensemble.manifest["verdict"]["sentence"] in html.unescape((path / PAGE_NAME).read_text(encoding="utf-8"))

    def fail(*args: Any) -> str:
        raise ValueError("no template")

    monkeypatch.setattr(build, "render_ensemble_html", fail)
    out, render = tmp_path / "ensemble", partial(build.render_page, tmp_path / "ensemble", pl.Trainer(**QUIET))
    with pytest.warns(UserWarning, match=r"The ensemble's page failed: .*no template.* The ensemble is unaffected"):
        publish_ensemble(out, ensemble.states(), ensemble.manifest, 1 << 30, render)
    assert not (out / PAGE_NAME).exists()
    assert load_ensemble(out, Blobs()).manifest["files"].keys() == ensemble.manifest["files"].keys() - {PAGE_NAME}


def test_another_model_is_refused(built: tuple[MergedEnsemble, Path]) -> None:
    class Wider(Blobs):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)

    with pytest.raises(ArtifactError, match=r"head\.weight"):
        load_ensemble(built[1], Wider())


def test_what_is_there_is_refused_before_the_work(built: tuple[MergedEnsemble, Path]) -> None:
    with pytest.raises(ArtifactError, match="must not exist"):
        build_ensemble(Blobs(), VAL, "nowhere", out=built[1])


def test_a_runs_merges_and_snapshots_serve_too(run: tuple[Path, Blobs]) -> None:
    """The module that was trained holds the latest weights, and holds them afterwards."""
    root, module = run
    before = copy.deepcopy(module.state_dict())
    made = build_ensemble(module, VAL, root / "merges", search=SEARCH, weight_trials=0, size=2, averaging="logits")
    pool = {p["name"] for p in made.manifest["selection"]["pool"]}
    assert any(name.startswith("step=") for name in pool)
    kinds = [s["kind"] for s in made.manifest["snapshots"]]
    assert kinds[:-1] == ["mean"] * (len(kinds) - 1)
    assert len(kinds) > 3
    assert made.averaging == "logits"
    assert [m["weight"] for m in made.manifest["members"]] == pytest.approx([1 / made.num_members] * made.num_members)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_predicting_otherwise_than_validation_is_noted(run: tuple[Path, Blobs]) -> None:
    def sharper(module: Any, batch: Any) -> Any:
        return 3 * module(batch[0]), batch[1]

    made = build_ensemble(
        Blobs(), VAL, run[0] / "checkpoints", predict=sharper, size=1, weight_trials=0, last=2, search=SEARCH
    )
    assert "check `predict`" in made.verdict["notes"][0]
    assert made.manifest["predict"].endswith("sharper")
    # Its name alone tells nobody how to predict.
    loaded = MergedEnsemble(made.module, made.states(), made.weights, manifest=made.manifest)
    with pytest.raises(ConfigError, match="sharper"):
        loaded.predict_batch(next(iter(VAL)))


def test_a_module_that_does_not_say_how_it_predicts_is_refused(run: tuple[Path, Blobs]) -> None:
    class Silent(Blobs):
        forward = pl.LightningModule.forward
        call = Blobs.forward

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.call(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.call(batch[0]), batch[1]))

    with pytest.raises(ConfigError, match="Pass `predict`"):
        build_ensemble(Silent(), VAL, run[0] / "checkpoints", last=2, search=SEARCH)


@pytest.mark.parametrize(
    ("outputs", "targets", "shape"),
    [
        (torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long), (10, 7)),
        (torch.zeros(4, 1), torch.zeros(4), (4, 1)),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), (4, 6)),
    ],
    ids=["tokens", "numbers", "fields"],
)
def test_outputs_of_any_shape_become_rows(outputs: Tensor, targets: Tensor, shape: tuple[int, int]) -> None:
    found = read_prediction((outputs, targets))
    assert tuple(found.outputs.shape) == shape
    assert len(found.targets) == shape[0]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (torch.zeros(3), "two tensors"),
        ((torch.zeros(2, 7, 5), torch.zeros(2, 5, dtype=torch.long)), "movedim"),
        ((torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)), "one logit"),
        ((torch.zeros(4, 2), torch.zeros(4)), "one shape"),
    ],
    ids=["one", "classes-second", "binary", "shapes"],
)
def test_what_is_no_prediction_is_refused(answer: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_prediction(answer)
