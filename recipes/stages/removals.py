"""Removed pretraining samples: which groups, what they changed, and how well that was foretold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.metrics import spearman
from lightning_influence.metrics.intervals import with_interval
from recipes.truths.retraining import Samples


@dataclass(frozen=True)
class Interval:
    """A number with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Tensor) -> Interval:
        """From the values of resampled data, those that are undefined left out."""
        known = resampled[~resampled.isnan()].double()
        if not len(known):
            return cls(value, torch.nan, torch.nan)
        low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(value, low, high)

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class Agreement:
    """How predicted changes (G, Q) of removals agree with the true ones.

    Args:
        pearson: correlation over the groups, mean over the queries.
        spearman: likewise, of ranks.
        mean_loss: Pearson correlation over the groups of the change of the queries' mean loss.
        resampled: `pearson` of every bootstrap sample, to compare methods by the same samples.
    """

    pearson: Interval
    spearman: Interval
    mean_loss: Interval
    resampled: Tensor


def coherent_groups(samples: Samples, count: int, size: int, seed: int) -> list[Tensor]:
    """Parts of a class: an image and those of its class that are nearest to it, the classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.unique(samples.labels).tolist()
    found = []
    for number in range(count):
        members = (samples.labels == classes[number % len(classes)]).nonzero().squeeze(1)
        centre = members[torch.randint(len(members), (1,), generator=generator)]
        distances = (samples.inputs[members] - samples.inputs[centre]).flatten(1).norm(dim=1)
        found.append(members[distances.argsort()[:size]])
    return found


def random_groups(samples: Samples, count: int, size: int, seed: int) -> list[Tensor]:
    """Any samples."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(len(samples), generator=generator)[:size] for _ in range(count)]


def without(groups: Sequence[Tensor], size: int) -> list[Tensor]:
    """Weights (N,) of all samples: first 1 for all, then for each group 0 of its members."""
    weights = [torch.ones(size) for _ in range(len(groups) + 1)]
    for weight, group in zip(weights[1:], groups, strict=True):
        weight[group] = 0
    return weights


def predicted(scores: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Predicted change (G, Q) of every query's loss: (1/N) Σ of the group's scores (Q, N)."""
    return torch.stack([scores[:, group].double().sum(1) for group in groups]) / scores.shape[1]


def changes(losses: Tensor) -> Tensor:
    """True change (G, seeds, Q) from losses (1 + G, seeds, Q), each against the whole model of its own seed."""
    return losses[1:] - losses[:1]


def agreement(foretold: Tensor, true: Tensor, *, resamples: int = 1000, seed: int = 0) -> Agreement:
    """Judge predicted changes (G, Q); the bootstrap is over groups and queries at once."""
    draws = _draws(len(true), true.shape[1], resamples, seed)
    resampled = torch.tensor([float(pearson(foretold[g][:, q], true[g][:, q]).nanmean()) for g, q in draws])
    ranks = torch.tensor([float(spearman(foretold[g][:, q], true[g][:, q]).nanmean()) for g, q in draws[:200]])
    means = foretold.mean(1, keepdim=True), true.mean(1, keepdim=True)
    of_means = torch.tensor([float(pearson(means[0][g], means[1][g])) for g, _ in draws])
    return Agreement(
        Interval.of(float(pearson(foretold, true).nanmean()), resampled),
        Interval.of(float(spearman(foretold, true).nanmean()), ranks),
        Interval.of(float(pearson(*means)), of_means),
        resampled,
    )


def ahead(one: Agreement, other: Agreement) -> Interval:
    """By how much one method's Pearson correlation is above another's, on the same bootstrap samples."""
    return Interval.of(one.pearson.value - other.pearson.value, one.resampled - other.resampled)


def agreement_of_halves(true: Tensor) -> str:
    """Pearson correlation of the changes (G, seeds, Q), mean over one half of the seeds, with those of the other;
    nothing where there is one seed."""
    half = true.shape[1] // 2
    if not half:
        return ""
    return f"{float(pearson(true[:, :half].mean(1), true[:, half:].mean(1)).nanmean()):.3f}"


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlations (Q,) of the columns of two matrices (G, Q); nan where undefined."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 0, (a * b).sum(0) / scale, torch.nan)


def _draws(groups: int, queries: int, resamples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(size, (size,), generator=generator) for size in (groups, queries))  # type: ignore[misc]
        for _ in range(resamples)
    ]
