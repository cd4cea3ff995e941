"""Rank stability: scipy's correlations and plain sets, for each pair of runs and query."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import RankStability, rank_stability
from tests.metrics.merging import check_batches_and_processes

stats = pytest.importorskip("scipy.stats")


def made_up(levels: int = 10**6) -> Tensor:
    """Scores of three runs that agree in part (3, 5, 25), of so many levels."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(1, 5, 25, generator=generator)
    return ((shared + torch.rand(3, 5, 25, generator=generator)) * levels / 2).floor()


@pytest.mark.parametrize("levels", [6, 10**6])
def test_the_correlations_are_scipys(levels: int) -> None:
    scores = made_up(levels)
    found = rank_stability(scores, k=4)
    for q in range(5):
        pairs = [(scores[a, q], scores[b, q]) for a, b in combinations(range(3), 2)]
        spearman = sum(stats.spearmanr(*pair).statistic for pair in pairs) / 3
        kendall = sum(stats.kendalltau(*pair).statistic for pair in pairs) / 3
        assert float(found.spearman.per_query[q]) == pytest.approx(spearman)
        assert float(found.kendall.per_query[q]) == pytest.approx(kendall)


def test_the_overlap_is_that_of_sets() -> None:
    scores = made_up()
    found = rank_stability(scores, k=4)
    for q in range(5):
        firsts = [set(sorted(range(25), key=lambda z: -float(run[q, z]))[:4]) for run in scores]
        expected = [len(a & b) / len(a | b) for a, b in combinations(firsts, 2)]
        assert float(found.overlap.per_query[q]) == pytest.approx(sum(expected) / 3)
    assert rank_stability(scores, k=25).overlap.mean == 1


def test_constants_and_equal_scores_at_the_edge_are_undefined() -> None:
    scores = made_up()
    scores[1, 2] = 7.0
    found = rank_stability(scores, k=4)
    assert found.spearman.undefined == found.kendall.undefined == found.overlap.undefined == 1
    tied = torch.tensor([[[3.0, 2.0, 2.0, 1.0]], [[4.0, 3.0, 2.0, 1.0]]])
    assert rank_stability(tied, k=2).overlap.undefined == 1 and rank_stability(tied, k=1).overlap.mean == 1


def test_batches_and_processes() -> None:
    scores = made_up()
    batches = [(part,) for part in scores.split([1, 1, 3], dim=1)]
    check_batches_and_processes(RankStability(k=4, resamples=500), batches, rank_stability(scores, k=4, resamples=500))


def test_what_does_not_fit_is_refused() -> None:
    scores = made_up()
    for few in (scores[:1], scores[:, :, :2]):
        with pytest.raises(MetricError, match="no rankings to compare"):
            rank_stability(few, k=1)
    with pytest.raises(MetricError, match="wrong shape"):
        rank_stability(scores[0])
    with pytest.raises(MetricError, match="k is out of range"):
        RankStability(k=26).update(scores)


def test_the_picture(pyplot: object) -> None:
    metric = RankStability(k=4)
    metric.update(made_up())
    _, ax = metric.plot({"one": metric.compute(), "two": metric.compute()})
    assert len(ax.lines) == 4 and ax.lines[3].get_ydata()[0] == metric.compute().spearman.mean
