"""The fits that are explained: a Trainer and this library's callbacks, in the batches of the retrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import CurvatureSnapshot, GradientSnapshot, InfluenceModule
from lightning_influence.estimators import Attributor
from recipes.data.text_data_module import Sample
from recipes.deletions.texts import Texts
from recipes.truths.fitting import plain_fit
from recipes.truths.retraining import Samples
from recipes.truths.training import Build, Recipe, initial


@dataclass(frozen=True)
class SetUp:
    """What is trained on what, and which predictions are asked about.

    Args:
        build: makes the model that is explained; its randomness is that of a seed.
        again: makes the model that is trained again: the same one, or one that computes the same faster.
        recipe: how it is trained.
        texts: on what.
        positions: of the held-out texts that are asked about, (Q,).
        every_n_epochs: a checkpoint.
    """

    build: Build
    again: Build
    recipe: Recipe
    texts: Texts
    positions: Tensor
    every_n_epochs: int = 1


@dataclass(frozen=True)
class Explained:
    """A fitted model with its stores, and the questions that it is asked.

    Args:
        set_up: what it comes from.
        seed: of its initial weights and its batches.
        module: in eval mode.
        loader: of the fit.
        folder: of the stores, one for each kind.
    """

    set_up: SetUp
    seed: int
    module: LightningModule
    loader: DataLoader[Sample]
    folder: Path

    @cached_property
    def queries(self) -> Samples:
        """The held-out texts that are asked about, with the class that the model says of each as its label."""
        test, positions = self.set_up.texts.test, self.set_up.positions
        with torch.no_grad():
            said = self.module(test.inputs[positions]).argmax(1)
        return Samples(test.inputs[positions], said, padding=test.padding)

    def ask(self, kind: str, estimator: Attributor) -> InfluenceModule:
        """An estimator at one of the stores, about the class that the model says."""
        return InfluenceModule(
            self.module, self.folder / kind, estimator, measurement="predicted_class", train_loader=self.loader
        )

    def batch(self, count: int) -> Sample:
        """The first questions."""
        return self.set_up.texts.batch(self.set_up.positions[:count].tolist())

    def scores(self, kind: str, estimator: Attributor, count: int) -> Tensor:
        """Scores (count, N) of the first questions."""
        return self.ask(kind, estimator).scores(self.batch(count))


def explained(set_up: SetUp, seed: int, folder: Path) -> Explained:
    """Fit with the gradients of the first and the last layer at every checkpoint: the store `ends`."""
    ends = GradientSnapshot(folder / "ends", ["word_embeddings", "last_layer"], every_n_epochs=set_up.every_n_epochs)
    return fitted(set_up, seed, folder, [ends])


def explained_in_all_ways(set_up: SetUp, seed: int, folder: Path) -> Explained:
    """Fit with the stores `ends`, `all` (every parameter), `final` (every parameter after the last step, and the
    curvature there) and `in_flight` (word embeddings)."""
    every = set_up.every_n_epochs
    return fitted(set_up, seed, folder, [
        GradientSnapshot(folder / "ends", ["word_embeddings", "last_layer"], every_n_epochs=every),
        GradientSnapshot(folder / "all", "all", every_n_epochs=every),
        GradientSnapshot(folder / "final", "all", every_n_epochs=set_up.recipe.epochs),
        CurvatureSnapshot(folder / "final", "ekfac"),
        GradientSnapshot(folder / "in_flight", mode="in_flight", every_n_epochs=every),
    ])  # fmt: skip


def fitted(set_up: SetUp, seed: int, folder: Path, callbacks: Sequence[Callback]) -> Explained:
    """Fit with any callbacks, whose stores lie in the folder by their kinds."""
    module = initial(set_up.build, seed)
    assert isinstance(module, LightningModule)
    loader = set_up.texts.loader(set_up.recipe, seed)
    plain_fit(module, loader, set_up.recipe.epochs, callbacks)
    return Explained(set_up, seed, module.eval(), loader, folder)
