"""N-BEATS of darts, which trains with ``pytorch_lightning``, and its ``historical_forecasts``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from darts import TimeSeries
from darts.models import NBEATSModel
from lightning.pytorch import Callback

from lightning_ckmerge import Artifact, load_merged
from tests.clients.check import Client, confirmed_samples

INPUT, OUTPUT, BATCH = 12, 4, 8


def series() -> tuple[Any, Any]:
    draws = np.random.default_rng(1)
    t = np.arange(360)
    values = np.sin(t / 5) + 0.5 * np.sin(t / 11) + 0.3 * draws.standard_normal(len(t))
    whole = TimeSeries.from_values(values.astype(np.float32))
    return whole[:240], whole[240:]


def make_model(root: Path, callbacks: list[Callback]) -> Any:
    return NBEATSModel(
        input_chunk_length=INPUT,
        output_chunk_length=OUTPUT,
        n_epochs=3,
        num_stacks=2,
        num_blocks=1,
        num_layers=2,
        layer_widths=16,
        dropout=0.1,
        batch_size=BATCH,
        random_state=1,
        optimizer_kwargs={"lr": 0.01},
        work_dir=str(root),
        pl_trainer_kwargs={"accelerator": "cpu", "callbacks": callbacks, "enable_progress_bar": False, "logger": False},
    )


def train(root: Path, callbacks: list[Callback]) -> Any:
    model = make_model(root, callbacks)
    training, validation = series()
    model.fit(training, val_series=validation, verbose=False)
    return root


def predict(artifact: Artifact, trained: Any) -> float:
    training, validation = series()
    model = make_model(trained / "new", [])
    model.fit(training, val_series=validation, epochs=1, verbose=False)  # builds the module
    load_merged(artifact, model.model)
    forecasts = model.historical_forecasts(
        validation, forecast_horizon=OUTPUT, stride=1, retrain=False, last_points_only=False, verbose=False
    )
    values = validation.values(copy=False)[:, 0].astype(np.float64)
    starts = [int(f.start_time()) - 240 for f in forecasts]
    # darts' training data count their windows from the end.
    losses = [
        np.mean((f.values()[:, 0].astype(np.float64) - values[s : s + OUTPUT]) ** 2)
        for f, s in zip(forecasts, starts, strict=True)
    ][::-1]
    return float(np.mean([losses[i] for i in confirmed_samples(len(losses), BATCH)]))


CLIENT = Client(
    packages=["darts"],
    does="`NBEATSModel.fit(series, val_series=...)`",
    predicts="`historical_forecasts(retrain=False)`, the mean squared error",
    train=train,
    predict=predict,
    merge={},
)
