"""The noise ceiling is what a perfect attribution reaches; how well halves of the seeds agree is counted by hand."""

from __future__ import annotations

from itertools import combinations
from math import isnan, sqrt

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import linear_datamodeling_score, noise_ceiling
from lightning_influence.metrics.ceiling import _attainable

stats = pytest.importorskip("scipy.stats")


def halves_by_hand(measurements: Tensor, one: list[int]) -> float:
    """Mean over the queries of scipy's rank correlation between the mean over these seeds and that over the others."""
    other = [seed for seed in range(measurements.shape[1]) if seed not in one]
    of_queries = zip(measurements[:, one].mean(1).t(), measurements[:, other].mean(1).t(), strict=True)
    found = [stats.spearmanr(a, b).statistic for a, b in of_queries]
    return sum(found) / len(found)


def test_halves_are_the_mean_over_all_halvings() -> None:
    measurements = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    measurements += 2 * torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(1))
    for q in range(3):
        halves = [halves_by_hand(measurements[:, :, q : q + 1], list(one)) for one in combinations(range(5), 2)]
        assert float(noise_ceiling(measurements).halves.per_query[q]) == pytest.approx(sum(halves) / len(halves))


def test_of_many_halvings_some_are_drawn() -> None:
    """252 of the 924 of twelve seeds."""
    measurements = torch.randn(40, 12, 8, generator=torch.Generator().manual_seed(5)).double()
    measurements += torch.randn(40, 1, 8, generator=torch.Generator().manual_seed(6))
    whole = [halves_by_hand(measurements, list(one)) for one in combinations(range(12), 6)]
    assert noise_ceiling(measurements).halves.mean == pytest.approx(sum(whole) / len(whole), abs=5e-3)


@pytest.mark.parametrize("seeds", range(2, 12))
@pytest.mark.parametrize("signal", [0.01, 0.3, 4.0])
def test_from_means_over_halves_to_the_mean_over_all(seeds: int, signal: float) -> None:
    a, b = seeds // 2, seeds - seeds // 2
    between = signal / sqrt((signal + 1 / a) * (signal + 1 / b))
    assert _attainable(between, seeds) == pytest.approx(sqrt(signal / (signal + 1 / seeds)), rel=1e-12)


def test_the_interval_holds_the_truth_though_queries_share_their_models() -> None:
    """Queries whose effects, and whose noise, come from the same few factors."""
    inside, shares = 0, torch.randn(4, 30, generator=torch.Generator().manual_seed(7)).double()
    for trial in range(60):
        generator = torch.Generator().manual_seed(trial)
        effect, noise = (torch.randn(80, n, 4, generator=generator).double() @ shares for n in (1, 3))
        found = noise_ceiling(effect + 1.5 * noise, resamples=10)
        inside += found.low <= sqrt(1 / (1 + 1.5**2 / 3)) <= found.high
    assert 53 <= inside < 60


@pytest.mark.parametrize("noise", [0.5, 4.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_perfect_attribution_reaches_it(seeds: int, noise: float) -> None:
    """Models whose measurements are sums of the scores of their subset, and noise of the seed."""
    generator = torch.Generator().manual_seed(10 * seeds)
    scores = torch.randn(50, 30, generator=generator).double()
    subsets = torch.rand(500, 30, generator=generator) < 0.5
    effect = -(subsets.double() @ scores.t()).unsqueeze(1)
    seen = effect + noise * effect.std(0) * torch.randn(500, seeds, 50, generator=generator).double()
    reached, ceiling = linear_datamodeling_score(scores, subsets, seen), noise_ceiling(seen)
    assert ceiling.value == pytest.approx(reached.mean, abs=0.03)
    assert ceiling.low < ceiling.value < ceiling.high and ceiling.value > ceiling.halves.mean


def test_of_an_even_number_of_seeds_it_is_the_prophecy_formula() -> None:
    measurements = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(2)).double()
    measurements += torch.randn(50, 1, 6, generator=torch.Generator().manual_seed(3))
    found = noise_ceiling(measurements)
    half = found.halves.mean
    assert found.value == pytest.approx(sqrt(2 * half / (1 + half)), rel=1e-12)


def test_what_has_no_ceiling() -> None:
    measurements = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(4)).double()
    contrary = torch.stack([measurements[:, 0], -measurements[:, 0]], 1)
    assert noise_ceiling(contrary).value == 0 and noise_ceiling(contrary).halves.mean == pytest.approx(-1)
    assert str(noise_ceiling(torch.ones(20, 2, 4))).endswith("4 of 4 queries undefined")
    same = measurements[:, :1].expand(-1, 2, -1)
    assert noise_ceiling(same).value == 1
    assert isnan(noise_ceiling(torch.ones(20, 2, 4)).value)  # nothing to rank
    with pytest.raises(MetricError, match="noise ceiling of one seed"):
        noise_ceiling(measurements[:, :1])
