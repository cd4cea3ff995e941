"""Rank stability: does the same method give the same ranking when the model is trained with another seed?

Karthikeyan & Søgaard 2021 (2111.04683) found influence rankings to depend much on seeds; a ranking that does not repeat
itself cannot be an explanation of the data, whatever its other scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import count_of, floats
from lightning_influence.metrics.drawing import intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Stability:
    """How alike the rankings of several runs are, means over all pairs of runs, for each query.

    Args:
        spearman: rank correlation; nan where a run's scores are constant.
        kendall: τ_b, likewise.
        overlap: |A ∩ B| / |A ∪ B| of the first k of both; nan where the score at place k is that at place k + 1, so
            that there is no first k. Of random orders it is about k / (2N − k).
    """

    spearman: QueryMean
    kendall: QueryMean
    overlap: QueryMean

    def __str__(self) -> str:
        return f"Spearman {self.spearman}, Kendall {self.kendall}, overlap {self.overlap}"


def rank_stability(scores: Tensor, *, k: int | float = 10, resamples: int = 10_000, seed: int = 0) -> Stability:
    """Compare the scores of R runs with each other, for each query; N² steps a pair for Kendall.

    Args:
        scores: (R, Q, N) of the same queries and training samples; positive is a proponent.
        k: of the overlap of the first k; an int is a number of samples, a float a share of them.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: one run only, fewer than three samples, NaN, k out of range.

    >>> run = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> found = rank_stability(torch.stack([run, run.flip(1)]), k=2)
    >>> found.spearman.mean, found.kendall.mean, found.overlap.mean
    (-1.0, -1.0, 0.0)
    """
    return Stability(*(query_mean(v, resamples=resamples, seed=seed) for v in _per_query(scores, k)))


class RankStability(InfluenceMetric):
    """`rank_stability` over batches of queries, on one process or several.

    Args:
        k: of the overlap of the first k; an int is a number of samples, a float a share of them.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = RankStability(k=1)
    >>> metric.update(torch.tensor([[[3.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]]]))
    >>> found = metric.compute()
    >>> found.spearman.mean, found.overlap.mean
    (0.5, 1.0)
    """

    higher_is_better = True

    def __init__(self, *, k: int | float = 10, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(_KEPT, resamples=resamples, seed=seed, **kwargs)
        self.k = k

    def update(self, scores: Tensor) -> None:
        """Add queries: their scores in every run (R, Q, N)."""
        for name, values in zip(_KEPT, _per_query(scores, self.k), strict=True):
            self._keep(name, values)

    def compute(self) -> Stability:
        """The means over all queries of all processes."""
        return Stability(*self._means(*_KEPT))

    def plot(
        self, val: Stability | Mapping[str, Stability] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Spearman between runs with its interval, of one method or of several by name."""
        found = named(self.compute() if val is None else val, "stability")
        return intervals({name: one.spearman for name, one in found.items()}, ax, "rank correlation between runs")


_KEPT = ("spearmans", "kendalls", "overlaps")


def _per_query(scores: Tensor, k: int | float) -> tuple[Tensor, Tensor, Tensor]:
    scores = floats(scores, "scores", "(R, Q, N)")
    if scores.shape[0] < 2 or scores.shape[2] < 3:
        raise MetricError(
            "there are no rankings to compare",
            expected="scores (R, Q, N) of two runs or more and three samples or more",
            found=tuple(scores.shape),
            hint="the first dimension is the runs, one for each seed",
        )
    firsts = [_first(run, count_of(k, scores.shape[2])) for run in scores]
    correlations, kendalls, overlaps = [], [], []
    for a, b in combinations(range(len(scores)), 2):
        correlations.append(spearman(scores[a].t(), scores[b].t()))
        kendalls.append(_kendall(scores[a], scores[b]))
        both = (firsts[a] * firsts[b]).sum(1)
        overlaps.append(both / (firsts[a].sum(1) + firsts[b].sum(1) - both))
    spearmans, taus, jaccards = (torch.stack(pairs).mean(0) for pairs in (correlations, kendalls, overlaps))
    return spearmans, taus, jaccards


def _kendall(a: Tensor, b: Tensor) -> Tensor:
    """τ_b (Q,) of the rows of (Q, N); nan where a row is constant.

    Σ_ij sign(a_i − a_j) sign(b_i − b_j) / sqrt(Σ_ij sign² a · Σ_ij sign² b), whose products with ties are zero.
    """
    together, only_a, only_b = (a.new_zeros(len(a)) for _ in range(3))
    for place in range(a.shape[1]):
        signs_a, signs_b = ((side[:, place, None] - side).sign() for side in (a, b))  # (Q, N)
        together += (signs_a * signs_b).sum(1)
        only_a += signs_a.square().sum(1)
        only_b += signs_b.square().sum(1)
    return together / (only_a * only_b).sqrt()  # 0/0 is nan


def _first(scores: Tensor, k: int) -> Tensor:
    """1 for the first k of each row (Q, N), 0 for the others; a row is nan where equal scores leave no first k."""
    ordered, order = scores.sort(dim=1, descending=True)
    first = torch.zeros_like(scores).scatter_(1, order[:, :k], 1.0)
    if k < scores.shape[1]:
        first[ordered[:, k - 1] == ordered[:, k]] = torch.nan
    return first
