"""A small fit whose gradients lie in a store, projected or not, and the same gradients by the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, ParameterGroup
from lightning_influence.attribution import score_matrix
from lightning_influence.curvature import TrainingEvidence
from lightning_influence.estimators import Estimator, Queries, Stage
from lightning_influence.gradients import Dense, Gradients, Projection, select
from lightning_influence.replay import TrainingData
from tests.reference import at, per_sample_gradients
from tests.stores import (
    Texts,
    all_names,
    batch_of,
    classifier,
    gradients_at,
    loader_of,
    loss_of_one,
    replay_store,
    singles,
    trajectory,
)

TRAIN, ASKED = Texts(14), Texts(3, seed=1)
LAYERS = (("embedding.weight",), ("hidden.weight", "hidden.bias"), ("head.weight", "head.bias"))


class Fit:
    """A model, its weights at two moments, and the gradients at the last."""

    def __init__(self) -> None:
        self.module = classifier()
        self.names = all_names(self.module)
        self.states = trajectory(self.module, 2)
        self.final = at(self.module, self.states[-1])
        self.train = per_sample_gradients(self.final, loss_of_one, singles(TRAIN))
        self.query = per_sample_gradients(self.final, loss_of_one, singles(ASKED))

    def store(self, root: Path, projection: Projection | None, decay: float = 0.0, **options: Any) -> ArtifactStore:
        group = ParameterGroup("SGD", 0, tuple(self.names), 0.1, 0.3, {"weight_decay": decay} if decay else {})
        return replay_store(root, self.module, TRAIN, self.states, lambda c: [group], projection=projection, **options)

    def scores(self, store: ArtifactStore, estimator: Estimator, **options: Any) -> Tensor:
        return score_matrix(Stage(store, self.module, **options), estimator, self.queries())

    def queries(self) -> Queries:
        def gradients(checkpoint: Any, names: Any) -> Gradients:
            state = self.states[checkpoint.epoch]
            return gradients_at(self.module, state, batch_of(ASKED), len(ASKED), list(names))

        return Queries([batch_of(ASKED)], [len(ASKED)], gradients)

    def evidence(self, batch_size: int, labels: Any = "observed") -> TrainingEvidence:
        """The same gradients from the model."""
        data = TrainingData.of(loader_of(TRAIN, batch_size))
        return TrainingEvidence(self.final, select(self.final, "all"), data, labels=labels)  # type: ignore[arg-type]


def dense(gradients: dict[str, Tensor], names: Any = None) -> Any:
    return {name: Dense(gradients[name]) for name in (names or gradients)}


def flat(gradients: dict[str, Tensor], names: Any, projection: Projection | None) -> Tensor:
    """Projected rows laid end to end, (N, k)."""
    found = dense(gradients, names) if projection is None else projection.apply(dense(gradients, names))
    return torch.cat([found[name].dense().flatten(1) for name in names], 1)
