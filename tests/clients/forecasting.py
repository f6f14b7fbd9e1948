"""A temporal fusion transformer of pytorch-forecasting, and ``load_from_checkpoint(...).predict``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from pytorch_forecasting import GroupNormalizer, QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data

from lightning_ckmerge import Artifact
from tests.clients.check import Client, confirmed_samples

ENCODER, DECODER, BATCH = 12, 4, 16


@cache
def datasets() -> tuple[Any, Any]:
    """Return the training and validation data of the client's own ``examples/ar.py``, smaller."""
    data = generate_ar_data(seasonality=10.0, timesteps=60, n_series=12, seed=42)
    data["series"] = data["series"].astype(str).astype("category")
    cutoff = data["time_idx"].max() - 20
    training = TimeSeriesDataSet(
        data[lambda x: x.time_idx < cutoff],
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        static_categoricals=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=ENCODER,
        max_prediction_length=DECODER,
        target_normalizer=GroupNormalizer(groups=["series"]),
        add_relative_time_idx=True,
    )
    return training, TimeSeriesDataSet.from_dataset(training, data, min_prediction_idx=cutoff)


def train(root: Path, callbacks: list[pl.Callback]) -> Any:
    pl.seed_everything(1, verbose=False)
    training, validation = datasets()
    module = TemporalFusionTransformer.from_dataset(
        training, learning_rate=0.02, hidden_size=8, attention_head_size=2, dropout=0.1, loss=QuantileLoss()
    )
    trainer = pl.Trainer(
        max_epochs=3,
        limit_train_batches=20,
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=root,
        gradient_clip_val=0.1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        module,
        training.to_dataloader(train=True, batch_size=BATCH),
        validation.to_dataloader(train=False, batch_size=BATCH),
    )


def predict(artifact: Artifact, trained: Any) -> float:
    _, validation = datasets()
    model = TemporalFusionTransformer.load_from_checkpoint(artifact.path / "model.ckpt")
    found = model.predict(
        validation.to_dataloader(train=False, batch_size=BATCH),
        mode="quantiles",
        return_y=True,
        trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    )
    rows = torch.tensor(confirmed_samples(len(found.output), BATCH))
    quantiles, (target, _) = found.output[rows], found.y
    return float(QuantileLoss()(quantiles.double(), target[rows].double()))


CLIENT = Client(
    packages=["pytorch-forecasting"],
    does="a `TemporalFusionTransformer` on the data of its `examples/ar.py`",
    predicts='`load_from_checkpoint("model.ckpt").predict`, by its `QuantileLoss`',
    train=train,
    predict=predict,
    merge={},
)
