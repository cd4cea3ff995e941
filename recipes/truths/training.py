"""One classifier trained in the plain way, with torch's own SGD: the recipe that retraining repeats many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Recipe:
    """SGD on the mean cross-entropy of a batch, as torch.optim.SGD does it.

    Args:
        epochs: passes over the samples.
        batch_size: samples of a batch; the last one of an epoch may be smaller.
        learning_rate: constant.
        momentum: without dampening.
        weight_decay: added to the gradient of every parameter, biases too.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """The optimizer of a model."""
        return torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def orders(self, size: int, seed: int) -> Iterator[Tensor]:
        """The positions (size,) in every epoch's order; they depend on the seed and the number of samples alone."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            yield torch.randperm(size, generator=generator)


class RecipesOrder(Sampler[int]):
    """The order of the samples in every epoch, as the recipe has it for a seed; Lightning says which epoch it is."""

    def __init__(self, recipe: Recipe, size: int, seed: int) -> None:
        self.orders = list(recipe.orders(size, seed))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.orders[self.epoch].tolist())

    def __len__(self) -> int:
        return len(self.orders[0])


def initial(build: Build, seed: int) -> nn.Module:
    """A model with the initial weights of a seed, in train mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return build().train()


def train(build: Build, recipe: Recipe, inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A model trained on all of the samples, in eval mode; the seed gives its initial weights and its batches."""
    model = initial(build, seed)
    optimizer = recipe.optimizer(model)
    for order in recipe.orders(len(labels), seed):
        for batch in torch.split(order, recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()
