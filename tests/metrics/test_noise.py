"""Noise detection rate: a count among the lowest scores for each query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import Ids, NoiseDetectionRate, noise_detection_rate
from tests.metrics.merging import check_batches_and_processes


def made_up() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.rand(40, generator=generator) < 0.25
    return torch.randn(6, 40, generator=generator) - noisy.float(), noisy


@pytest.mark.parametrize(("k", "count"), [(1, 1), (13, 13), (0.1, 4), (0.01, 1), (1.0, 40)])
def test_it_counts(k: int | float, count: int) -> None:
    scores, noisy = made_up()
    found = noise_detection_rate(scores, noisy, k=k)
    for q in range(6):
        lowest = sorted(range(40), key=lambda z: float(scores[q, z]))[:count]
        assert float(found.rate.per_query[q]) == pytest.approx(sum(bool(noisy[z]) for z in lowest) / count)
    assert found.chance.mean == pytest.approx(int(noisy.sum()) / 40)
    assert found.best.mean == pytest.approx(min(int(noisy.sum()), count) / count)


def test_equal_scores_are_no_better_than_chance_and_the_sign_matters() -> None:
    scores, noisy = made_up()
    assert noise_detection_rate(scores * 0, noisy).rate.mean == pytest.approx(int(noisy.sum()) / 40)
    assert noise_detection_rate(scores, noisy).rate.mean > noise_detection_rate(-scores, noisy).rate.mean


def test_batches_and_processes() -> None:
    scores, noisy = made_up()
    batches = [(part, noisy) for part in scores.split([1, 2, 3])]
    expected = noise_detection_rate(scores, noisy, resamples=500)
    check_batches_and_processes(NoiseDetectionRate(resamples=500), batches, expected)


def test_what_does_not_fit_is_refused() -> None:
    scores, noisy = made_up()
    with pytest.raises(MetricError, match="not boolean"):
        noise_detection_rate(scores, noisy.long())
    with pytest.raises(MetricError, match="noisy samples do not fit"):
        noise_detection_rate(scores, noisy[1:])
    with pytest.raises(MetricError, match="wrong shape"):
        noise_detection_rate(scores[0], noisy)
    with pytest.raises(MetricError, match="k is out of range"):
        NoiseDetectionRate(k=1.01).update(scores, noisy)
    with pytest.raises(MetricError, match="sample ids"):
        noise_detection_rate(scores, noisy, ids=Ids(samples=range(40)), truth_ids=Ids(samples=range(39)))


def test_the_picture(pyplot: object) -> None:
    metric = NoiseDetectionRate()
    metric.update(*made_up())
    _, ax = metric.plot()
    assert len(ax.lines) == 3 and ax.lines[1].get_ydata()[0] == metric.compute().rate.mean
    assert ax.lines[2].get_ydata()[0] == metric.compute().chance.mean
