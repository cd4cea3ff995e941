"""How an edited model is judged: what it should keep, what it should lose, and how far it is from retraining."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_influence.edits import removal_f1
from recipes.truths.retraining import Samples

BATCH_SIZE = 1000


@dataclass(frozen=True)
class RemovalJudgement:
    """A model that should have forgotten a class.

    Args:
        retained_accuracy: on the test images of the other classes; the higher the better.
        target_accuracy: on those of the removed class; zero is best.
        distance: to the retrained model's predictions on all test images.
    """

    retained_accuracy: float
    target_accuracy: float
    distance: float

    @property
    def f1(self) -> float:
        """Both accuracies in one number."""
        return removal_f1(self.target_accuracy, self.retained_accuracy)


@dataclass(frozen=True)
class BackdoorJudgement:
    """A model that should have forgotten what a patch means.

    Args:
        clean_accuracy: on the test images as they are.
        relabelled_accuracy: on the stamped images of the other classes, by their true labels.
        backdoored: share of the stamped images that are still taken for the target.
        distance: to the retrained model's predictions on the test images as they are and the stamped ones.
    """

    clean_accuracy: float
    relabelled_accuracy: float
    backdoored: float
    distance: float


def judge_removal(module: nn.Module, test: Samples, removed: int, retrained: Tensor) -> RemovalJudgement:
    """Judge the removal of a class against the retrained model's probabilities (N, C) of all test images."""
    target = test.labels == removed
    found = probabilities(module, test)
    right = found.argmax(1) == test.labels
    return RemovalJudgement(
        retained_accuracy=_share(right[~target]),
        target_accuracy=_share(right[target]),
        distance=distance(found, retrained),
    )


def judge_backdoor(
    module: nn.Module, test: Samples, stamped: Samples, target_label: int, retrained: tuple[Tensor, Tensor]
) -> BackdoorJudgement:
    """Judge what is left of a backdoor, given the retrained model's probabilities of clean and of stamped images."""
    clean, backdoor = probabilities(module, test), probabilities(module, stamped)
    return BackdoorJudgement(
        clean_accuracy=_share(clean.argmax(1) == test.labels),
        relabelled_accuracy=_share(backdoor.argmax(1) == stamped.labels),
        backdoored=_share(backdoor.argmax(1) == target_label),
        distance=distance(torch.cat((clean, backdoor)), torch.cat(retrained)),
    )


def probabilities(module: nn.Module, samples: Samples) -> Tensor:
    """The predicted probabilities (N, C); the module is left in the mode that it was in."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.cat([module(inputs).softmax(1) for inputs in torch.split(samples.inputs, BATCH_SIZE)])
    finally:
        module.train(training)


def accuracy(module: nn.Module, samples: Samples) -> float:
    """Share of the images whose most probable class is their label."""
    return _share(probabilities(module, samples).argmax(1) == samples.labels)


def predicted_as(module: nn.Module, samples: Samples, label: int) -> float:
    """Share of the images whose most probable class is the given one, whatever their own."""
    return _share(probabilities(module, samples).argmax(1) == label)


def distance(p: Tensor, q: Tensor) -> float:
    """Mean total variation distance ½ Σ |p − q| between two models' predictions (N, C): 0 if equal, 1 if disjoint."""
    if p.shape != q.shape:
        raise ValueError(f"Expected two predictions of one shape, found {tuple(p.shape)} and {tuple(q.shape)}.")
    return float((p.double() - q.double()).abs().sum(1).mean() / 2)


def _share(truths: Tensor) -> float:
    """The mean of booleans, nan where there are none."""
    return float(truths.double().mean())
