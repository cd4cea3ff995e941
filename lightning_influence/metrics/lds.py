"""The linear datamodeling score (LDS): do scores foretell what training on a subset does?

For each query: the rank correlation, over subsets, of the sum of its scores of the subset's samples with the mean over
seeds of −m, m the measurement after training on that subset (lower is better, so a good attribution has a positive
score). Park et al. 2023, TRAK (arXiv 2303.14186), section 2; the truths are those of Ilyas et al. 2022 (2202.00622).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.ceiling import NoiseCeiling, ceiling_of, halves, jackknifed
from lightning_influence.metrics.checks import Ids, check_ids, enough_subsets, floats, measured
from lightning_influence.metrics.drawing import intervals, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROUNDING = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LDS:
    """A linear datamodeling score, and what the truths allow.

    Args:
        score: rank correlation of each query, their mean and its interval.
        ceiling: which score the noise of the truths leaves to a perfect attribution (see `noise_ceiling`); nan where
            there was one seed only.
    """

    score: QueryMean
    ceiling: NoiseCeiling

    def __str__(self) -> str:
        return f"LDS {self.score}, noise ceiling {self.ceiling}"


def linear_datamodeling_score(
    scores: Tensor,
    subsets: Sequence[Tensor] | Tensor,
    measurements: Tensor,
    *,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> QueryMean:
    """Judge scores (Q, N) by the measurements (S, seeds, Q) of models trained on S subsets of the N samples.

    LDS(q) = spearman over subsets s of (Σ_z w_sz · score(q, z), −mean over seeds of m(s, seed, q)). An undefined one
    (all sums equal, as constant or zero scores have them) is nan, counted, and left out of the mean; where all are
    undefined, so is the mean. The interval is over queries, for these subsets and these trained models: another draw of
    them moves all queries together.

    Args:
        scores: of every query and training sample; positive is a proponent.
        subsets: the indices that each model was trained on; or a matrix (S, N), either of booleans, whether the sample
            was in, or of floats, with what weight. An index that is there twice counts twice.
        measurements: lower is better, like a loss.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: of the measurements' queries and the subsets' samples.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: fewer than three subsets, other numbers of subsets, queries or samples, other ids, NaN.

    >>> scores = torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    >>> subsets = [torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([2, 3])]
    >>> losses = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    >>> print(linear_datamodeling_score(scores, subsets, losses))
    1.000 [1.000, 1.000]
    """
    check_ids(ids, truth_ids)
    return query_mean(_per_query(scores, subsets, measurements), resamples=resamples, seed=seed)


def mean_over_models(found: Sequence[QueryMean], *, resamples: int = 10_000, seed: int = 0) -> QueryMean:
    """The score of one method on several models: each query's mean, and the interval over queries of that."""
    return query_mean(torch.stack([one.per_query for one in found]).mean(0), resamples=resamples, seed=seed)


class LinearDatamodelingScore(InfluenceMetric):
    """`linear_datamodeling_score` and `noise_ceiling` over batches of queries, on one process or several.

    Args:
        subsets: as in `linear_datamodeling_score`, the same for all queries.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> subsets = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    >>> metric = LinearDatamodelingScore(subsets)
    >>> losses = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    >>> metric.update(torch.tensor([[3.0, 1.0, 0.0, -2.0]]), losses)
    >>> metric.update(torch.tensor([[-3.0, -1.0, 0.0, 2.0]]), losses)
    >>> metric.compute().score.per_query
    tensor([ 1., -1.], dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(
        self, subsets: Sequence[Tensor] | Tensor, *, resamples: int = 10_000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(("correlations", "halves", "jackknife", "seeds"), resamples=resamples, seed=seed, **kwargs)
        enough_subsets(len(subsets))
        self.subsets = subsets

    def update(
        self, scores: Tensor, measurements: Tensor, *, ids: Ids | None = None, truth_ids: Ids | None = None
    ) -> None:
        """Add queries: their scores (Q, N) and measurements (S, seeds, Q)."""
        check_ids(ids, truth_ids)
        measurements = measured(measurements)
        correlations = _per_query(scores, self.subsets, measurements)
        self._keep("correlations", correlations)
        self._keep("halves", halves(measurements))
        self._keep("jackknife", jackknifed(measurements).t())
        self._keep("seeds", torch.full_like(correlations, measurements.shape[1]))

    def compute(self) -> LDS:
        """The score and the ceiling over all queries of all processes.

        Raises:
            MetricError: no update yet, or queries with different numbers of seeds.
        """
        seeds = sorted({int(count) for count in self._kept("seeds").tolist()})
        if len(seeds) > 1:
            raise MetricError(
                "the queries were measured with different numbers of seeds",
                expected="the same seeds for all queries of one score",
                found=f"numbers of seeds {seeds}",
                hint="call reset() between truths that do not belong together",
            )
        score, agreement = self._means("correlations", "halves")
        left_out = self._kept("jackknife").view(len(agreement.per_query), -1).t()
        return LDS(score, ceiling_of(agreement, left_out, seeds[0]))

    def plot(self, val: LDS | Mapping[str, LDS] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The score with its interval, of one method or of several by name; dashed, the first one's noise ceiling."""
        found = named(self.compute() if val is None else val, "LDS")
        figure, ax = intervals({name: one.score for name, one in found.items()}, ax, "linear datamodeling score")
        ceiling = next(iter(found.values())).ceiling.value
        if ceiling == ceiling:
            ax.axhline(ceiling, color="#767676", linestyle="--", label="noise ceiling")
            ax.legend(frameon=False)
        return figure, ax


def _per_query(scores: Tensor, subsets: Sequence[Tensor] | Tensor, measurements: Tensor) -> Tensor:
    """Rank correlations (Q,)."""
    scores, measurements = floats(scores, "scores", "(Q, N)"), measured(measurements)
    found, expected = (len(subsets), scores.shape[0]), (measurements.shape[0], measurements.shape[2])
    if found != expected:
        raise MetricError(
            "the measurements do not fit the scores",
            expected=f"{expected[0]} subsets and {expected[1]} queries, as in the measurements (S, seeds, Q)",
            found=f"{found[0]} subsets and {found[1]} queries",
            hint="subsets, queries and measurements come from the same retraining, in the same order",
        )
    places = _places(*_predicted(scores, subsets))
    return spearman(places, -measurements.mean(1).to(places.device))


def _places(sums: Tensor, rounding: Tensor) -> Tensor:
    """The places (S, Q) of sums (S, Q) in their order, from 0; sums that rounding alone tells apart (Q,) share one.

    Sparse scores give many subsets the same sum, which is added up in another order each time.

    >>> _places(torch.tensor([[0.3], [0.1], [0.3 + 1e-9], [0.2]], dtype=torch.float64), torch.tensor([1e-8])).flatten()
    tensor([2., 0., 2., 1.], dtype=torch.float64)
    """
    ordered, order = sums.sort(dim=0)
    steps = (ordered.diff(dim=0) > rounding).double().cumsum(0)
    steps = torch.cat([torch.zeros_like(steps[:1]), steps])
    return torch.zeros_like(steps).scatter(0, order, steps)


def _predicted(scores: Tensor, subsets: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Sums of scores (S, Q) over each subset, and how much rounding may have moved them (Q,)."""
    samples = scores.shape[1]
    if isinstance(subsets, Tensor) and (subsets.dtype == torch.bool or subsets.is_floating_point()):
        if subsets.dim() != 2 or subsets.shape[1] != samples:
            raise MetricError(
                "the subsets do not fit the scores",
                expected=f"a matrix (S, {samples})",
                found=tuple(subsets.shape),
                hint="one column for every training sample that has a score",
            )
        weights = floats(subsets.double(), "inclusion weights", "(S, N)").to(scores.device)
        return weights @ scores.t(), _ROUNDING * (weights.abs() @ scores.abs().t()).amax(0)
    sums, sizes = [], []
    for number, subset in enumerate(subsets):
        _check_indices(number, subset, samples)
        chosen = scores[:, subset.to(scores.device)]
        sums.append(chosen.sum(1))
        sizes.append(chosen.abs().sum(1))
    return torch.stack(sums), _ROUNDING * torch.stack(sizes).amax(0)


def _check_indices(number: int, subset: Tensor, samples: int) -> None:
    integers = not (subset.is_floating_point() or subset.is_complex() or subset.dtype == torch.bool)
    if subset.dim() != 1 or not integers or bool(((subset < 0) | (subset >= samples)).any()):
        raise MetricError(
            f"subset {number} does not fit the scores",
            expected=f"indices from 0 to {samples - 1}",
            found=f"{subset.dtype} of shape {tuple(subset.shape)}"
            + (f", from {int(subset.min())} to {int(subset.max())}" if subset.numel() and integers else ""),
            hint="one dimension of integers for each subset; a matrix (S, N) is of booleans or floats",
        )
