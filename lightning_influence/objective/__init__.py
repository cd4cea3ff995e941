"""What is differentiated for one sample: the training loss l and the measurement m, read off `training_step`.

The user writes nothing in the common case. `LossWatch` looks on while `training_step` runs and keeps the call of
`cross_entropy` (or a relative) that it makes; from that call come the weight of every sample in the mean, per-sample
losses, margins and probabilities, and the measurements of a query. A LightningModule that defines
`per_sample_loss(batch) -> (N,)` or `measurement(batch) -> (N,)` is asked directly instead.
"""

from __future__ import annotations

from lightning_influence.objective.labels import Labels, label_objectives
from lightning_influence.objective.loss_call import LossCall, LossWatch, Predictions
from lightning_influence.objective.measurement import Measurement, MeasurementName, query_objective
from lightning_influence.objective.training import (
    Objective,
    PerSample,
    Reduction,
    batch_scale,
    step_objective,
    training_objective,
)

__all__ = [
    "Labels",
    "LossCall",
    "LossWatch",
    "Measurement",
    "MeasurementName",
    "Objective",
    "PerSample",
    "Predictions",
    "Reduction",
    "batch_scale",
    "label_objectives",
    "query_objective",
    "step_objective",
    "training_objective",
]
