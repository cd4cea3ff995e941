"""Both runs as a user has them: a Trainer and this library's callbacks, in the batches of the retrained models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import CurvatureSnapshot, GradientSnapshot, StageLinker
from recipes.stages.data import Tasks
from recipes.stages.network import Finetuning, Network, TwoRuns, finetuning_seed
from recipes.truths.fitting import plain_fit
from recipes.truths.retraining import Samples
from recipes.truths.training import Build, RecipesOrder, initial


class StagedClassifier(LightningModule):
    """A network with the mean cross-entropy and SGD, whose embedding may go slower than its head."""

    def __init__(self, network: Network, how: Finetuning) -> None:
        super().__init__()
        self.embedding, self.head, self.how = network.embedding, network.head, how
        self.embedding.requires_grad_(not how.frozen)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, inputs)."""
        logits: Tensor = self.head(self.embedding(inputs))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD over what is trained."""
        recipe, how = self.how.recipe, self.how
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters())}]
        if not how.frozen:
            groups.append({"params": list(self.embedding.parameters()), "lr": how.learning_rate("embedding.")})
        return torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )


@dataclass(frozen=True)
class Fit:
    """A fitted run: its module, the loader of its training data, and the folder of its store."""

    module: StagedClassifier
    loader: DataLoader[Any]
    store: Path


@dataclass(frozen=True)
class TwoFits:
    """A pretraining run and the finetuning run that went on from it."""

    first: Fit
    second: Fit


def pretrained(runs: TwoRuns, samples: Samples, seed: int, folder: Path, *, checkpoints: int = 1) -> Fit:
    """The first run, with its curvature and its gradients.

    Args:
        checkpoints: at how many moments, evenly apart, gradients are taken for TracIn.
    """
    every = max(1, runs.pretraining.epochs // checkpoints)
    callbacks: list[Callback] = [
        GradientSnapshot(folder, "all", every_n_epochs=every),
        CurvatureSnapshot(folder, "ekfac"),
    ]
    return _fitted(_classifier(runs.first, Finetuning(runs.pretraining), seed), samples, seed, folder, callbacks)


def finetuned(
    runs: TwoRuns, samples: Samples, seed: int, first: Fit, folder: Path, *, gradients: bool = False
) -> TwoFits:
    """The second run, linked to the first.

    Args:
        gradients: keep those of its own samples too.
    """
    module = _classifier(runs.second, runs.finetuning, finetuning_seed(seed))
    module.embedding.load_state_dict(first.module.embedding.state_dict())
    callbacks: list[Callback] = [
        CurvatureSnapshot(folder, "ekfac"),
        StageLinker(folder, pretrain=first.store, fresh="head.*"),
    ]
    if gradients:
        callbacks.insert(0, GradientSnapshot(folder, "all", every_n_epochs=runs.finetuning.recipe.epochs))
    return TwoFits(first, _fitted(module, samples, finetuning_seed(seed), folder, callbacks))


def fitted(runs: TwoRuns, tasks: Tasks, seed: int, folder: Path) -> TwoFits:
    """Both runs."""
    first = pretrained(runs, tasks.pretraining, seed, folder / "pretraining")
    return finetuned(runs, tasks.finetuning, seed, first, folder / "finetuning")


def check_losses(fits: TwoFits, queries: Samples, expected: Tensor) -> None:
    """Hold the finetuned model against the retrained one of its seed: they are to be the same.

    Raises:
        RuntimeError: the queries' losses (Q,) differ.
    """
    with torch.no_grad():
        found = F.cross_entropy(fits.second.module(queries.inputs), queries.labels, reduction="none").double()
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3):
        raise RuntimeError(f"Losses differ by {float((found - expected).abs().max()):.2g} from the retrained model.")


def _classifier(build: Build, how: Finetuning, seed: int) -> StagedClassifier:
    network = initial(build, seed)
    assert isinstance(network, Network)
    return StagedClassifier(network, how)


def _fitted(module: StagedClassifier, samples: Samples, seed: int, folder: Path, callbacks: list[Callback]) -> Fit:
    recipe = module.how.recipe
    dataset = TensorDataset(samples.inputs, samples.labels)
    loader = DataLoader(dataset, recipe.batch_size, sampler=RecipesOrder(recipe, len(dataset), seed))
    plain_fit(module, loader, recipe.epochs, callbacks)
    return Fit(module.eval(), loader, folder)
