"""``MergedEnsemble``: several merges of one run that predict together, as one LightningModule."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ckmerge.artifact.ensembles import EnsembleArtifact
from lightning_ckmerge.errors import ArtifactError, ConfigError
from lightning_ckmerge.plugin.ensemble.figures import calibration_error
from lightning_ckmerge.plugin.ensemble.members import Members, State, find_slots, split_shared, state_of
from lightning_ckmerge.plugin.ensemble.predicting import (
    Predict,
    Prediction,
    logits_of,
    predict_by_convention,
    read_prediction,
)
from lightning_ckmerge.search.averaging import Averaging, is_classes, losses


class MergedEnsemble(LightningModule):
    """Members that predict together. For ``validate``, ``test`` and ``predict``, or to be called as the module is.

    Called, it returns the average of what the module's ``forward`` returns: log-probabilities where probabilities are
    averaged, which serve as logits. ``validation_step`` and ``test_step`` log ``val_loss`` or ``test_loss``, and of
    classes ``..._accuracy`` and ``..._calibration_error``. It is never in training mode.

    A prediction takes a forward pass for each member. Members hold weights of their own, and share what is equal in
    all of them.

    Args:
        module: The LightningModule that was trained; it lends its structure, and keeps its weights.
        states: The members' weights, by the module's ``state_dict`` names.
        weights: Of each member in the average, at least 0; they sum to 1.
        averaging: ``probabilities``, ``logits``, or ``outputs`` for anything but classes.
        predict: As for ``build_ensemble``.
        manifest: How it was made.

    Attributes:
        manifest: How it was made: members, figures on the confirmation half, verdict.

    Raises:
        ConfigError: Weights or states do not fit.
    """

    def __init__(
        self,
        module: LightningModule,
        states: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        averaging: Averaging = "probabilities",
        predict: Predict | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(module, states, weights)
        self.module = module
        self._slots = find_slots(module)
        self.averaging: Averaging = averaging
        self.manifest = dict(manifest or {})
        self._predict = predict
        shared, own = split_shared(states)
        self.shared = _Held(shared)
        self.members = nn.ModuleList(_Held(state) for state in own)
        self.weights = tuple(weights)
        # What a name of the manifest stands for is not known until it is passed again.
        self._lacks = self.manifest.get("predict") if predict is None else None
        self._metrics = nn.ModuleDict()
        self.train(False)

    @classmethod
    def from_artifact(
        cls,
        path: str | os.PathLike[str],
        module: LightningModule,
        *,
        predict: Predict | None = None,
        verify: bool = True,
    ) -> MergedEnsemble:
        """Return the ensemble that ``build_ensemble`` or ``ckmerge ensemble`` has published.

        Args:
            path: Its directory.
            module: As for the constructor, on its device; members get there, and keep the precision they have.
            predict: As for ``build_ensemble``, where one was passed there. Calling the ensemble needs none.
            verify: Compare each file's SHA-256 first.

        Raises:
            ArtifactError: There is no ensemble, it is damaged, or its members do not fit the module.
        """
        artifact = EnsembleArtifact.open(path, verify=verify)
        wanted = state_of(module)
        states = [_fitting(artifact, m, wanted, type(module).__name__) for m in range(len(artifact.weights))]
        made = cls(module, states, artifact.weights, artifact.averaging, predict, artifact.manifest)
        return made.to(next((p.device for p in module.parameters()), torch.device("cpu")))

    @property
    def verdict(self) -> dict[str, Any]:
        """Whether it beats the single merge on the confirmation half: status, gain, interval, sentence."""
        return dict(self.manifest.get("verdict", {}))

    @property
    def num_members(self) -> int:
        """Members, and so forward passes for a prediction."""
        return len(self.members)

    def states(self) -> list[dict[str, Tensor]]:
        """Return each member's weights, by the module's names; not copies."""
        return [{**self.shared.tensors(), **member.tensors()} for member in self.members]  # type: ignore[operator]

    def train(self, mode: bool = True) -> MergedEnsemble:
        """Stay in evaluation mode, whatever ``mode`` says."""
        self.training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the average of the members' outputs, of the shape of one."""
        return self._average(lambda module: logits_of(module(*args, **kwargs)))

    def predict_batch(self, batch: Any) -> Prediction:
        """Return the averaged outputs of a batch, one row a sample, and its targets.

        Raises:
            ConfigError: It is not known how the module predicts.
        """
        if self._lacks:
            raise ConfigError(
                f"the ensemble was built with `predict` {self._lacks!r}, got none. Pass it to `load_ensemble` too."
            )
        function, targets = self._predict or predict_by_convention, list[Tensor]()

        def outputs(module: Any) -> Tensor:
            prediction = read_prediction(function(module, batch))
            targets[:] = [prediction.targets]
            return prediction.outputs

        averaged = self._average(outputs)
        return Prediction(averaged, targets[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss, and of classes accuracy and calibration error."""
        self._log(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``."""
        self._log(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the averaged outputs of a batch: ``(N, C)``."""
        return self.predict_batch(batch).outputs

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the module's own hook do it."""
        return self.module.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Let the module's own hook do it."""
        return self.module.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Let the module's own hook do it."""
        return self.module.on_after_batch_transfer(batch, dataloader_idx)

    def _average(self, function: Callable[[Any], Tensor]) -> Tensor:
        return Members(self.module, self.states(), self.weights, self.averaging, self._slots).average(function)

    def _log(self, batch: Any, stage: str) -> None:
        prediction = self.predict_batch(batch)
        outputs, targets = prediction.outputs, prediction.targets
        if not len(targets):
            return
        self._log_metric(f"{stage}_loss", MeanMetric, losses(outputs, targets))
        if is_classes(targets):
            num_classes, p_NC = outputs.shape[-1], outputs.float().softmax(-1)
            accuracy = partial(MulticlassAccuracy, num_classes, average="micro")
            self._log_metric(f"{stage}_accuracy", accuracy, p_NC, targets)
            self._log_metric(f"{stage}_calibration_error", partial(calibration_error, num_classes), p_NC, targets)

    def _log_metric(self, name: str, make: Callable[[], Any], *values: Tensor) -> None:
        """Update and log a metric, which is made when it is first needed."""
        if name not in self._metrics:
            self._metrics[name] = make().to(self.device)
        metric: Any = self._metrics[name]
        metric.update(*values)
        # Named, since Lightning looks for metric objects once only.
        self.log(name, metric, on_step=False, on_epoch=True, metric_attribute=f"_metrics.{name}")


def load_ensemble(
    path: str | os.PathLike[str],
    module: LightningModule,
    *,
    predict: Predict | None = None,
    verify: bool = True,
) -> MergedEnsemble:
    """Return a published ensemble, to be called, validated, tested or predicted with.

    Args:
        path: The directory that ``build_ensemble`` or ``ckmerge ensemble`` wrote.
        module: The LightningModule that was trained, built as it was; its weights do not matter, and stay.
        predict: As for ``build_ensemble``, where one was passed there. Calling the ensemble needs none.
        verify: Compare each file's SHA-256 first.

    Raises:
        ArtifactError: There is no ensemble, it is damaged, or its members do not fit the module.
    """
    return MergedEnsemble.from_artifact(path, module, predict=predict, verify=verify)


class _Held(nn.Module):
    """Tensors that move with the ensemble, under names of a module that is not here."""

    def __init__(self, tensors: State) -> None:
        super().__init__()
        # Names of buffers have no dots, and must not be those of methods.
        self._keys = {name: f"w:{name.replace('.', '/')}" for name in tensors}
        for name, tensor in tensors.items():
            self.register_buffer(self._keys[name], tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return them by name."""
        return {name: self._buffers[key] for name, key in self._keys.items()}  # type: ignore[misc]


def _check(module: LightningModule, states: Sequence[State], weights: Sequence[float]) -> None:
    if not weights or len(weights) != len(states) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"an ensemble must have a weight for each member, at least 0, that sum to 1, got {list(weights)} for "
            f"{len(states)} members. Divide them by their sum."
        )
    wanted = state_of(module).keys()
    for m, state in enumerate(states):
        if state.keys() != wanted:
            odd = sorted(state.keys() ^ wanted)
            raise ConfigError(
                f"a member must have the tensors of {type(module).__name__}, got {odd[0]!r} on one side only in "
                f"member {m}. Tied tensors have one name."
            )


def _fitting(artifact: EnsembleArtifact, m: int, wanted: State, kind: str) -> dict[str, Tensor]:
    """Return a member's weights, if they fit the module."""
    stored = artifact.tensors(m)
    faults = [n for n, t in wanted.items() if n not in stored or stored.spec(n).shape != tuple(t.shape)]
    faults += sorted(set(stored) - set(stored.aliases) - wanted.keys() - {stored.aliases.get(n, n) for n in wanted})
    if faults:
        raise ArtifactError(
            f"the members of {artifact.path} must fit {kind}, got other names or shapes for {faults[0]!r}. Build the "
            "module with the hyperparameters of the run."
        )
    return {name: stored[name] for name in wanted}
