"""Retrieval: torchmetrics' figures where it has them, and means over orders where scores are equal."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_recall, retrieval_reciprocal_rank

from lightning_influence import MetricError
from lightning_influence.metrics import Ids, ProponentRetrieval, proponent_retrieval
from tests.metrics.merging import check_batches_and_processes


def made_up() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 30, generator=generator), torch.rand(6, 30, generator=generator) < 0.1


def test_positive_scores_give_the_figures_of_torchmetrics_and_a_shift_changes_nothing() -> None:
    scores, relevant = made_up()
    assert relevant.any(1).all()
    for shift in (0, -5):
        found = proponent_retrieval(scores + shift, relevant, k=[3, 10])
        for q in range(6):
            expected = float(retrieval_reciprocal_rank(scores[q], relevant[q]))
            assert float(found.reciprocal_rank.per_query[q]) == pytest.approx(expected, abs=1e-6)
            for k, one in zip((3, 10), found.recall, strict=True):
                recall = float(retrieval_recall(scores[q], relevant[q], top_k=k))
                assert float(one.per_query[q]) == pytest.approx(recall, abs=1e-6)


def test_equal_scores_give_the_mean_over_their_orders() -> None:
    scores = torch.tensor([[9.0, 2.0, 2.0, 2.0, 2.0, 1.0]])
    relevant = torch.tensor([[False, True, False, True, False, True]])
    ranks, recalls = [], []
    for order in permutations(range(6)):
        if all(scores[0, a] >= scores[0, b] for a, b in pairwise(order)):
            hits = [bool(relevant[0, i]) for i in order]
            ranks.append(1 / (hits.index(True) + 1))
            recalls.append(sum(hits[:3]) / 3)
    found = proponent_retrieval(scores, relevant, k=[3])
    assert found.reciprocal_rank.mean == pytest.approx(sum(ranks) / len(ranks))
    assert found.recall[0].mean == pytest.approx(sum(recalls) / len(recalls))


def test_a_query_without_relevant_samples_is_undefined_and_positions_are_booleans() -> None:
    scores, relevant = made_up()
    relevant[1] = False
    found = proponent_retrieval(scores, relevant)
    assert found.reciprocal_rank.undefined == 1 and all(one.undefined == 1 for one in found.recall)
    again = proponent_retrieval(scores, [row.nonzero().flatten().tolist() for row in relevant])
    assert str(again) == str(found)
    constant = proponent_retrieval(torch.zeros(6, 30), relevant)
    assert constant.reciprocal_rank.undefined == 1


def test_batches_and_processes() -> None:
    scores, relevant = made_up()
    batches = list(zip(scores.split([1, 2, 3]), relevant.split([1, 2, 3]), strict=True))
    expected = proponent_retrieval(scores, relevant, resamples=500)
    check_batches_and_processes(ProponentRetrieval(resamples=500), batches, expected)


def test_what_does_not_fit_is_refused() -> None:
    scores, relevant = made_up()
    with pytest.raises(MetricError, match="not boolean"):
        proponent_retrieval(scores, relevant.float())
    with pytest.raises(MetricError, match="do not fit"):
        proponent_retrieval(scores, relevant[1:])
    for positions in ([[0]], [[30], [], [], [], [], []], [[-1], [], [], [], [], []]):
        with pytest.raises(MetricError, match="relevant samples do not fit"):
            ProponentRetrieval().update(scores, positions)
    with pytest.raises(MetricError, match="k is out of range"):
        proponent_retrieval(scores, relevant, k=[31])
    with pytest.raises(MetricError, match="sample ids"):
        proponent_retrieval(scores, relevant, ids=Ids(samples=range(30)), truth_ids=Ids(samples=range(1, 31)))


def test_the_picture(pyplot: object) -> None:
    metric = ProponentRetrieval()
    metric.update(*made_up())
    _, ax = metric.plot()
    assert len(ax.lines) == 1 and len(ax.collections) == 1
    assert ax.lines[0].get_xdata().tolist() == [1, 5, 10]
    assert f"MRR {metric.compute().reciprocal_rank.mean:.3f}" in ax.get_legend().get_texts()[0].get_text()
