"""Case deletion: does the predicted class lose its probability without its proponents, and gain without opponents?

DEL+(k) = E[f_c(x'; trained without the top-k proponents) − f_c(x'; θ)], which a good ranking makes negative; DEL−(k)
for opponents, which it makes positive; AUC-DEL is the mean over a grid of k. f_c is the predicted probability of the
class in question. Yeh et al. 2022, "First is better than last for language data influence" (2202.11844), section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import Ids, check_ids, floats, same_shape
from lightning_influence.metrics.drawing import Curve, curves, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Deletion:
    """Changes of a probability by deletions, over queries.

    Args:
        sizes: the grid of k, (K,).
        proponents: DEL+ for each k; negative is good.
        opponents: DEL− for each k; positive is good.
        auc_proponents: AUC-DEL+, the mean over the grid.
        auc_opponents: AUC-DEL−, likewise.
        auc: both in one, (AUC-DEL− − AUC-DEL+) / 2; positive is good.
    """

    sizes: tuple[int, ...]
    proponents: tuple[QueryMean, ...]
    opponents: tuple[QueryMean, ...]
    auc_proponents: QueryMean
    auc_opponents: QueryMean
    auc: QueryMean

    def __str__(self) -> str:
        return f"AUC-DEL {self.auc}, of proponents {self.auc_proponents}, of opponents {self.auc_opponents}"


def case_deletion(
    sizes: Sequence[int],
    before: Tensor,
    after_proponents: Tensor,
    after_opponents: Tensor,
    *,
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Deletion:
    """DEL+, DEL− and their means over the grid, with bootstrap intervals over queries.

    Two methods are compared by `ratio(one.auc, other.auc)` and `difference(one.auc, other.auc)`.

    Args:
        sizes: numbers of deleted samples, K of them, increasing.
        before: probability of the class in question of the whole model, (Q,), or (seeds, Q) after training with
            several seeds, whose changes are averaged for each query.
        after_proponents: after training without the first k proponents, (Q, K) or (seeds, Q, K).
        after_opponents: after training without the first k opponents, likewise.
        ids: of the queries whose ranking was deleted from; compared with `truth_ids` where both are given.
        truth_ids: of the queries whose probabilities these are.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes that do not fit, probabilities out of [0, 1] or NaN, sizes that do not increase.

    >>> import torch
    >>> found = case_deletion([1, 2], torch.tensor([0.9]), torch.tensor([[0.7, 0.5]]), torch.tensor([[0.9, 0.95]]))
    >>> round(found.auc_proponents.mean, 4), round(found.auc_opponents.mean, 4), round(found.auc.mean, 4)
    (-0.3, 0.025, 0.1625)
    """
    check_ids(ids, truth_ids)
    grid = _grid(sizes)
    return _deletion(grid, *_changes(grid, before, after_proponents, after_opponents), resamples, seed)


class CaseDeletion(InfluenceMetric):
    """`case_deletion` over batches of queries, on one process or several.

    Args:
        sizes: numbers of deleted samples, K of them, increasing.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> import torch
    >>> metric = CaseDeletion([10, 20])
    >>> metric.update(torch.tensor([0.9]), torch.tensor([[0.7, 0.5]]), torch.tensor([[0.9, 0.95]]))
    >>> metric.update(torch.tensor([0.8]), torch.tensor([[0.8, 0.6]]), torch.tensor([[0.8, 0.9]]))
    >>> [round(one.mean, 4) for one in metric.compute().proponents]
    [-0.1, -0.3]
    """

    higher_is_better = True

    def __init__(self, sizes: Sequence[int], *, resamples: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("proponents", "opponents"), resamples=resamples, seed=seed, **kwargs)
        self.sizes = _grid(sizes)

    def update(
        self,
        before: Tensor,
        after_proponents: Tensor,
        after_opponents: Tensor,
        *,
        ids: Ids | None = None,
        truth_ids: Ids | None = None,
    ) -> None:
        """Add queries: probabilities of the whole model (Q,) and after deletions (Q, K), each with seeds in front or
        without."""
        check_ids(ids, truth_ids)
        proponents, opponents = _changes(self.sizes, before, after_proponents, after_opponents)
        self._keep("proponents", proponents)
        self._keep("opponents", opponents)

    def compute(self) -> Deletion:
        """The means over all queries of all processes."""
        proponents, opponents = (self._kept(name).view(-1, len(self.sizes)) for name in ("proponents", "opponents"))
        return _deletion(self.sizes, proponents, opponents, self.resamples, self.seed)

    def plot(self, val: Deletion | Mapping[str, Deletion] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """DEL+ (full) and DEL− (dashed) over k with their bands, of one method or of several by name."""
        found = named(self.compute() if val is None else val, "DEL")
        drawn = {
            name: [_curve(one.sizes, one.proponents, "-"), _curve(one.sizes, one.opponents, "--")]
            for name, one in found.items()
        }
        figure, ax = curves(drawn, ax, "deleted samples k", "change of the probability: DEL+ full, DEL− dashed")
        ax.axhline(0, color="#767676", linewidth=0.8)
        return figure, ax


def _grid(sizes: Sequence[int]) -> tuple[int, ...]:
    grid = tuple(int(k) for k in sizes)
    if not grid or grid[0] < 1 or any(after <= k for k, after in pairwise(grid)):
        raise MetricError(
            "there is no such grid of deletions",
            expected="increasing numbers from 1",
            found=list(sizes),
            hint="the AUC is a plain mean over the grid, so each k is there once",
        )
    return grid


def _changes(sizes: tuple[int, ...], before: Tensor, proponents: Tensor, opponents: Tensor) -> tuple[Tensor, Tensor]:
    """Changes (Q, K) of the probability without proponents and without opponents, means over seeds."""
    if before.dim() == 1:
        before, proponents, opponents = before.unsqueeze(0), proponents.unsqueeze(0), opponents.unsqueeze(0)
    before = _probabilities(before, "probabilities before", "(seeds, Q)")
    changes = []
    for what, after in (("without proponents", proponents), ("without opponents", opponents)):
        after = _probabilities(after, f"probabilities {what}", "(seeds, Q, K)")
        same_shape(f"probabilities {what}", tuple(after.shape), (*before.shape, len(sizes)))
        changes.append((after - before.unsqueeze(2)).mean(0))
    return changes[0], changes[1]


def _probabilities(values: Tensor, what: str, shape: str) -> Tensor:
    values = floats(values, what, shape)
    if bool(((values < 0) | (values > 1)).any()):
        raise MetricError(
            f"the {what} are no probabilities",
            expected="numbers from 0 to 1",
            found=f"from {float(values.min()):.4g} to {float(values.max()):.4g}",
            hint="pass the predicted probability of the class in question, not its loss or logit",
        )
    return values


def _deletion(sizes: tuple[int, ...], proponents: Tensor, opponents: Tensor, resamples: int, seed: int) -> Deletion:
    def over_queries(values: Tensor) -> QueryMean:
        return query_mean(values, resamples=resamples, seed=seed)

    return Deletion(
        sizes,
        tuple(over_queries(column) for column in proponents.unbind(1)),
        tuple(over_queries(column) for column in opponents.unbind(1)),
        over_queries(proponents.mean(1)),
        over_queries(opponents.mean(1)),
        over_queries((opponents.mean(1) - proponents.mean(1)) / 2),
    )


def _curve(sizes: tuple[int, ...], found: tuple[QueryMean, ...], style: str) -> Curve:
    return Curve(sizes, [q.mean for q in found], [q.low for q in found], [q.high for q in found], style)
