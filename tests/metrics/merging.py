"""What every metric is held to: batches and processes change nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from torch import Tensor
from torchmetrics import Metric

from lightning_influence.metrics import QueryMean


def numbers(result: Any) -> list[float]:
    """All numbers of a result; those of single queries sorted, since processes mix their order."""
    if isinstance(result, QueryMean):
        return [*sorted(result.per_query.nan_to_num(-9).tolist()), result.mean, result.low, result.high]
    if isinstance(result, Tensor):
        return [float(value) for value in result.flatten()]
    if is_dataclass(result):
        return [number for field in fields(result) for number in numbers(getattr(result, field.name))]
    if isinstance(result, Mapping):
        return [number for value in result.values() for number in numbers(value)]
    if isinstance(result, Sequence):
        return [number for value in result for number in numbers(value)]
    return [float(result)]


def same(found: Any, expected: Any) -> None:
    assert len(numbers(expected)) > 0
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-9, abs=1e-12, nan_ok=True)


def check_batches_and_processes(metric: Metric, batches: Sequence[tuple[Any, ...]], expected: Any) -> None:
    """Batch by batch, in the other order, by forward, and from two merged metrics: always what all give at once."""
    for order in (batches, batches[::-1]):
        one = copy.deepcopy(metric)
        for batch in order:
            one.update(*batch)
        same(one.compute(), expected)
    forward = copy.deepcopy(metric)
    for batch in batches:
        assert type(forward(*batch)) is type(expected)
    same(forward.compute(), expected)
    ranks = [copy.deepcopy(metric) for _ in range(2)]
    for number, batch in enumerate(batches):
        ranks[number % 2].update(*batch)
    ranks[0].merge_state(ranks[1])
    same(ranks[0].compute(), expected)
    assert metric.full_state_update is False and metric.is_differentiable is False
    assert metric.higher_is_better is not None
