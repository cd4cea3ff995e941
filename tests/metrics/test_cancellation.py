"""Cancellation ratio: sums of absolute values by the absolute value of sums, for each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence import MetricError
from lightning_influence.metrics import CancellationRatio, cancellation_ratio
from tests.metrics.merging import check_batches_and_processes

SHAPES = {"embedding.weight": (4, 3), "head.bias": (3,), "scale": ()}


def made_up() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(9, *shape, generator=generator) for name, shape in SHAPES.items()}


def test_it_is_the_formula() -> None:
    found = cancellation_ratio(made_up())
    for name, rows in made_up().items():
        entries = rows.double().reshape(9, -1).tolist()
        top = sum(abs(value) for row in entries for value in row)
        bottom = sum(abs(sum(row[p] for row in entries)) for p in range(len(entries[0])))
        assert found[name] == pytest.approx(top / bottom) and found[name] >= 1


def test_one_direction_cancels_nothing_and_zeros_have_no_ratio() -> None:
    assert cancellation_ratio({"a": torch.ones(3, 2), "b": torch.zeros(3, 2), "c": torch.tensor([[1.0], [-1.0]])}) == (
        pytest.approx({"a": 1.0, "b": torch.nan, "c": torch.inf}, nan_ok=True)
    )


def test_batches_and_processes() -> None:
    rows = made_up()
    batches = [
        ({name: values[part] for name, values in rows.items()},) for part in (slice(2), slice(2, 3), slice(3, 9))
    ]
    check_batches_and_processes(CancellationRatio(SHAPES), batches, cancellation_ratio(rows))


def test_what_does_not_fit_is_refused() -> None:
    metric, rows = CancellationRatio(SHAPES), made_up()
    with pytest.raises(MetricError, match="not those of the layers"):
        metric.update({"scale": rows["scale"]})
    with pytest.raises(MetricError, match=r"gradients of 'head.bias' do not fit"):
        metric.update({**rows, "head.bias": torch.zeros(9, 4)})
    rows["scale"][3] = torch.nan
    with pytest.raises(MetricError, match="gradients of 'scale' are not all finite"):
        metric.update(rows)
    assert float(metric.absolute_0) == 0, "a refused batch leaves no part of itself"


def test_the_picture_has_a_bar_for_each_layer(pyplot: object) -> None:
    metric = CancellationRatio(SHAPES)
    metric.update(made_up())
    _, ax = metric.plot()
    assert [bar.get_height() for bar in ax.patches] == list(metric.compute().values())
    assert [label.get_text() for label in ax.get_xticklabels()] == list(SHAPES)
