"""A model walked over a dataset without a trace: `isolated()` hides side effects, `walk()` brings batches in order."""

from __future__ import annotations

from lightning_influence.replay.features import Features, features_of
from lightning_influence.replay.isolation import isolated
from lightning_influence.replay.sample_gradients import autocast, loss_scale, sample_gradients, to_device
from lightning_influence.replay.training_data import TrainingData, shard_positions, walk

__all__ = [
    "Features",
    "TrainingData",
    "autocast",
    "features_of",
    "isolated",
    "loss_scale",
    "sample_gradients",
    "shard_positions",
    "to_device",
    "walk",
]
