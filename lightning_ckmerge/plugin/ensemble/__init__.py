"""Ensembles of merges: chosen on the search half, judged on the confirmation half, used as one LightningModule."""
