"""Same-class rate: are the first proponents of the query's own class?

Hanawa et al. 2021, "Evaluation of similarity-based explanations" (2006.04528), the identical class test, there with the
first one only: what a person expects of an explanation by examples, and no evidence that it is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_influence.metrics.checks import Ids, check_ids, classes, count_of, floats
from lightning_influence.metrics.drawing import FAINT, intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import found_among_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SameClass:
    """How many of the first proponents have the class of the query.

    Args:
        rate: share of the first k, for each query.
        chance: share of the training set, for each query: what a random order has.
    """

    rate: QueryMean
    chance: QueryMean

    def __str__(self) -> str:
        return f"{self.rate}, by chance {self.chance.mean:.3f}"


def same_class_rate(
    scores: Tensor,
    labels: Tensor,
    query_labels: Tensor,
    *,
    k: int | float = 10,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> SameClass:
    """The share of the k samples with the highest scores that are of the query's class.

    Equal scores have no order: the share is the mean over all orders of them.

    Args:
        scores: (Q, N); positive is a proponent.
        labels: classes of the training samples (N,).
        query_labels: classes of the queries (Q,), true or predicted.
        k: an int is a number of samples, a float a share of them.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: whose labels.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes or ids that differ, labels that are no integers, NaN, k out of range.

    >>> import torch
    >>> scores, labels = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([4, 5, 4])
    >>> found = same_class_rate(scores, labels, torch.tensor([4]), k=2)
    >>> found.rate.mean, round(found.chance.mean, 4)
    (0.5, 0.6667)
    """
    check_ids(ids, truth_ids)
    rate, chance = _per_query(scores, labels, query_labels, k)
    return SameClass(*(query_mean(values, resamples=resamples, seed=seed) for values in (rate, chance)))


class SameClassRate(InfluenceMetric):
    """`same_class_rate` over batches of queries, on one process or several.

    Args:
        k: an int is a number of samples, a float a share of them.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> import torch
    >>> metric = SameClassRate(k=1)
    >>> labels = torch.tensor([4, 5, 4])
    >>> metric.update(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), labels, torch.tensor([4, 5]))
    >>> metric.compute().rate.mean
    0.5
    """

    higher_is_better = True

    def __init__(self, *, k: int | float = 10, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("rates", "chances"), resamples=resamples, seed=seed, **kwargs)
        self.k = k

    def update(
        self,
        scores: Tensor,
        labels: Tensor,
        query_labels: Tensor,
        *,
        ids: Ids | None = None,
        truth_ids: Ids | None = None,
    ) -> None:
        """Add queries: their scores (Q, N), the training samples' classes (N,) and their own (Q,)."""
        check_ids(ids, truth_ids)
        rate, chance = _per_query(scores, labels, query_labels, self.k)
        self._keep("rates", rate)
        self._keep("chances", chance)

    def compute(self) -> SameClass:
        """The means over all queries of all processes."""
        return SameClass(*self._means("rates", "chances"))

    def plot(
        self, val: SameClass | Mapping[str, SameClass] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """The rate with its interval, of one method or of several by name; dashed, the first one's chance rate."""
        found = named(self.compute() if val is None else val, "same class")
        figure, ax = intervals({name: one.rate for name, one in found.items()}, ax, "share with the query's class")
        ax.axhline(next(iter(found.values())).chance.mean, color=FAINT, linestyle="--", label="by chance")
        ax.legend(frameon=False)
        return figure, ax


def of_the_same_class(scores: Tensor, labels: Tensor, query_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The scores in float64, and which samples have the class of the query, both (Q, N)."""
    scores = floats(scores, "scores", "(Q, N)")
    labels = classes(labels, "labels", scores.shape[1]).to(scores.device)
    query_labels = classes(query_labels, "query labels", scores.shape[0]).to(scores.device)
    return scores, query_labels.unsqueeze(1) == labels


def _per_query(scores: Tensor, labels: Tensor, query_labels: Tensor, k: int | float) -> tuple[Tensor, Tensor]:
    scores, same = of_the_same_class(scores, labels, query_labels)
    count = count_of(k, scores.shape[1])
    return found_among_first(scores, same)[:, count] / count, same.double().mean(1)
