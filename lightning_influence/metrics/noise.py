"""Noise detection rate: are the samples that were made noisy among those that worked most against a query?

The samples are examined from the lowest score up (opponents first), and the rate is the share of noisy ones among the
first k. The name is that of Vitel & Chhabra 2025 (2511.04715), who judge layers by it without retraining; two-stage
attribution cleans pretraining data in this way (Chen et al. 2020, 2007.09081).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_influence.metrics.checks import Ids, booleans, check_ids, count_of, floats
from lightning_influence.metrics.drawing import FAINT, intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import found_among_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class NoiseFound:
    """How many of the samples examined first are noisy.

    Args:
        rate: noisy samples among the first k / k, for each query.
        chance: noisy samples / N, for each query: what a random order has.
        best: min(noisy samples, k) / k, for each query: what can be reached.
    """

    rate: QueryMean
    chance: QueryMean
    best: QueryMean

    def __str__(self) -> str:
        return f"{self.rate}, by chance {self.chance.mean:.3f}, at best {self.best.mean:.3f}"


def noise_detection_rate(
    scores: Tensor,
    noisy: Tensor,
    *,
    k: int | float = 0.1,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> NoiseFound:
    """The share of noisy samples among the k with the lowest scores, the mean over equal scores' orders.

    For a score of which high values are suspicious, pass its negative. For one score a sample, pass (1, N).

    Args:
        scores: (Q, N); negative is an opponent, and the lowest is examined first.
        noisy: which training samples are noisy (N,).
        k: how many are examined; an int is a number of samples, a float a share of them.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: of the samples that are known to be noisy or not.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes or ids that differ, no booleans, NaN, k out of range.

    >>> import torch
    >>> scores, noisy = torch.tensor([[-3.0, -2.0, 0.0, 1.0]]), torch.tensor([True, False, False, False])
    >>> print(noise_detection_rate(scores, noisy, k=0.5))
    0.500 [0.500, 0.500], by chance 0.250, at best 0.500
    """
    check_ids(ids, truth_ids)
    return NoiseFound(*(query_mean(v, resamples=resamples, seed=seed) for v in _per_query(scores, noisy, k)))


class NoiseDetectionRate(InfluenceMetric):
    """`noise_detection_rate` over batches of queries, on one process or several.

    Args:
        k: how many are examined; an int is a number of samples, a float a share of them.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> import torch
    >>> metric = NoiseDetectionRate(k=1)
    >>> noisy = torch.tensor([True, False, False])
    >>> metric.update(torch.tensor([[-3.0, 2.0, 0.0], [3.0, -2.0, 0.0]]), noisy)
    >>> metric.compute().rate.mean
    0.5
    """

    higher_is_better = True

    def __init__(self, *, k: int | float = 0.1, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(_KEPT, resamples=resamples, seed=seed, **kwargs)
        self.k = k

    def update(self, scores: Tensor, noisy: Tensor, *, ids: Ids | None = None, truth_ids: Ids | None = None) -> None:
        """Add queries: their scores (Q, N) and which training samples are noisy (N,)."""
        check_ids(ids, truth_ids)
        for name, values in zip(_KEPT, _per_query(scores, noisy, self.k), strict=True):
            self._keep(name, values)

    def compute(self) -> NoiseFound:
        """The means over all queries of all processes."""
        return NoiseFound(*self._means(*_KEPT))

    def plot(
        self, val: NoiseFound | Mapping[str, NoiseFound] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """The rate with its interval, of one method or of several by name; dashed, the first one's chance rate."""
        found = named(self.compute() if val is None else val, "noise detection")
        figure, ax = intervals({name: one.rate for name, one in found.items()}, ax, "share of noisy samples examined")
        ax.axhline(next(iter(found.values())).chance.mean, color=FAINT, linestyle="--", label="by chance")
        ax.legend(frameon=False)
        return figure, ax


_KEPT = ("rates", "chances", "bests")


def _per_query(scores: Tensor, noisy: Tensor, k: int | float) -> tuple[Tensor, Tensor, Tensor]:
    scores = floats(scores, "scores", "(Q, N)")
    noisy = booleans(noisy, "noisy samples", tuple(scores.shape[1:])).to(scores.device)
    count, among = count_of(k, scores.shape[1]), int(noisy.sum())
    rate = found_among_first(-scores, noisy.expand(scores.shape))[:, count] / count
    return rate, rate.new_full(rate.shape, among / len(noisy)), rate.new_full(rate.shape, min(among, count) / count)
