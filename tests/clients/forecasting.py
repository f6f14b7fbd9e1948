"""The DeepAR of pytorch-forecasting, after its examples/ar.py, on its own generated series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pytorch_forecasting import DeepAR, TimeSeriesDataSet
from pytorch_forecasting.data import NaNLabelEncoder
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_ckmerge import load_merged
from tests.clients.harness import Client, main

CUTOFF = 150


def datasets() -> tuple[TimeSeriesDataSet, TimeSeriesDataSet]:
    data = generate_ar_data(seasonality=10.0, timesteps=200, n_series=32)
    data["series"] = data["series"].astype(str)
    training = TimeSeriesDataSet(
        data[lambda x: x.time_idx < CUTOFF],
        time_idx="time_idx",
        target="value",
        categorical_encoders={"series": NaNLabelEncoder().fit(data.series)},
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=20,
        max_prediction_length=10,
    )
    validation = TimeSeriesDataSet.from_dataset(training, data, min_prediction_idx=CUTOFF, stop_randomization=True)
    return training, validation


def build(training: TimeSeriesDataSet) -> DeepAR:
    return DeepAR.from_dataset(
        training, learning_rate=0.03, hidden_size=8, rnn_layers=1, log_interval=-1, optimizer="adam"
    )


def train(callbacks: list[Any], root: Path) -> DeepAR:
    pl.seed_everything(1, verbose=False)
    training, validation = datasets()
    module = build(training)
    trainer = pl.Trainer(
        max_steps=60,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        gradient_clip_val=0.1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    train_loader = training.to_dataloader(train=True, batch_size=16, num_workers=0)
    trainer.fit(module, train_loader, validation.to_dataloader(train=False, batch_size=32, num_workers=0))
    return module


@torch.no_grad()
def value(_: DeepAR, artifact: Path) -> float:
    """Return the mean of the model's own loss by its own forward pass, over whole batches as it logs them."""
    training, validation = datasets()
    model = build(training)
    load_merged(artifact, model)
    model.eval()
    total, samples = 0.0, 0
    for x, y in validation.to_dataloader(train=False, batch_size=32, num_workers=0):
        size = len(x["decoder_lengths"])
        total += float(model.loss(model(x).prediction, y)) * size
        samples += size
    return total / samples


if __name__ == "__main__":
    main(Client("pytorch-forecasting", ["pytorch-forecasting", "lightning"], train, value, pl.Callback))
