"""What is scored is what is published, whatever validation's own hooks do to the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ckmerge import EvaluationConfig
from lightning_ckmerge.artifact.load import load_merged
from lightning_ckmerge.errors import ArtifactError, FinalError
from lightning_ckmerge.plugin.evaluate.halves import confirms
from tests.support.bitwise import Case, Run, assert_same_run, fit, merges_dir
from tests.support.models import NUM_CLASSES, NUM_FEATURES, points_loader
from tests.support.trainers import make_merge, make_trainer, manifests
from tests.support.warnings import only_expected

OUT_OF_IT = {"on_validation_epoch_start": "on_validation_epoch_end", "validation_step": "on_validation_epoch_end"}
FEW = EvaluationConfig(staged=False, limit_batches=8)
# The loss falls, so that, searching for high ones, older weights win; too few batches for a verdict, so weights are
# published in any case.
ONE_SEARCH: dict[str, Any] = {"every_n_train_steps": 10, "mode": "max", "check_mode": False, "evaluation": FEW}


class Small(pl.LightningModule):
    """BatchNorm and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Averaged(Small):
    """Validates an average of its weights, which hooks put in their place.

    Args:
        hook: Puts the average in.
        how: ``copy``: the values; ``pointer``: the average's own memory; ``exchange``: the values change places;
            ``parameters``: the average's own objects.
    """

    def __init__(self, hook: str, how: str) -> None:
        super().__init__()
        self.how = how
        self.averages = {n: t.detach().clone() for n, t in self._swapped().items()}
        out = OUT_OF_IT.get(hook, "on_validation_end")
        inner = {name: getattr(self, name) for name in (hook, out)}
        setattr(self, hook, lambda *args: (self.swap_in(), inner[hook](*args))[1])
        setattr(self, out, lambda *args: (inner[out](*args), self.swap_out())[0])
        self.kept: dict[str, Any] | None = None

    def _swapped(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.net.state_dict(keep_vars=True).items() if t.is_floating_point()}

    def on_train_batch_end(self, *_: Any) -> None:
        for name, tensor in self._swapped().items():
            self.averages[name].lerp_(tensor.detach(), 0.3)

    @torch.no_grad()
    def swap_in(self) -> None:
        if self.kept is not None:
            return
        tensors = self._swapped()
        self.kept = {n: t.data if self.how == "pointer" else t.detach().clone() for n, t in tensors.items()}
        if self.how == "parameters":
            self.kept = {n: self._place(n)[n.rpartition(".")[2]] for n in tensors}
        for name, tensor in tensors.items():
            if self.how == "pointer":
                tensor.data = self.averages[name]
            elif self.how == "parameters" and isinstance(tensor, nn.Parameter):
                self._place(name)[name.rpartition(".")[2]] = nn.Parameter(self.averages[name])
            else:
                tensor.copy_(self.averages[name])
                if self.how == "exchange":
                    self.averages[name].copy_(self.kept[name])

    @torch.no_grad()
    def swap_out(self) -> None:
        if self.kept is None:
            return
        for name, tensor in self._swapped().items():
            if self.how == "exchange":
                self.averages[name].copy_(tensor)
            if self.how == "pointer":
                tensor.data = self.kept[name]
            elif self.how == "parameters" and isinstance(tensor, nn.Parameter):
                self._place(name)[name.rpartition(".")[2]] = self.kept[name]
            elif self.how != "parameters":
                tensor.copy_(self.kept[name])
        self.kept = None

    def _place(self, name: str) -> dict[str, Any]:
        holder = self.net.get_submodule(name.rpartition(".")[0])
        return holder._parameters if name.rpartition(".")[2] in holder._parameters else holder._buffers

    def own_state(self) -> dict[str, Any]:
        return {"averages": self.averages}


class ScheduleFree(Small):
    """As the optimizer does it: the weights of training and validation lie on two sides of a third."""

    def __init__(self, hook: str = "on_validation_epoch_start") -> None:
        super().__init__()
        self.third = [torch.ones_like(p) for p in self.parameters()]
        self.trains = True
        setattr(self, hook, lambda *_: self.turn(trains=False))

    @torch.no_grad()
    def turn(self, *, trains: bool) -> None:
        if self.trains != trains:
            for p, z in zip(self.parameters(), self.third, strict=True):
                p.data.lerp_(z, 0.1 if trains else -0.1 / 0.9)
        self.trains = trains

    def on_train_batch_start(self, *_: Any) -> None:
        self.turn(trains=True)

    def own_state(self) -> dict[str, Any]:
        return {"trains": self.trains}


def assert_measured(run: Run, **loader: Any) -> None:
    """The values on record are those of the artifact in a module without hooks."""
    published = [m for m in manifests(merges_dir(run)) if m["files"].keys() & {"model.safetensors"}]
    assert published
    for manifest in published:
        winner = winner_of(manifest)
        plain = Small()
        load_merged(merges_dir(run) / f"step={manifest['step']:09d}", plain)
        plain.eval()
        batches = list(points_loader(train=False, **loader))[:8]
        for half in ("search", "confirm"):
            chosen = [b for i, b in enumerate(batches) if confirms(i, 0.5) == (half == "confirm")]
            losses = [(cross_entropy(plain.net(x), y).item(), len(y)) for x, y in chosen]
            mean = sum(v * n for v, n in losses) / sum(n for _, n in losses)
            assert winner[half]["value"] == pytest.approx(mean, abs=1e-6), half


QUICK: dict[str, Any] = {"max_steps": 10, "max_epochs": -1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 9}
SWAPS = {
    "at eval, copied": lambda: Averaged("on_validation_model_eval", "copy"),
    "at start, copied": lambda: Averaged("on_validation_start", "copy"),
    "at epoch start, copied": lambda: Averaged("on_validation_epoch_start", "copy"),
    "Schedule-Free": ScheduleFree,
}


def searched(model: Callable[[], pl.LightningModule], root: Path, **merge: Any) -> Run:
    """A run with one search, at step 10."""
    expected = ["No merge at step"] if merge.get("on_error") == "warn" else []
    return fit(Case(model=model, trainer=QUICK, expected=expected), root, [make_merge(**{**ONE_SEARCH, **merge})])


def winner_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(t for t in (*manifest["anchors"], *manifest["trials"]) if t["name"] == manifest["verdict"]["winner"])


@pytest.mark.parametrize("name", SWAPS)
def test_weights_that_hooks_swap_in_are_not_scored(name: str, tmp_path: Path) -> None:
    """Red without the candidate put in place after the hooks: with an average all candidates had one value."""
    run = searched(SWAPS[name], tmp_path)
    assert_measured(run)
    (manifest,) = manifests(merges_dir(run))
    assert len({t["search"]["value"] for t in (*manifest["anchors"], *manifest["trials"])}) > 3
    assert any("A validation hook swaps in other weights" in w for w in manifest["verdict"]["warnings"])


@pytest.mark.parametrize("how", ["pointer", "exchange", "parameters"])
def test_the_memory_of_what_hooks_swap_in_stays_theirs(how: str, tmp_path: Path) -> None:
    """Red if a candidate is merged into the average's memory, or if an exchange is undone with a candidate."""
    case = Case(model=lambda: Averaged("on_validation_epoch_start", how), merge=ONE_SEARCH)
    assert_measured(assert_same_run(case, tmp_path))


def test_statistics_estimated_anew_are_those_that_are_scored(tmp_path: Path) -> None:
    """Though hooks put others in the model before each evaluation, and the old ones back after it."""
    evaluation = EvaluationConfig(staged=False, limit_batches=8, recalibrate_batches=2)
    run = searched(SWAPS["at start, copied"], tmp_path, evaluation=evaluation)
    assert_measured(run)
    plain = Small()
    load_merged(merges_dir(run) / "step=000000010", plain)
    assert int(plain.net[1].num_batches_tracked) == 2


class MovesWhileItRuns(ScheduleFree):
    """Its first forward pass moves the weights."""

    def __init__(self) -> None:
        super().__init__("on_own_hook")
        self.net.register_forward_pre_hook(lambda *_: self.turn(trains=self.training))


@pytest.mark.parametrize(
    "model",
    [
        MovesWhileItRuns,
        lambda: ScheduleFree("on_validation_batch_start"),
        lambda: Averaged("on_validation_batch_start", "pointer"),
        lambda: Averaged("validation_step", "copy"),
    ],
    ids=["forward hook", "batch hook", "pointers in a batch hook", "validation_step"],
)
def test_weights_that_move_while_batches_run_end_the_search(model: Any, tmp_path: Path) -> None:
    with pytest.raises(FinalError, match="must not change weights while its batches run"):
        searched(model, tmp_path)


class Elsewhere(Small):
    """Validates a model that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere = [Small().net.eval()]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.elsewhere[0](batch[0])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())


def test_one_value_of_all_candidates_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FinalError, match="All candidates score val_loss"):
        searched(Elsewhere, tmp_path)


@pytest.mark.parametrize("model", [MovesWhileItRuns, Elsewhere])
def test_a_search_that_would_fail_again_is_the_last_one(model: Any, tmp_path: Path) -> None:
    """Goes red if each search is refused anew, at the cost of its evaluations, or told of more than once."""
    merge = make_merge(on_error="warn", every_n_train_steps=4, search_on_train_end=True)
    with only_expected("No merge at step") as said:
        trainer = make_trainer(tmp_path, merge, max_steps=16)
        trainer.fit(model(), points_loader(train=True), points_loader(train=False))
    (told,) = [text for text in said if "merge" in text.lower()]
    assert told.startswith("No merge at step 4: ")
    assert told.endswith("Searching has ended for this run.")


def test_a_metric_that_cannot_tell_candidates_apart_is_named(tmp_path: Path) -> None:
    """A ratio of counts may be the same for all of them, so it is no error."""
    (manifest,) = manifests(merges_dir(searched(Elsewhere, tmp_path, monitor="val_acc")))
    assert any("All candidates score val_acc" in w for w in manifest["verdict"]["warnings"])


class Hidden(Small):
    """Loading its weights changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_load_state_dict_post_hook(lambda module, _: _shift(module))


def test_an_artifact_that_does_not_score_as_its_candidate_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="must score as its candidate did"):
        searched(Hidden, tmp_path)
    assert not list(tmp_path.rglob("step=*"))
    assert not list(tmp_path.rglob(".tmp-*"))
    run = searched(Hidden, tmp_path / "tolerant", on_error="warn")
    assert run.trainer.global_step == 10


def _shift(module: nn.Module) -> None:
    assert isinstance(module, nn.Linear)
    module.bias.data.add_(1)
