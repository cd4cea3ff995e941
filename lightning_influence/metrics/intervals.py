"""Means over queries with bootstrap intervals, and the comparison of two methods on the same queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import Ids, check_ids

NORMAL = 1.959964  # the 97.5% quantile of the normal distribution
_AT_ONCE = 2**22  # counts of a bootstrap in memory together


def with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A number and its interval as they are printed.

    >>> with_interval(0.5, 0.25, 0.75, 2)
    '0.50 [0.25, 0.75]'
    """
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@dataclass(frozen=True)
class QueryMean:
    """A mean over queries with its 95% interval.

    Args:
        per_query: values (Q,), nan where undefined.
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
        """Queries without a value; they are in no mean, and are not taken for zero."""
        return int(self.per_query.isnan().sum())

    @property
    def gaps(self) -> str:
        """What is said of queries without a value; nothing where there are none."""
        return f", {self.undefined} of {len(self.per_query)} queries undefined" if self.undefined else ""

    def __str__(self) -> str:
        return f"{with_interval(self.mean, self.low, self.high)}{self.gaps}"


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same queries: one number with its 95% interval, or why there is none.

    Args:
        value: nan where it cannot be stated.
        low: lower end of the paired bootstrap interval.
        high: its upper end.
        queries: that both methods have a value for.
        reason: why the value is nan; empty where it is not.
    """

    value: float
    low: float
    high: float
    queries: int
    reason: str = ""

    def __str__(self) -> str:
        return f"not stated: {self.reason}" if self.reason else with_interval(self.value, self.low, self.high)


def query_mean(per_query: Tensor, *, resamples: int = 10_000, seed: int = 0) -> QueryMean:
    """The mean of values (Q,) with the 2.5% and 97.5% quantiles of the means of Q queries drawn with replacement.

    The interval does not depend on the order of the queries, so that it is the same on one process and on several.

    Args:
        per_query: nan where undefined; these are left out and counted.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    >>> found = query_mean(torch.tensor([0.2, 0.4, float("nan")]))
    >>> round(found.mean, 6), found.undefined
    (0.3, 1)
    """
    values = per_query.detach().double().cpu()
    defined = values[~values.isnan()]
    if not len(defined):
        return QueryMean(values, torch.nan, torch.nan, torch.nan)
    low, high = quantiles(bootstrap_means(defined.unsqueeze(1), resamples, seed)[:, 0])
    return QueryMean(values, float(defined.mean()), low, high)


def difference(
    first: QueryMean,
    second: QueryMean,
    *,
    ids: Ids | None = None,
    other_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Mean of the first less mean of the second, the interval over queries drawn for both together.

    Args:
        first: of one method.
        second: of another, on the same queries in the same order.
        ids: of the first's queries, compared where both are given.
        other_ids: of the second's.

    Raises:
        MetricError: they are not about the same queries.

    >>> better, worse = query_mean(torch.tensor([0.5, 0.7])), query_mean(torch.tensor([0.4, 0.6]))
    >>> print(difference(better, worse))
    0.100 [0.100, 0.100]
    """
    pairs = _pairs(first, second, ids, other_ids)
    if not len(pairs):
        return _not_stated(pairs, "no query has a value of both")
    gaps = pairs[:, 0] - pairs[:, 1]
    low, high = quantiles(bootstrap_means(gaps.unsqueeze(1), resamples, seed)[:, 0])
    return Comparison(float(gaps.mean()), low, high, len(pairs))


def ratio(
    numerator: QueryMean,
    denominator: QueryMean,
    *,
    ids: Ids | None = None,
    other_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Mean of the numerator by mean of the denominator, the interval over queries drawn for both together.

    A ratio to what may be zero says nothing, so it is stated only where the interval of the denominator's mean, over
    the same queries, excludes zero; else it is nan and `reason` says why.

    Args:
        numerator: of one method.
        denominator: of another, on the same queries in the same order.
        ids: of the numerator's queries, compared where both are given.
        other_ids: of the denominator's.

    Raises:
        MetricError: they are not about the same queries.

    >>> double, single = query_mean(torch.tensor([2.0, 4.0])), query_mean(torch.tensor([1.0, 2.0]))
    >>> print(ratio(double, single))
    2.000 [2.000, 2.000]
    >>> print(ratio(double, query_mean(torch.tensor([-1.0, 1.0]))))
    not stated: the interval of the denominator, [-1.000, 1.000], holds zero
    """
    pairs = _pairs(numerator, denominator, ids, other_ids)
    if not len(pairs):
        return _not_stated(pairs, "no query has a value of both")
    if len(pairs) < 2:
        return _not_stated(pairs, "one query alone has no interval")
    above, below = bootstrap_means(pairs, resamples, seed).unbind(1)
    low, high = quantiles(below)
    if low <= 0 <= high:
        return _not_stated(pairs, f"the interval of the denominator, [{low:.3f}, {high:.3f}], holds zero")
    if bool((below == 0).any()):
        return _not_stated(pairs, "some of the resampled denominators are zero")
    top, bottom = pairs.mean(0).tolist()
    return Comparison(top / bottom, *quantiles(above / below), len(pairs))


def _not_stated(pairs: Tensor, reason: str) -> Comparison:
    return Comparison(torch.nan, torch.nan, torch.nan, len(pairs), reason)


def bootstrap_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Means (B, K) of the rows (Q, K), as many drawn with replacement as there are.

    The rows are put in order first, so that the draws do not depend on the order in which they came.
    """
    values = values.detach().double().cpu()
    for column in reversed(range(values.shape[1])):
        values = values[values[:, column].argsort(stable=True)]
    count, generator = len(values), torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, step := max(1, _AT_ONCE // count)):
        draw = torch.randint(count, (min(step, resamples - start), count), generator=generator)
        times = torch.zeros(draw.shape, dtype=values.dtype).scatter_add_(
            1, draw, torch.ones((), dtype=values.dtype).expand(draw.shape)
        )
        means.append(times @ values / count)
    return torch.cat(means)


def quantiles(means: Tensor) -> tuple[float, float]:
    """The 2.5% and the 97.5% quantile of the entries (B,)."""
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def _pairs(first: QueryMean, second: QueryMean, ids: Ids | None, other_ids: Ids | None) -> Tensor:
    """Values (P, 2) of the queries that both have one for."""
    check_ids(ids, other_ids)
    if len(first.per_query) != len(second.per_query):
        raise MetricError(
            "the two methods were not asked about the same queries",
            expected=f"{len(first.per_query)} queries",
            found=f"{len(second.per_query)} queries",
            hint="compare methods on the same queries in the same order",
        )
    pairs = torch.stack([first.per_query, second.per_query], 1)
    return pairs[~pairs.isnan().any(1)]
