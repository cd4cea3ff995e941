"""The noise ceiling of retrained models: the linear datamodeling score that they leave to a perfect attribution."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import measured
from lightning_influence.metrics.intervals import NORMAL, QueryMean, query_mean, with_interval
from lightning_influence.metrics.ranks import spearman

_HALVINGS = 252  # all ways to halve ten seeds; of more seeds so many are drawn
_GROUPS, _HALVINGS_LEFT_OUT = 20, 10  # of the jackknife over subsets


@dataclass(frozen=True)
class NoiseCeiling:
    """The linear datamodeling score that a perfect attribution can expect at most, since the truths are noisy.

    Args:
        value: nan where there was one seed only or nothing to rank, 0 where the halves do not agree at all.
        low: lower end of the 95% interval, over queries and subsets.
        high: its upper end.
        halves: how well the mean over one half of the seeds ranks the subsets as the other half does; its own interval
            is over the queries alone.
    """

    value: float
    low: float
    high: float
    halves: QueryMean

    def __str__(self) -> str:
        return f"{with_interval(self.value, self.low, self.high)}{self.halves.gaps}"


def noise_ceiling(measurements: Tensor, *, resamples: int = 10_000, seed: int = 0) -> NoiseCeiling:
    """How high a score against the mean over n seeds can be, from how well halves of the seeds agree.

    Let every measurement be what the subset does (variance x) plus what the seed does (variance 1). Means over a and
    b seeds then correlate to r = x / sqrt((x + 1/a)(x + 1/b)), which tells x; and what the subset does correlates with
    the mean over n seeds to sqrt(x / (x + 1/n)), the ceiling. For a = b it is sqrt(2r / (1 + r)), the root of the
    prophecy formula of Spearman and of Brown (both 1910). For rank correlations this holds nearly. It is an upper
    estimate: the more queries differ in x, the further it lies above what the truth itself would score, twice as high
    and more where most have no effect; and sums of scores may reach less than the best function of a subset does.

    All queries are measured on the same models, so that the interval is over both: the variance over the queries and
    that over the subsets, by a jackknife that leaves out a twentieth of them at a time, are added.

    All ways to halve up to ten seeds are averaged, of more seeds 252 random ones; of an odd number one half has one
    seed more.

    Args:
        measurements: of models trained on S subsets with several seeds each, for Q queries (S, seeds, Q).
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: one seed only, fewer than three subsets, NaN.

    >>> losses = torch.tensor([[0.2, 0.3], [0.5, 0.2], [0.9, 0.8], [0.7, 0.4]]).unsqueeze(2)
    >>> found = noise_ceiling(losses)
    >>> round(found.halves.mean, 3), round(found.value, 3)
    (0.8, 0.943)
    """
    measurements = measured(measurements)
    seeds = measurements.shape[1]
    if seeds < 2:
        raise MetricError(
            "there is no noise ceiling of one seed",
            expected="measurements (S, seeds, Q) of two seeds or more",
            found=tuple(measurements.shape),
            hint="train on every subset once more with another seed",
        )
    return ceiling_of(query_mean(halves(measurements), resamples=resamples, seed=seed), jackknifed(measurements), seeds)


def ceiling_of(agreement: QueryMean, left_out: Tensor, seeds: int) -> NoiseCeiling:
    """The ceiling against a mean over so many seeds, from how well halves agree, and from what `jackknifed` found."""
    defined = agreement.per_query[~agreement.per_query.isnan()]
    if not len(defined):
        return NoiseCeiling(torch.nan, torch.nan, torch.nan, agreement)
    means = left_out.nanmean(1)
    over_subsets = (len(means) - 1) * means.var(correction=0)
    over_queries = defined.var(correction=0) / len(defined)
    half = NORMAL * float((over_subsets + over_queries).sqrt())
    value, low, high = (_attainable(agreement.mean + shift, seeds) for shift in (0, -half, half))
    return NoiseCeiling(value, low, high, agreement)


def jackknifed(measurements: Tensor) -> Tensor:
    """`halves` without each of up to twenty groups of subsets in turn (G, Q), over a few halvings; nan of one seed."""
    groups = torch.arange(len(measurements)) % min(_GROUPS, len(measurements))
    kept = [measurements[groups != group] for group in range(int(groups.max()) + 1)]
    return torch.stack([halves(some, at_most=_HALVINGS_LEFT_OUT) for some in kept])


def halves(measurements: Tensor, *, at_most: int = _HALVINGS) -> Tensor:
    """Mean over halvings of the rank correlations between halves (Q,); nan of one seed."""
    seeds = measurements.shape[1]
    if seeds < 2:
        return measurements.new_full((measurements.shape[2],), torch.nan)
    half = seeds // 2
    if comb(seeds, half) <= at_most:
        ways = [list(way) for way in combinations(range(seeds), half)]
    else:
        generator = torch.Generator().manual_seed(0)
        ways = [torch.randperm(seeds, generator=generator)[:half].tolist() for _ in range(at_most)]
    found = []
    for one in ways:
        other = [seed for seed in range(seeds) if seed not in one]
        found.append(spearman(measurements[:, one].mean(1), measurements[:, other].mean(1)))
    return torch.stack(found).mean(0)


def _attainable(correlation: float, seeds: int) -> float:
    """The correlation of what the subset does with the mean over all seeds, from that between the halves.

    >>> round(_attainable(0.5, 2) ** 2, 6), _attainable(1.0, 3), _attainable(-0.1, 3)
    (0.666667, 1.0, 0.0)
    """
    if correlation != correlation:
        return torch.nan
    if correlation <= 0:
        return 0.0
    squared, a, b = min(correlation, 1.0) ** 2, 1 / (seeds // 2), 1 / (seeds - seeds // 2)
    if squared == 1:
        return 1.0
    # x is the positive root of (1 - r²) x² - r² (a + b) x - r² a b = 0.
    linear, constant = squared * (a + b), squared * a * b
    signal = (linear + sqrt(linear**2 + 4 * (1 - squared) * constant)) / (2 * (1 - squared))
    return sqrt(signal / (signal + 1 / seeds))
