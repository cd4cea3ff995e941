"""What the metric classes share: what they keep for each query, how ranks are joined, and how results leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_influence.errors import MetricError
from lightning_influence.metrics.intervals import QueryMean, query_mean


class InfluenceMetric(Metric):
    """A torchmetrics `Metric` whose `compute` returns a dataclass.

    What is kept is a few float64 numbers for each query, one after the other; processes append theirs. A sampler that
    repeats queries to give every process as many counts these twice, as with any metric that is a mean. In a
    `MetricCollection` pass `compute_groups=False`: torchmetrics would take two of one kind with other arguments for
    equal.

    Args:
        kept: names of what is kept.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable: bool = False
    higher_is_better: bool | None = True
    full_state_update: bool = False

    def __init__(self, kept: Sequence[str], *, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resamples, self.seed = resamples, seed
        # A process without any data sends an empty tensor of one dimension and this dtype; so all we keep is such.
        self.set_dtype(torch.float64)
        for name in kept:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def _keep(self, name: str, values: Tensor) -> None:
        getattr(self, name).append(values.detach().to(self.device, torch.float64).flatten())

    def _kept(self, name: str) -> Tensor:
        held = getattr(self, name)
        if isinstance(held, list) and not held:
            raise MetricError(
                f"{type(self).__name__} has seen nothing",
                expected="update() before compute()",
                found="no update since the start or the last reset()",
                hint="call update(...) with the scores and truths of some queries",
            )
        kept: Tensor = dim_zero_cat(held)
        return kept.cpu()

    def _means(self, *names: str) -> Iterator[QueryMean]:
        """The mean over all queries of each of these."""
        return (query_mean(self._kept(name), resamples=self.resamples, seed=self.seed) for name in names)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """torchmetrics takes results apart to squeeze single numbers in them, which frozen dataclasses refuse and
        which would make of one query no query; so it gets them in a box."""
        boxed = super()._wrap_compute(_boxing(compute))

        @wraps(compute)
        def opened(*args: Any, **kwargs: Any) -> Any:
            return boxed(*args, **kwargs).result

        return opened


class _Box:
    def __init__(self, result: Any) -> None:
        self.result = result


def _boxing(compute: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compute)
    def boxing(*args: Any, **kwargs: Any) -> _Box:
        return _Box(compute(*args, **kwargs))

    return boxing
