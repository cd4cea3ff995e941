"""Class detection: do a query's scores tell the samples of its own class from the others?

The whole ranking where `same_class_rate` looks at its beginning; as the class and subclass detection of quanda (Bareeva
et al. 2024, 2410.07158) it is a check of plausibility, not of truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.metrics.checks import Ids, check_ids
from lightning_influence.metrics.drawing import FAINT, intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import auroc, average_precision
from lightning_influence.metrics.same_class import of_the_same_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ClassesFound:
    """How well a query's scores find its class, nan for a query whose class is that of no sample or of all.

    Args:
        auroc: area under the ROC curve; 0.5 by chance, and of constant scores.
        average_precision: Σ (R_t − R_{t−1}) P_t over the distinct scores.
    """

    auroc: QueryMean
    average_precision: QueryMean

    def __str__(self) -> str:
        return f"AUROC {self.auroc}, average precision {self.average_precision}"


def class_detection(
    scores: Tensor,
    labels: Tensor,
    query_labels: Tensor,
    *,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> ClassesFound:
    """Judge each query's scores by which samples have its class.

    Args:
        scores: (Q, N); positive is a proponent.
        labels: classes of the training samples (N,).
        query_labels: classes of the queries (Q,), true or predicted.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: whose labels.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes or ids that differ, labels that are no integers, NaN.

    >>> found = class_detection(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([4, 5, 4]), torch.tensor([4]))
    >>> found.auroc.mean, round(found.average_precision.mean, 4)
    (0.5, 0.8333)
    """
    check_ids(ids, truth_ids)
    per_query = _per_query(scores, labels, query_labels)
    return ClassesFound(*(query_mean(values, resamples=resamples, seed=seed) for values in per_query))


class ClassDetection(InfluenceMetric):
    """`class_detection` over batches of queries, on one process or several.

    Args:
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = ClassDetection()
    >>> metric.update(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([4, 4, 5]), torch.tensor([4]))
    >>> metric.compute().auroc.mean
    1.0
    """

    higher_is_better = True

    def __init__(self, *, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("areas", "precisions"), resamples=resamples, seed=seed, **kwargs)

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
        areas, precisions = _per_query(scores, labels, query_labels)
        self._keep("areas", areas)
        self._keep("precisions", precisions)

    def compute(self) -> ClassesFound:
        """The means over all queries of all processes."""
        return ClassesFound(*self._means("areas", "precisions"))

    def plot(
        self, val: ClassesFound | Mapping[str, ClassesFound] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """The area with its interval, of one method or of several by name; dashed, chance."""
        found = named(self.compute() if val is None else val, "class detection")
        figure, ax = intervals({name: one.auroc for name, one in found.items()}, ax, "AUROC of the query's class")
        ax.axhline(0.5, color=FAINT, linestyle="--", label="by chance")
        ax.legend(frameon=False)
        return figure, ax


def _per_query(scores: Tensor, labels: Tensor, query_labels: Tensor) -> tuple[Tensor, Tensor]:
    scores, same = of_the_same_class(scores, labels, query_labels)
    rows = list(zip(scores, same, strict=True))
    areas, precisions = ([measure(*row) for row in rows] for measure in (auroc, average_precision))
    return torch.tensor(areas, dtype=torch.float64), torch.tensor(precisions, dtype=torch.float64)
