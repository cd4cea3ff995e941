"""The question that every peer is asked: which training samples speak for a prediction, and which for themselves.

Every answer is oriented alike, whatever the peer's own convention: a positive score marks a proponent, a training
sample whose up-weighting lowers the cross-entropy of the query at the query's label. Scales differ and are left as
they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.truths.samples import Samples


@dataclass(frozen=True)
class Trained:
    """One text classifier and its training: what every peer gets.

    Args:
        model: with its final weights, in eval mode; forward(tokens (B, T)) -> logits (B, C), padding id 0.
        checkpoints: its state dicts in the order of training; the last one has the final weights.
        learning_rates: one a checkpoint.
        train: inputs (N, T) padded with 0, and labels (N,).
    """

    model: nn.Module
    checkpoints: Sequence[Mapping[str, Tensor]]
    learning_rates: Sequence[float]
    train: Samples

    def __post_init__(self) -> None:
        if not self.checkpoints or len(self.checkpoints) != len(self.learning_rates):
            raise ValueError(
                f"Expected a learning rate for every checkpoint, and one checkpoint at least, found "
                f"{len(self.checkpoints)} checkpoints and {len(self.learning_rates)} learning rates."
            )
        final = self.model.state_dict()
        apart = [name for name, value in self.checkpoints[-1].items() if not torch.equal(value, final[name])]
        if apart:
            raise ValueError(
                f"Expected the model's own weights in the last checkpoint, found others in {apart[0]}. "
                "HINT: let the checkpoints' distance divide the epochs."
            )

    def copy(self) -> nn.Module:
        """The model once more, in eval mode: peers load checkpoints into what they are given, hook it and wrap it.

        The Trainer that a fitted LightningModule remembers is left out of the copy.
        """
        trainer = getattr(self.model, "_trainer", None)
        return copy.deepcopy(self.model, {id(trainer): None}).eval()


@dataclass(frozen=True)
class Peer:
    """A library with one of its methods.

    Args:
        name: the library and the method.
        scores: of a training, queries and an empty folder, (Q, N), positive for proponents. Whatever the peer keeps
            on disk lies in the folder afterwards.
        self_influence: of a training and an empty folder, (N,), high for a sample that has a large influence on itself;
            None where the peer's own interface has none, or none that works here.
    """

    name: str
    scores: Callable[[Trained, Samples, Path], Tensor]
    self_influence: Callable[[Trained, Path], Tensor] | None


def dataset(samples: Samples) -> TensorDataset:
    """Tokens and labels as the peers' loaders want them."""
    return TensorDataset(samples.inputs, samples.labels)


def word_embedding(model: nn.Module) -> str:
    """The name of the first Embedding of a model."""
    return _named(model, nn.Embedding)[0]


def last_layer(model: nn.Module) -> str:
    """The name of the last Linear layer of a model, in the order of its definition."""
    return _named(model, nn.Linear)[-1]


def _named(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    names = [name for name, layer in model.named_modules() if isinstance(layer, kind)]
    if not names:
        raise ValueError(
            f"Expected a model with a layer of type {kind.__name__}, found none in {type(model).__name__}."
        )
    return names
