"""The fit that is asked, with all gradients at every checkpoint, and fits without the samples that are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_influence import ArtifactStore, CurvatureSnapshot, GradientSnapshot, InfluenceModule
from lightning_influence.estimators import Attributor
from recipes.hunting.data import Batches, Hunted
from recipes.truths.fitting import plain_fit
from recipes.truths.training import initial


@dataclass(frozen=True)
class Training:
    """How long a model trains, and what is kept of it.

    Args:
        epochs: few, for a model that has learnt the wrong labels by heart no longer finds them suspicious.
        batch_size: samples of a batch.
        every_n_epochs: a checkpoint.
        dtype: in which gradients are stored.
    """

    epochs: int
    batch_size: int
    every_n_epochs: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True)
class Fit:
    """A fitted model and its store: gradients of all parameters at every checkpoint, EK-FAC at the last one."""

    hunted: Hunted
    module: LightningModule
    loader: Batches
    held_out: Batches
    folder: Path

    @cached_property
    def store(self) -> ArtifactStore:
        """What the callbacks wrote."""
        return ArtifactStore.open(self.folder)

    def ask(self, estimator: Attributor) -> InfluenceModule:
        """An estimator at the store."""
        return InfluenceModule(self.module, self.store, estimator, train_loader=self.loader)


def fitted(hunted: Hunted, training: Training, seed: int, folder: Path) -> Fit:
    """Train on all samples and keep what the scores need."""
    callbacks = [
        GradientSnapshot(folder, "all", every_n_epochs=training.every_n_epochs, dtype=training.dtype),
        CurvatureSnapshot(folder, "ekfac"),
    ]
    module, loader = _trained(hunted, hunted.train, training, seed, callbacks)
    return Fit(hunted, module, loader, hunted.loader(hunted.held_out, 512), folder)


def accuracy_without(hunted: Hunted, dropped: Tensor, training: Training, seed: int) -> float:
    """Accuracy on the test samples after training without some of the training samples."""
    return accuracy(hunted, _trained(hunted, hunted.without(dropped), training, seed, [])[0])


def accuracy(hunted: Hunted, module: LightningModule) -> float:
    """Share of the test samples that a model classifies rightly."""
    right = count = 0
    with torch.no_grad():
        for batch in hunted.loader(hunted.test, 512):
            inputs, labels = (batch["tokens"], batch["label"]) if isinstance(batch, dict) else batch
            right += int((module(inputs).argmax(1) == labels).sum())
            count += len(labels)
    return right / count


def _trained(
    hunted: Hunted, samples: Dataset[Any], training: Training, seed: int, callbacks: Sequence[Callback]
) -> tuple[LightningModule, Batches]:
    module = initial(hunted.build, seed)
    assert isinstance(module, LightningModule)
    loader = hunted.loader(samples, training.batch_size, seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # dropout
        plain_fit(module, loader, training.epochs, callbacks)
    return module.eval(), loader
