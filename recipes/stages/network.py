"""A small network of an embedding and a head, and how both runs train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from recipes.stages.data import Tasks
from recipes.truths.training import Build, Recipe

_FINETUNING_SEED = 1000  # added to a model's seed: a finetuning head is not the pretraining one again


class Network(nn.Module):
    """Linear layers with tanh between them: all but the last are the embedding.

    Args:
        inputs: pixels of an image.
        classes: outputs of the head.
        widths: of the embedding's layers.
    """

    def __init__(self, inputs: int, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *widths]):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.embedding = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, inputs)."""
        logits: Tensor = self.head(self.embedding(inputs))
        return logits


@dataclass(frozen=True)
class Finetuning:
    """How the second run trains.

    Args:
        recipe: of its head.
        embedding: the embedding's learning rate over the head's; 0 leaves the embedding frozen.
    """

    recipe: Recipe
    embedding: float = 1.0

    @property
    def frozen(self) -> bool:
        """Whether the embedding stays as it is."""
        return self.embedding == 0

    def learning_rate(self, name: str) -> float:
        """Of a parameter."""
        return self.recipe.learning_rate * (self.embedding if is_shared(name) else 1.0)


@dataclass(frozen=True)
class TwoRuns:
    """How a network is trained twice.

    Args:
        first: makes the network that is pretrained.
        second: makes the one that is finetuned; its embedding is then replaced by the pretrained one.
        pretraining: recipe of the first run.
        finetuning: how the second run trains.
    """

    first: Build
    second: Build
    pretraining: Recipe
    finetuning: Finetuning

    @classmethod
    def of(cls, tasks: Tasks, widths: Sequence[int], pretraining: Recipe, finetuning: Finetuning) -> TwoRuns:
        """The runs of two tasks."""
        first, second = (partial(Network, tasks.inputs, classes, tuple(widths)) for classes in tasks.classes)
        return cls(first, second, pretraining, finetuning)


def finetuning_seed(seed: int) -> int:
    """The seed of a model's new head, and of its batches in finetuning."""
    return _FINETUNING_SEED + seed


def is_shared(name: str) -> bool:
    """Whether finetuning takes a parameter over from pretraining."""
    return name.startswith("embedding.")
