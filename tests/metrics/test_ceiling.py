"""The noise ceiling is what a perfect attribution reaches; how well halves of the seeds agree is counted by hand."""

from __future__ import annotations

from itertools import combinations
from math import isnan, sqrt

import pytest
import torch

from lightning_influence import MetricError
from lightning_influence.metrics import linear_datamodeling_score, noise_ceiling

stats = pytest.importorskip("scipy.stats")


def test_halves_are_the_mean_over_all_halvings() -> None:
    measurements = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    measurements += 2 * torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(1))
    for q in range(3):
        halves = [
            stats.spearmanr(
                measurements[:, list(one), q].mean(1), measurements[:, list({0, 1, 2, 3, 4} - set(one)), q].mean(1)
            ).statistic
            for one in combinations(range(5), 2)
        ]
        assert float(noise_ceiling(measurements).halves.per_query[q]) == pytest.approx(sum(halves) / len(halves))
    many = measurements.repeat(1, 4, 1)  # 20 seeds have 184,756 halvings, of which some are drawn
    assert 0 < noise_ceiling(many).halves.mean <= 1


@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_a_perfect_attribution_reaches_it(seeds: int, noise: float) -> None:
    """Models whose measurements are sums of the scores of their subset, and noise of the seed."""
    generator = torch.Generator().manual_seed(10 * seeds)
    scores = torch.randn(50, 30, generator=generator).double()
    subsets = torch.rand(1000, 30, generator=generator) < 0.5
    effect = -(subsets.double() @ scores.t()).unsqueeze(1)
    seen = effect + noise * effect.std(0) * torch.randn(1000, seeds, 50, generator=generator).double()
    reached, ceiling = linear_datamodeling_score(scores, subsets, seen), noise_ceiling(seen)
    assert ceiling.value == pytest.approx(reached.mean, abs=0.03)
    assert ceiling.low < ceiling.value < ceiling.high and ceiling.value > ceiling.halves.mean


def test_of_an_even_number_of_seeds_it_is_the_prophecy_formula() -> None:
    measurements = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(2)).double()
    measurements += torch.randn(50, 1, 6, generator=torch.Generator().manual_seed(3))
    found = noise_ceiling(measurements)
    for end, half in ((found.value, found.halves.mean), (found.low, found.halves.low), (found.high, found.halves.high)):
        assert end == pytest.approx(sqrt(2 * half / (1 + half)), rel=1e-12)


def test_what_has_no_ceiling() -> None:
    measurements = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(4)).double()
    contrary = torch.stack([measurements[:, 0], -measurements[:, 0]], 1)
    assert noise_ceiling(contrary).value == 0 and noise_ceiling(contrary).halves.mean == pytest.approx(-1)
    same = measurements[:, :1].expand(-1, 2, -1)
    assert noise_ceiling(same).value == 1
    assert isnan(noise_ceiling(torch.ones(20, 2, 4)).value)  # nothing to rank
    with pytest.raises(MetricError, match="noise ceiling of one seed"):
        noise_ceiling(measurements[:, :1])
