"""Same-class rate: a count among the first k for each query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import Ids, SameClassRate, same_class_rate
from tests.metrics.merging import check_batches_and_processes


def made_up() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels, query_labels = torch.randint(3, (30,), generator=generator), torch.randint(3, (6,), generator=generator)
    return torch.randn(6, 30, generator=generator), labels, query_labels


@pytest.mark.parametrize("k", [1, 7, 0.5])
def test_it_counts(k: int | float) -> None:
    scores, labels, query_labels = made_up()
    count = 15 if k == 0.5 else int(k)
    found = same_class_rate(scores, labels, query_labels, k=k)
    for q in range(6):
        first = sorted(range(30), key=lambda z: -float(scores[q, z]))[:count]
        assert float(found.rate.per_query[q]) == pytest.approx(sum(labels[z] == query_labels[q] for z in first) / count)
        assert float(found.chance.per_query[q]) == pytest.approx(sum(y == query_labels[q] for y in labels) / 30)


def test_equal_scores_are_no_better_than_chance() -> None:
    _, labels, query_labels = made_up()
    found = same_class_rate(torch.zeros(6, 30), labels, query_labels, k=3)
    assert found.rate.per_query.tolist() == pytest.approx(found.chance.per_query.tolist())


def test_batches_and_processes() -> None:
    scores, labels, query_labels = made_up()
    batches = [(scores[q], labels, query_labels[q]) for q in (slice(1), slice(1, 4), slice(4, 6))]
    expected = same_class_rate(scores, labels, query_labels, resamples=500)
    check_batches_and_processes(SameClassRate(resamples=500), batches, expected)


def test_what_does_not_fit_is_refused() -> None:
    scores, labels, query_labels = made_up()
    with pytest.raises(MetricError, match="query labels do not fit"):
        same_class_rate(scores, labels, query_labels[1:])
    with pytest.raises(MetricError, match="labels do not fit"):
        same_class_rate(scores, labels[1:], query_labels)
    with pytest.raises(MetricError, match="no class indices"):
        same_class_rate(scores, labels.float(), query_labels)
    with pytest.raises(MetricError, match="k is out of range"):
        SameClassRate(k=31).update(scores, labels, query_labels)
    with pytest.raises(MetricError, match="query ids"):
        same_class_rate(scores, labels, query_labels, ids=Ids(queries="abcdef"), truth_ids=Ids(queries="abcdeg"))


def test_the_picture(pyplot: object) -> None:
    metric = SameClassRate()
    metric.update(*made_up())
    _, ax = metric.plot({"one": metric.compute(), "two": metric.compute()})
    assert len(ax.lines) == 5 and ax.lines[4].get_ydata()[0] == metric.compute().chance.mean
    assert metric.plot()[1].get_ylabel() == "share with the query's class"
