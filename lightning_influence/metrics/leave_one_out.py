"""Leave-one-out correlation: do scores foretell what training without one sample does?

Koh & Liang 2017 (1703.04730), section 4.1. By this library's sign a positive score is a proponent, so that leaving the
sample out of N raises the measurement by about score/N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import Ids, check_ids, floats, same_shape
from lightning_influence.metrics.drawing import intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import pearson, spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LeaveOneOut:
    """How scores and true changes go together, over the samples left out, for each query.

    Args:
        pearson: correlation of score/N with the change; nan where one of them is constant.
        spearman: of their ranks.
        slope: of the change on score/N through the origin, Σ xy / Σ x²: 1 where the scores have the right size.
    """

    pearson: QueryMean
    spearman: QueryMean
    slope: QueryMean

    def __str__(self) -> str:
        return f"Pearson {self.pearson}, Spearman {self.spearman}, slope {self.slope}"


def leave_one_out_correlation(
    scores: Tensor,
    changes: Tensor,
    num_samples: int,
    *,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> LeaveOneOut:
    """Correlate scores/N with the true changes m(trained without the sample) − m(θ), over samples, for each query.

    Args:
        scores: (Q, M) of the M samples that were left out in turn; positive is a proponent.
        changes: (Q, M) of the measurement, lower is better; a mean over seeds if there are several.
        num_samples: N, of the whole training set; it matters to the slope alone.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: of the changes.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes or ids that differ, fewer than three samples left out, more than there are, NaN.

    >>> scores = torch.tensor([[2.0, -4.0, 6.0]])
    >>> found = leave_one_out_correlation(scores, scores / 100, num_samples=100)
    >>> round(found.pearson.mean, 6), round(found.spearman.mean, 6), round(found.slope.mean, 6)
    (1.0, 1.0, 1.0)
    """
    check_ids(ids, truth_ids)
    means = (query_mean(values, resamples=resamples, seed=seed) for values in _per_query(scores, changes, num_samples))
    return LeaveOneOut(*means)


class LeaveOneOutCorrelation(InfluenceMetric):
    """`leave_one_out_correlation` over batches of queries, on one process or several.

    Args:
        num_samples: N, of the whole training set.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = LeaveOneOutCorrelation(num_samples=100)
    >>> metric.update(torch.tensor([[2.0, -4.0, 6.0]]), torch.tensor([[0.01, -0.02, 0.05]]))
    >>> metric.compute().spearman.mean
    1.0
    """

    higher_is_better = True

    def __init__(self, num_samples: int, *, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(_KEPT, resamples=resamples, seed=seed, **kwargs)
        self.num_samples = num_samples

    def update(self, scores: Tensor, changes: Tensor, *, ids: Ids | None = None, truth_ids: Ids | None = None) -> None:
        """Add queries: their scores and true changes (Q, M)."""
        check_ids(ids, truth_ids)
        for name, values in zip(_KEPT, _per_query(scores, changes, self.num_samples), strict=True):
            self._keep(name, values)

    def compute(self) -> LeaveOneOut:
        """The means over all queries of all processes."""
        return LeaveOneOut(*self._means(*_KEPT))

    def plot(
        self, val: LeaveOneOut | Mapping[str, LeaveOneOut] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Spearman with its interval, of one method or of several by name."""
        found = named(self.compute() if val is None else val, "leave-one-out")
        return intervals({name: one.spearman for name, one in found.items()}, ax, "rank correlation, one left out")


_KEPT = ("pearsons", "spearmans", "slopes")


def _per_query(scores: Tensor, changes: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    scores, changes = floats(scores, "scores", "(Q, M)"), floats(changes, "changes", "(Q, M)")
    same_shape("changes", tuple(changes.shape), tuple(scores.shape))
    if not 3 <= scores.shape[1] <= num_samples:
        raise MetricError(
            "there is no correlation over these samples",
            expected=f"scores of 3 samples or more, and of no more than there are: {num_samples}",
            found=scores.shape[1],
            hint="num_samples is the number of training samples, of which some or all were left out in turn",
        )
    foretold, changes = scores.t() / num_samples, changes.to(scores.device).t()  # (M, Q)
    squares = foretold.square().sum(0)
    slope = torch.where(squares > 0, (foretold * changes).sum(0) / squares, torch.nan)
    return pearson(foretold, changes), spearman(foretold, changes), slope
