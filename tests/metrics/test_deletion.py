"""Case deletion: plain means of differences, and two methods compared over the same queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import CaseDeletion, Ids, case_deletion, difference, query_mean, ratio
from tests.metrics.merging import check_batches_and_processes

SIZES = (1, 5, 10)


def made_up(seeds: int = 2, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities before (seeds, 8), without proponents and without opponents (seeds, 8, 3)."""
    generator = torch.Generator().manual_seed(0)
    before = 0.4 + 0.2 * torch.rand(seeds, 8, generator=generator).double()
    noise = 0.02 * torch.randn(2, seeds, 8, 3, generator=generator).double()
    effect = strength * torch.tensor([0.05, 0.1, 0.2]).double()
    return before, before.unsqueeze(2) - effect + noise[0], before.unsqueeze(2) + effect / 2 + noise[1]


def test_the_means_are_those_of_loops() -> None:
    before, proponents, opponents = made_up()
    found = case_deletion(SIZES, before, proponents, opponents)
    for one, after in ((found.proponents, proponents), (found.opponents, opponents)):
        for k in range(3):
            changes = [sum(float(after[s, q, k] - before[s, q]) for s in range(2)) / 2 for q in range(8)]
            assert one[k].per_query.tolist() == pytest.approx(changes)
            assert one[k].mean == pytest.approx(sum(changes) / 8) and one[k].low < one[k].mean < one[k].high
    assert found.auc_proponents.mean == pytest.approx(sum(q.mean for q in found.proponents) / 3)
    assert found.auc_opponents.mean == pytest.approx(sum(q.mean for q in found.opponents) / 3)
    assert found.auc.mean == pytest.approx((found.auc_opponents.mean - found.auc_proponents.mean) / 2)
    assert found.auc_proponents.high < 0 < found.auc_opponents.low, "the better sign of both"


def test_seeds_are_averaged_within_a_query() -> None:
    before, proponents, opponents = made_up()
    found = case_deletion(SIZES, before, proponents, opponents)
    once = case_deletion(SIZES, before.mean(0), proponents.mean(0), opponents.mean(0))
    assert (found.auc.mean, found.auc.low) == pytest.approx((once.auc.mean, once.auc.low))


def test_batches_and_processes() -> None:
    before, proponents, opponents = made_up()
    expected = case_deletion(SIZES, before, proponents, opponents, resamples=500)
    batches = [(before[:, q], proponents[:, q], opponents[:, q]) for q in (slice(3), slice(3, 4), slice(4, 8))]
    check_batches_and_processes(CaseDeletion(SIZES, resamples=500), batches, expected)


def test_two_methods_are_compared_over_the_same_queries() -> None:
    strong, weak = (case_deletion(SIZES, *made_up(strength=strength)).auc for strength in (1.0, 0.5))
    found = ratio(strong, weak)
    assert found.value == pytest.approx(strong.mean / weak.mean) and found.low < found.value < found.high
    assert found.low > 1.5 and found.high < 2.5 and found.queries == 8 and not found.reason
    gap = difference(strong, weak)
    assert gap.value == pytest.approx(strong.mean - weak.mean)
    assert gap.high - gap.low < 1e-9 < strong.high - strong.low, "paired: the noise is the same in both"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mixed = [query_mean(one.per_query[order]) for one in (strong, weak)]
    assert ratio(*mixed).low == pytest.approx(found.low)


def test_the_paired_bootstrap_is_the_slow_one() -> None:
    a, b = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 1.5, 2.0]).double()
    draws = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]  # all 27 resamples, equally likely
    ratios = torch.stack([a[list(draw)].sum() / b[list(draw)].sum() for draw in draws])
    found = ratio(query_mean(a), query_mean(b))
    assert (found.low, found.high) == pytest.approx(
        (float(ratios.min()), float(ratios.max()))
    )  # 1/27 of the draws each, above 2.5%


def test_a_ratio_to_nothing_is_not_stated() -> None:
    nothing = query_mean(torch.tensor([-0.1, 0.1, 0.02, -0.03]))
    found = ratio(query_mean(torch.tensor([1.0, 1.1, 0.9, 1.0])), nothing)
    assert found.value != found.value and found.low != found.low and "holds zero" in found.reason
    none = query_mean(torch.tensor([torch.nan] * 4))
    for compare in (ratio, difference):
        assert "no query" in compare(nothing, none).reason
        with pytest.raises(MetricError, match="not asked about the same queries"):
            compare(nothing, query_mean(torch.ones(3)))
        with pytest.raises(MetricError, match="query ids"):
            compare(nothing, nothing, ids=Ids(queries=range(4)), other_ids=Ids(queries=range(1, 5)))


def test_what_does_not_fit_is_refused() -> None:
    before, proponents, opponents = made_up()
    for sizes in ((), (0, 1, 2), (1, 5, 5), (5, 1, 10)):
        with pytest.raises(MetricError, match="no such grid"):
            CaseDeletion(sizes)
    with pytest.raises(MetricError, match="without opponents do not fit"):
        case_deletion(SIZES, before, proponents, opponents[:, :, :2])
    with pytest.raises(MetricError, match="do not fit"):
        case_deletion(SIZES, before[:, 1:], proponents, opponents)
    with pytest.raises(MetricError, match="no probabilities"):
        case_deletion(SIZES, before * 10, proponents, opponents)
    proponents[0, 2, 1] = torch.nan
    with pytest.raises(MetricError, match="without proponents are not all finite"):
        case_deletion(SIZES, before, proponents, opponents)
    with pytest.raises(MetricError, match="query ids"):
        CaseDeletion(SIZES).update(*made_up(), ids=Ids(queries=[1]), truth_ids=Ids(queries=[2]))


def test_the_picture_has_two_curves_with_bands_for_each_method(pyplot: object) -> None:
    metric = CaseDeletion(SIZES)
    metric.update(*made_up())
    _, ax = metric.plot()
    assert len(ax.lines) == 3 and len(ax.collections) == 2
    assert ax.lines[0].get_ydata().tolist() == [q.mean for q in metric.compute().proponents]
    _, ax = metric.plot({"one": metric.compute(), "two": case_deletion(SIZES, *made_up(strength=0.5))})
    assert len(ax.lines) == 5 and len(ax.collections) == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert "k" in ax.get_xlabel()


def test_a_ratio_whose_bootstrap_divides_by_zero_says_so() -> None:
    sparse = query_mean(torch.cat([torch.ones(5), torch.zeros(95)]))
    assert "resampled denominators are zero" in ratio(sparse, sparse).reason
    assert "one query alone" in ratio(query_mean(torch.ones(1)), query_mean(torch.ones(1))).reason
