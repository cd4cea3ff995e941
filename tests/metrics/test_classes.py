"""Class detection: scikit-learn's areas for each query."""

from __future__ import annotations

import pytest
import torch

from lightning_influence import MetricError
from lightning_influence.metrics import ClassDetection, class_detection
from tests.metrics.merging import check_batches_and_processes
from tests.metrics.test_same_class import made_up

measures = pytest.importorskip("sklearn.metrics")


def test_the_areas_are_those_of_scikit_learn() -> None:
    scores, labels, query_labels = made_up()
    scores = (1000 * scores).round(decimals=-3)  # with ties
    found = class_detection(scores, labels, query_labels)
    for q in range(6):
        same = labels == query_labels[q]
        assert float(found.auroc.per_query[q]) == pytest.approx(measures.roc_auc_score(same, scores[q]), abs=1e-6)
        expected = measures.average_precision_score(same, scores[q])
        assert float(found.average_precision.per_query[q]) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_no_sample_has_is_undefined() -> None:
    scores, labels, query_labels = made_up()
    query_labels[2] = 9
    found = class_detection(scores, labels, query_labels)
    assert found.auroc.undefined == found.average_precision.undefined == 1
    assert class_detection(scores, labels * 0, query_labels * 0).auroc.undefined == 6


def test_batches_and_processes() -> None:
    scores, labels, query_labels = made_up()
    batches = [(scores[q], labels, query_labels[q]) for q in (slice(1), slice(1, 4), slice(4, 6))]
    expected = class_detection(scores, labels, query_labels, resamples=500)
    check_batches_and_processes(ClassDetection(resamples=500), batches, expected)


def test_what_does_not_fit_is_refused() -> None:
    scores, labels, query_labels = made_up()
    with pytest.raises(MetricError, match="labels do not fit"):
        class_detection(scores, labels[1:], query_labels)
    scores[0, 0] = torch.nan
    with pytest.raises(MetricError, match="scores are not all finite"):
        ClassDetection().update(scores, labels, query_labels)


def test_the_picture(pyplot: object) -> None:
    metric = ClassDetection()
    metric.update(*made_up())
    _, ax = metric.plot()
    assert len(ax.lines) == 3 and ax.lines[1].get_ydata()[0] == metric.compute().auroc.mean
