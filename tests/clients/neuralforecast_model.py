"""An MLP of neuralforecast over several series, trained with ``pytorch_lightning``, and its ``predict``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch import Callback
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

from lightning_ckmerge import Artifact, load_merged
from tests.clients.check import Client, confirmed_samples

HORIZON, INPUT, NUM_SERIES, BATCH, LENGTH = 4, 12, 48, 4, 80


@cache
def series() -> Any:
    draws = np.random.default_rng(1)
    t = np.arange(LENGTH)
    frames = [
        pd.DataFrame(
            {
                "unique_id": f"{i:02d}",
                "ds": t,
                "y": np.sin(t / 4 + i) + 0.4 * np.sin(t / 9 + 2 * i) + 0.3 * draws.standard_normal(LENGTH),
            }
        )
        for i in range(NUM_SERIES)
    ]
    return pd.concat(frames, ignore_index=True)


def fit(callbacks: list[Callback], max_steps: int) -> Any:
    model = MLP(
        h=HORIZON,
        input_size=INPUT,
        hidden_size=16,
        num_layers=2,
        max_steps=max_steps,
        val_check_steps=10,
        batch_size=16,
        valid_batch_size=BATCH,
        windows_batch_size=32,
        learning_rate=0.01,
        num_lr_decays=0,
        random_seed=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    forecast = NeuralForecast(models=[model], freq=1)
    forecast.fit(series(), val_size=HORIZON)
    return forecast


def train(root: Path, callbacks: list[Callback]) -> Any:
    return fit(callbacks, max_steps=60)


def predict(artifact: Artifact, trained: Any) -> float:
    forecast = fit([], max_steps=1)
    load_merged(artifact, forecast.models[0])
    data = series()
    past = data[data.ds < LENGTH - HORIZON]
    found = forecast.predict(past).merge(data, on=["unique_id", "ds"])
    errors = (found["MLP"] - found["y"]).abs().to_numpy().reshape(NUM_SERIES, HORIZON).mean(1)
    return float(errors[confirmed_samples(NUM_SERIES, BATCH)].mean())


CLIENT = Client(
    packages=["neuralforecast"],
    does="`NeuralForecast([MLP(...)]).fit(df, val_size=4)` over 48 series",
    predicts="`NeuralForecast.predict`, the mean absolute error",
    train=train,
    predict=predict,
    merge={"monitor": "valid_loss"},
)
