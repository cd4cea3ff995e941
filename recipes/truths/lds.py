"""The linear datamodelling score (Park et al. 2023, 2303.14186): do scores foretell what training on a subset does?

    lds = linear_datamodelling_score(scores, subsets, truth.losses)
    lds.mean, lds.low, lds.high

For each query: the rank correlation, over subsets, of the sum of its scores of the subset's samples with the mean over
seeds of −m, m the measurement after training on that subset (lower is better, so a good attribution has a positive
score). An undefined correlation (all sums equal, as constant or zero scores have them) is nan, counted, and left out
of the mean; where all are undefined, so is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class LDS:
    """A mean over queries with its 95% interval.

    Args:
        per_query: rank correlations (Q,), nan where undefined.
        mean: over the queries with a defined one; nan without any.
        low: lower end of the bootstrap interval over those queries.
        high: its upper end.
    """

    per_query: Tensor
    mean: float
    low: float
    high: float

    @property
    def undefined(self) -> int:
        """Queries without a rank correlation."""
        return int(self.per_query.isnan().sum())

    def __str__(self) -> str:
        missing = f", {self.undefined} of {len(self.per_query)} queries undefined" if self.undefined else ""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]{missing}"


def linear_datamodelling_score(
    scores: Tensor, subsets: Sequence[Tensor], measurements: Tensor, *, resamples: int = 10_000, seed: int = 0
) -> LDS:
    """Judge scores (Q, N) by the measurements (S, seeds, Q) of models trained on subsets of the N samples.

    Args:
        scores: of every query and training sample; positive is a proponent.
        subsets: the indices that each model was trained on.
        measurements: lower is better, like a loss.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
    """
    found, expected = (len(subsets), scores.shape[0]), (measurements.shape[0], measurements.shape[2])
    if found != expected:
        raise ValueError(f"Expected {expected} subsets and queries, as in the measurements, found {found}.")
    predicted = torch.stack([scores[:, subset].double().sum(1) for subset in subsets])  # (S, Q)
    return _summary(spearman(predicted, -measurements.double().mean(1)), resamples, seed)


def mean_over_models(found: Sequence[LDS], *, resamples: int = 10_000, seed: int = 0) -> LDS:
    """The LDS of one method on several models: each query's mean, and the interval over queries of that."""
    return _summary(torch.stack([lds.per_query for lds in found]).mean(0), resamples, seed)


def noise_ceiling(measurements: Tensor, *, resamples: int = 10_000, seed: int = 0) -> LDS:
    """How well the mean over half of the seeds ranks the subsets as the other half does (S, seeds, Q).

    All ways to halve the seeds are averaged; of an odd number one half has one seed more. What a score could reach
    against the mean over all seeds is higher, since that mean is less noisy than a half.
    """
    seeds = measurements.shape[1]
    if seeds < 2:
        raise ValueError(f"Expected measurements of two seeds or more, found {seeds}.")
    halves = []
    for one in combinations(range(seeds), seeds // 2):
        other = [seed for seed in range(seeds) if seed not in one]
        halves.append(spearman(measurements[:, one].double().mean(1), measurements[:, other].double().mean(1)))
    return _summary(torch.stack(halves).mean(0), resamples, seed)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlations (Q,) of the columns of two matrices (S, Q), ties at their mean rank; nan where undefined."""
    a, b = (ranks - ranks.mean(0) for ranks in (_ranks(a), _ranks(b)))
    scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return torch.where(scale > 0, (a * b).sum(0) / scale, torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks (S, Q) within each column; a column with a nan is nan."""
    ordered = values.t().contiguous()  # (Q, S)
    ascending = ordered.sort(dim=1).values
    below = torch.searchsorted(ascending, ordered)
    upto = torch.searchsorted(ascending, ordered, right=True)
    ranks = (below + upto + 1).double() / 2
    return ranks.masked_fill(ordered.isnan().any(1, keepdim=True), torch.nan).t()


def _summary(per_query: Tensor, resamples: int, seed: int) -> LDS:
    defined = per_query[~per_query.isnan()]
    if not len(defined):
        return LDS(per_query, torch.nan, torch.nan, torch.nan)
    draw = torch.randint(len(defined), (resamples, len(defined)), generator=torch.Generator().manual_seed(seed))
    low, high = defined[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=defined.dtype)).tolist()
    return LDS(per_query, float(defined.mean()), low, high)
