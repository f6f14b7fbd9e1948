"""SCVI of scvi-tools, as its own test of callbacks trains it, and ``get_elbo`` of a new model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import scvi
import torch
from lightning.pytorch import Callback

from lightning_ckmerge import Artifact, load_merged
from tests.clients.check import Client, confirmed_samples

BATCH, NUM_DRAWS = 16, 20


def make_model() -> Any:
    scvi.settings.seed = 1
    scvi.settings.verbosity = logging.ERROR
    data = scvi.data.synthetic_iid(batch_size=256)
    scvi.model.SCVI.setup_anndata(data, batch_key="batch", labels_key="labels")
    return scvi.model.SCVI(data, n_latent=5, n_hidden=32)


def train(root: Path, callbacks: list[Callback]) -> Any:
    model = make_model()
    model.train(
        max_epochs=4,
        callbacks=callbacks,
        check_val_every_n_epoch=1,
        train_size=0.6,
        batch_size=BATCH,
        accelerator="cpu",
        plan_kwargs={"lr": 0.01},
        default_root_dir=root,
        enable_progress_bar=False,
        logger=False,
    )
    return model


def predict(artifact: Artifact, trained: Any) -> list[float]:
    model = make_model()
    # What Lightning trains is a plan around the module, so the artifact's names are the plan's.
    load_merged(artifact, model._training_plan_cls(model.module))
    model.is_trained_ = True
    model.module.eval()
    validation = trained.validation_indices
    indices = [validation[i] for i in confirmed_samples(len(validation), BATCH)]
    draws = []
    for seed in range(NUM_DRAWS):
        torch.manual_seed(seed)
        draws.append(-float(model.get_elbo(indices=indices, batch_size=BATCH)))
    return draws


CLIENT = Client(
    packages=["scvi-tools", "anndata"],
    does="`SCVI(...).train(callbacks=[...], check_val_every_n_epoch=1)`",
    predicts="`SCVI.get_elbo` of a new model, whose draws differ",
    train=train,
    predict=predict,
    merge={"monitor": "elbo_validation"},
)
