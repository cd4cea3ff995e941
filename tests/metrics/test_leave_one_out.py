"""Leave-one-out correlation: scipy's two correlations and a slope for each query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import Ids, LeaveOneOutCorrelation, leave_one_out_correlation
from tests.metrics.merging import check_batches_and_processes

stats = pytest.importorskip("scipy.stats")


def made_up() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 20, generator=generator).double()
    return scores, (scores + torch.randn(6, 20, generator=generator)) / 50


def test_it_is_scipys() -> None:
    scores, changes = made_up()
    found = leave_one_out_correlation(scores, changes, num_samples=50)
    for q in range(6):
        x, y = scores[q] / 50, changes[q]
        assert float(found.pearson.per_query[q]) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert float(found.spearman.per_query[q]) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert float(found.slope.per_query[q]) == pytest.approx(float(x @ y / (x @ x)))


def test_constants_have_no_correlation() -> None:
    scores, changes = made_up()
    scores[1], changes[2], scores[3] = 0.1, 0.3, 0.0
    found = leave_one_out_correlation(scores, changes, num_samples=50)
    assert found.pearson.per_query.isnan().tolist() == [False, True, True, True, False, False]
    assert found.spearman.undefined == 3 and found.slope.undefined == 1


def test_the_size_of_tiny_changes_does_not_matter() -> None:
    scores, changes = made_up()
    found, small = (leave_one_out_correlation(scores, c, num_samples=50) for c in (changes, changes * 1e-200))
    assert small.pearson.mean == pytest.approx(found.pearson.mean)


def test_batches_and_processes() -> None:
    scores, changes = made_up()
    expected = leave_one_out_correlation(scores, changes, 50, resamples=500)
    batches = list(zip(scores.split([1, 2, 3]), changes.split([1, 2, 3]), strict=True))
    check_batches_and_processes(LeaveOneOutCorrelation(50, resamples=500), batches, expected)


def test_what_does_not_fit_is_refused() -> None:
    scores, changes = made_up()
    with pytest.raises(MetricError, match="changes do not fit"):
        leave_one_out_correlation(scores, changes[:, 1:], 50)
    for columns, count in ((2, 50), (20, 19)):
        with pytest.raises(MetricError, match="no correlation over these samples"):
            leave_one_out_correlation(scores[:, :columns], changes[:, :columns], count)
    with pytest.raises(MetricError, match="sample ids"):
        leave_one_out_correlation(scores, changes, 50, ids=Ids(samples=range(20)), truth_ids=Ids(samples=[0] * 20))
    changes[0, 0] = torch.inf
    with pytest.raises(MetricError, match="changes are not all finite"):
        LeaveOneOutCorrelation(50).update(scores, changes)


def test_the_picture(pyplot: object) -> None:
    metric = LeaveOneOutCorrelation(50)
    metric.update(*made_up())
    _, ax = metric.plot()
    assert len(ax.lines) == 2 and ax.lines[1].get_ydata()[0] == metric.compute().spearman.mean
