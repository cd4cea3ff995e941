"""Samples as tensors, and the parts of a training set that models are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs (N, ...) and class labels (N,), which nobody changes in place.

    Args:
        inputs: of any shape; token ids (N, T) where `padding` is given.
        labels: int64.
        padding: the id that fills texts up at their end. Every batch is then cut to its longest text before the model
            sees it: much faster where lengths differ, and exact for models that mask padding.
    """

    inputs: Tensor
    labels: Tensor
    padding: int | None = None

    def __post_init__(self) -> None:
        if self.padding is not None and self.inputs.dim() != 2:
            raise ValueError(
                f"Expected token ids (N, T) beside a padding id, found inputs {tuple(self.inputs.shape)}. "
                "HINT: leave padding out for anything but texts."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of every text up to its last one that is no padding (N,), at least 1."""
        places = torch.arange(1, self.inputs.shape[1] + 1)
        return ((self.inputs != self.padding) * places).amax(1).clamp(min=1)

    def inputs_of(self, indices: Tensor) -> Tensor:
        """Inputs (*indices.shape, ...), texts cut to the longest one among them."""
        if self.padding is None:
            return self.inputs[indices]
        return self.inputs[:, : int(self.lengths[indices].max())][indices]


def random_subsets(size: int, count: int, fraction: float, seed: int) -> list[Tensor]:
    """Draw parts of a training set, each without repetition: ⌊fraction · size⌋ indices in random order.

    They are drawn one after the other: a larger count only adds to them, and subset number i is the same whoever draws
    it.

    Args:
        size: of the training set.
        count: how many.
        fraction: of the set in each, between 0 and 1.
        seed: of the draws.

    >>> [len(subset) for subset in random_subsets(10, 3, 0.5, seed=0)]
    [5, 5, 5]
    """
    each = math.floor(fraction * size + 1e-9)  # 0.29 * 100 is 28.999...
    if not 1 <= each <= size or count < 1:
        raise ValueError(
            f"Expected one subset or more of 1 to {size} samples, found {count} of {each} (fraction {fraction}). "
            "HINT: a fraction lies between 0 and 1."
        )
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.choice(size, each, replace=False)) for _ in range(count)]


def check_subsets(train: Samples, subsets: Sequence[Tensor], weights: Sequence[Tensor] | None) -> None:
    """Refuse subsets that no model can be trained on."""
    if not subsets or any(subset.dim() != 1 or not len(subset) for subset in subsets):
        raise ValueError(
            "Expected subsets of at least one index each, (n,). HINT: to remove a sample, list the others."
        )
    least, most = min(int(s.min()) for s in subsets), max(int(s.max()) for s in subsets)
    if least < 0 or most >= len(train):
        raise ValueError(f"Expected indices below {len(train)}, the number of training samples, found {least}..{most}.")
    if weights is not None and [tuple(w.shape) for w in weights] != [tuple(s.shape) for s in subsets]:
        raise ValueError("Expected one weight for every index of every subset.")
