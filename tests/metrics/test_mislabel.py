"""Mislabel detection: scikit-learn's areas, and what is found first as the mean over orders of equal scores."""

from __future__ import annotations

from itertools import pairwise, permutations
from math import erf

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import Ids, MislabelDetection, mislabel_detection
from tests.metrics.merging import check_batches_and_processes

measures = pytest.importorskip("sklearn.metrics")


def made_up() -> tuple[Tensor, Tensor]:
    """Scores (60,) with ties, far from probabilities, and flags."""
    generator = torch.Generator().manual_seed(0)
    flags = torch.rand(60, generator=generator) < 0.2
    return (100 * flags + 150 * torch.rand(60, generator=generator)).round() * 10, flags


def test_the_areas_are_those_of_scikit_learn() -> None:
    scores, flags = made_up()
    assert len(scores.unique()) < 60
    for sign in (1, -1):
        found = mislabel_detection(sign * scores, flags)
        assert found.auroc == pytest.approx(measures.roc_auc_score(flags, sign * scores), abs=1e-6)
        assert found.average_precision == pytest.approx(
            measures.average_precision_score(flags, sign * scores), abs=1e-6
        )


def test_the_interval_of_the_area_by_pairs() -> None:
    scores, flags = made_up()
    positive, negative = scores[flags].double(), scores[~flags].double()
    above = (positive.unsqueeze(1) > negative).double() + 0.5 * (positive.unsqueeze(1) == negative).double()
    half = 1.959964 * float(above.mean(1).var() / len(positive) + above.mean(0).var() / len(negative)) ** 0.5
    found = mislabel_detection(scores, flags)
    assert found.auroc_low == pytest.approx(float(above.mean()) - half, rel=1e-12)
    assert found.auroc_high == pytest.approx(min(1, float(above.mean()) + half), rel=1e-12)
    assert "AUROC" in str(found) and f"[{found.auroc_low:.3f}, {found.auroc_high:.3f}]" in str(found)
    alone = mislabel_detection(scores[:3], torch.tensor([True, False, False]))
    assert alone.auroc_low != alone.auroc_low and alone.auroc_high != alone.auroc_high


def test_the_interval_of_the_area_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator, inside = torch.Generator().manual_seed(1), 0
    truth = 0.5 * (1 + erf(0.5))  # Φ(1/√2), of two normal distributions one standard deviation apart
    flags = torch.arange(120) < 40
    for _ in range(400):
        found = mislabel_detection(torch.randn(120, generator=generator) + flags, flags, at=())
        inside += found.auroc_low <= truth <= found.auroc_high
    assert 0.92 < inside / 400 < 0.98


def test_what_is_found_is_the_mean_over_all_orders_of_equal_scores() -> None:
    scores = torch.tensor([2.0, 5.0, 2.0, 2.0, 1.0])
    flags = torch.tensor([True, False, False, True, True])
    curves = []
    for order in permutations(range(5)):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            curves.append(torch.tensor([sum(bool(flags[i]) for i in order[:k]) for k in range(6)]).double())
    assert len(curves) == 6
    found = mislabel_detection(scores, flags, at=[2, 3, 1.0])
    assert (found.share_found * 3).tolist() == pytest.approx(torch.stack(curves).mean(0).tolist())
    assert [one.found for one in found.at] == pytest.approx([2 / 3, 4 / 3, 3])
    assert [one.examined for one in found.at] == [2, 3, 5] and found.at[0].chance == 0.4
    assert found.share_examined.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def test_equal_scores_find_as_many_as_chance() -> None:
    _, flags = made_up()
    found = mislabel_detection(torch.ones(60), flags, at=[0.2])
    assert found.auroc == 0.5 and found.at[0].recall == pytest.approx(found.at[0].chance) == pytest.approx(0.2)


def test_batches_and_processes() -> None:
    scores, flags = made_up()
    batches = list(zip(scores.split([7, 20, 33]), flags.split([7, 20, 33]), strict=True))
    check_batches_and_processes(MislabelDetection(at=[5]), [batches[0], batches[2]], _of(batches[0], batches[2]))
    metric = MislabelDetection(at=[0.2, 5])
    for batch in batches:
        metric.update(*batch)
    assert str(metric.compute()) == str(mislabel_detection(scores, flags, at=[0.2, 5]))


def _of(*batches: tuple[Tensor, Tensor]) -> object:
    return mislabel_detection(*(torch.cat(parts) for parts in zip(*batches, strict=True)), at=[5])


def test_what_does_not_fit_is_refused() -> None:
    scores, flags = made_up()
    with pytest.raises(MetricError, match="not boolean"):
        mislabel_detection(scores, flags.long())
    with pytest.raises(MetricError, match="do not fit"):
        MislabelDetection().update(scores, flags[1:])
    for constant in (flags & False, flags | True):
        with pytest.raises(MetricError, match="nothing to tell apart"):
            mislabel_detection(scores, constant)
    for k in (0, 61, 0.0, 1.5, -1, True):
        with pytest.raises(MetricError, match="k is out of range"):
            mislabel_detection(scores, flags, at=[k])
    with pytest.raises(MetricError, match="sample ids"):
        mislabel_detection(scores, flags, ids=Ids(samples=range(60)), truth_ids=Ids(samples=range(61)))
    scores[4] = torch.nan
    with pytest.raises(MetricError, match=r"(?s)scores are not all finite.*\(4,\)"):
        mislabel_detection(scores, flags)


def test_the_picture_has_a_curve_for_each_score_and_the_random_order(pyplot: object) -> None:
    scores, flags = made_up()
    metric = MislabelDetection()
    metric.update(scores, flags)
    _, ax = metric.plot({"one": metric.compute(), "two": mislabel_detection(-scores, flags)})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two", "random order"]
    assert len(ax.lines) == 3 and len(ax.lines[0].get_xdata()) == 61
    _, ax = metric.plot()
    assert len(ax.lines) == 2


def test_a_refused_update_leaves_nothing_behind() -> None:
    scores, flags = made_up()
    metric = MislabelDetection()
    with pytest.raises(MetricError):
        metric.update(scores, flags.long())
    metric.update(scores, flags)
    assert metric.compute().auroc == mislabel_detection(scores, flags).auroc
