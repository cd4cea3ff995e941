"""The linear datamodeling score: scipy's rank correlation over subsets, and nan where there is none."""

from __future__ import annotations

import pickle
from math import isnan

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_influence import MetricError
from lightning_influence.metrics import (
    Ids,
    LinearDatamodelingScore,
    linear_datamodeling_score,
    mean_over_models,
    noise_ceiling,
    spearman,
)
from tests.metrics.merging import check_batches_and_processes

stats = pytest.importorskip("scipy.stats")


def made_up() -> tuple[Tensor, list[Tensor], Tensor]:
    """Scores (5, 40), and measurements (30, 2, 5) of models that follow them exactly."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 40, generator=generator)
    subsets = [torch.randperm(40, generator=generator)[:20] for _ in range(30)]
    falls = torch.stack([scores[:, subset].double().sum(1) for subset in subsets])
    return scores, subsets, torch.stack([3 - falls, 5 - falls], 1)


def noisy() -> tuple[Tensor, list[Tensor], Tensor]:
    scores, subsets, measurements = made_up()
    return scores, subsets, measurements + 4 * torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(3))


def matrix(subsets: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros(40, dtype=torch.bool).index_fill(0, subset, True) for subset in subsets])


def test_it_is_scipys_correlation_for_each_query() -> None:
    scores, subsets, measurements = noisy()
    expected = [
        stats.spearmanr(
            [sum(float(scores[q, z]) for z in subset) for subset in subsets],
            [-(float(m[0, q]) + float(m[1, q])) / 2 for m in measurements],
        ).statistic
        for q in range(5)
    ]
    lds = linear_datamodeling_score(scores, subsets, measurements)
    assert lds.per_query.tolist() == pytest.approx(expected, rel=1e-12)
    assert lds.mean == pytest.approx(sum(expected) / 5) and lds.low < lds.mean < lds.high < 1


def test_perfect_scores_have_lds_one() -> None:
    scores, subsets, measurements = made_up()
    lds = linear_datamodeling_score(scores, subsets, measurements)
    assert (lds.mean, lds.low, lds.high, lds.undefined) == pytest.approx((1, 1, 1, 0), abs=1e-6)
    assert linear_datamodeling_score(-scores, subsets, measurements).mean == pytest.approx(-1)
    assert noise_ceiling(measurements).value == pytest.approx(1)


def test_indices_booleans_and_weights_say_the_same() -> None:
    scores, subsets, measurements = noisy()
    expected = linear_datamodeling_score(scores, subsets, measurements).per_query
    for other in (matrix(subsets), matrix(subsets).float(), 3 * matrix(subsets).double()):
        found = linear_datamodeling_score(scores, other, measurements).per_query
        assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("as_weights", [False, True])
def test_constant_scores_have_no_lds(as_weights: bool) -> None:
    scores, subsets, measurements = made_up()
    of = matrix(subsets).double() if as_weights else subsets
    lds = linear_datamodeling_score(torch.full_like(scores, 0.1), of, measurements)
    assert lds.per_query.isnan().all() and all(value != value for value in (lds.mean, lds.low, lds.high))
    scores[2] = 0.1
    lds = linear_datamodeling_score(scores, of, measurements)
    assert lds.undefined == 1 and lds.mean == pytest.approx(1)
    assert "1 of 5 queries undefined" in str(lds)


def test_random_scores_have_an_interval_around_nothing() -> None:
    scores, subsets, measurements = made_up()
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    lds = linear_datamodeling_score(noise, subsets, measurements)
    assert lds.low <= lds.mean <= lds.high and abs(lds.mean) < 0.3
    again = linear_datamodeling_score(noise.flip(0), subsets, measurements.flip(2))
    assert (again.low, again.high) == pytest.approx((lds.low, lds.high), rel=1e-12)  # the order of queries is nothing


def test_ranks_with_ties_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (2, 30, 4), generator=generator).double()
    expected = [stats.spearmanr(a[:, q], b[:, q]).statistic for q in range(4)]
    assert spearman(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    assert spearman_corrcoef(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    a[3, 1] = torch.nan
    assert spearman(a, b).isnan().tolist() == [False, True, False, False]


def test_the_mean_over_models_is_that_of_each_query() -> None:
    scores, subsets, measurements = noisy()
    two = [linear_datamodeling_score(sign * scores, subsets, measurements) for sign in (1, -1)]
    assert mean_over_models(two).per_query.tolist() == pytest.approx([0] * 5, abs=1e-12)


def test_batches_and_processes() -> None:
    scores, subsets, measurements = noisy()
    metric = LinearDatamodelingScore(subsets, resamples=500)
    batches = [(scores[q : q + 2], measurements[:, :, q : q + 2]) for q in (0, 2, 4)]
    whole = LinearDatamodelingScore(subsets, resamples=500)
    whole.update(scores, measurements)
    expected = whole.compute()
    assert expected.score.mean == linear_datamodeling_score(scores, subsets, measurements, resamples=500).mean
    assert expected.ceiling.value == pytest.approx(noise_ceiling(measurements, resamples=500).value)
    check_batches_and_processes(metric, batches, expected)


def test_one_query_stays_a_query_and_a_metric_can_be_pickled() -> None:
    scores, subsets, measurements = noisy()
    metric = LinearDatamodelingScore(subsets)
    metric.update(scores[:1], measurements[:, :1, :1])
    metric = pickle.loads(pickle.dumps(metric))
    found = metric.compute()
    assert found.score.per_query.shape == (1,) and found.ceiling.halves.undefined == 1 and isnan(found.ceiling.value)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(MetricError, match="seen nothing"):
        metric.compute()


def test_what_does_not_fit_is_refused() -> None:
    scores, subsets, measurements = made_up()
    with pytest.raises(MetricError, match="do not fit") as refused:
        linear_datamodeling_score(scores, subsets[:-1], measurements)
    assert "29 subsets and 5 queries" in str(refused.value)
    with pytest.raises(MetricError, match="do not fit"):
        linear_datamodeling_score(scores[1:], subsets, measurements)
    with pytest.raises(MetricError, match="so few subsets"):
        linear_datamodeling_score(scores, subsets[:2], measurements[:2])
    with pytest.raises(MetricError, match="so few subsets"):
        LinearDatamodelingScore(subsets[:2])
    with pytest.raises(MetricError, match="subset 0 does not fit"):
        linear_datamodeling_score(scores[:, :30], subsets, measurements)
    with pytest.raises(MetricError, match="a matrix"):
        linear_datamodeling_score(scores[:, :30], matrix(subsets), measurements)
    with pytest.raises(MetricError, match="wrong shape"):
        linear_datamodeling_score(scores, subsets, measurements[:, 0])
    metric = LinearDatamodelingScore(subsets)
    metric.update(scores[:2], measurements[:, :, :2])
    metric.update(scores[2:], measurements[:, :1, 2:])
    with pytest.raises(MetricError, match=r"(?s)different numbers of seeds.*\[1, 2\]"):
        metric.compute()
    scores[3, 7] = torch.nan
    with pytest.raises(MetricError, match=r"(?s)scores are not all finite.*\(3, 7\)"):
        linear_datamodeling_score(scores, subsets, measurements)


def test_ids_that_differ_are_named() -> None:
    scores, subsets, measurements = made_up()
    mine, theirs = Ids(queries=range(5), samples=range(40)), Ids(queries=[0, 1, 3, 2, 4])
    with pytest.raises(MetricError, match=r"(?s)query ids.*2 that differ: 2 and 3 at 2"):
        linear_datamodeling_score(scores, subsets, measurements, ids=mine, truth_ids=theirs)
    with pytest.raises(MetricError, match=r"(?s)sample ids.*40 ids of the scores and 39"):
        LinearDatamodelingScore(subsets).update(scores, measurements, ids=mine, truth_ids=Ids(samples=range(39)))
    same = Ids(queries=torch.arange(5))
    assert linear_datamodeling_score(scores, subsets, measurements, ids=mine, truth_ids=same).undefined == 0


def test_the_picture_has_a_dot_an_interval_and_the_ceiling(pyplot: object) -> None:
    scores, subsets, measurements = noisy()
    metric = LinearDatamodelingScore(subsets)
    metric.update(scores, measurements)
    _, ax = metric.plot()
    assert len(ax.lines) == 3 and ax.lines[1].get_ydata()[0] == metric.compute().score.mean
    _, ax = metric.plot({"one": metric.compute(), "two": metric.compute()})
    assert len(ax.lines) == 5 and [label.get_text() for label in ax.get_xticklabels()] == ["one", "two"]


def test_sums_that_rounding_tells_apart_are_ties() -> None:
    generator = torch.Generator().manual_seed(5)
    whole = torch.zeros(6, 40, dtype=torch.float64)
    whole[:, :5] = torch.randint(1, 4, (6, 5), generator=generator).double()  # few different sums, exact
    whole = whole[:, torch.randperm(40, generator=generator)]
    subsets = [torch.randperm(40, generator=generator)[:20] for _ in range(30)]  # each adds up in its own order
    measurements = torch.randn(30, 1, 6, generator=generator)
    rounded = torch.stack([(whole / 10)[:, subset].sum(1) for subset in subsets])
    exact = torch.stack([whole[:, subset].sum(1) for subset in subsets])
    assert len(rounded[:, 0].unique()) > len(exact[:, 0].unique())  # rounding does tell some apart here
    expected = linear_datamodeling_score(whole, subsets, measurements).per_query
    torch.testing.assert_close(linear_datamodeling_score(whole / 10, subsets, measurements).per_query, expected)
