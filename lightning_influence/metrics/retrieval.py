"""Retrieval: do the first proponents hold the samples that are known to be relevant to a query?

Akyürek et al. 2022, "Towards tracing knowledge in language models back to the training data" (2205.11482): the samples
that express a query's fact are relevant, and a ranking is judged by mean reciprocal rank and recall at k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import Ids, booleans, check_ids, count_of, floats
from lightning_influence.metrics.drawing import Curve, curves, named
from lightning_influence.metrics.intervals import QueryMean, query_mean
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import found_among_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Retrieved:
    """How early the relevant samples come; nan for a query without any.

    Args:
        reciprocal_rank: 1 / place of the first relevant sample; its mean is the MRR.
        k: the numbers of first samples, (K,), as they were asked for.
        recall: share of the relevant samples among the first k, for each k.
    """

    reciprocal_rank: QueryMean
    k: tuple[int | float, ...]
    recall: tuple[QueryMean, ...]

    def __str__(self) -> str:
        recalls = "".join(f", recall at {k} {one}" for k, one in zip(self.k, self.recall, strict=True))
        return f"MRR {self.reciprocal_rank}{recalls}"


def proponent_retrieval(
    scores: Tensor,
    relevant: Tensor | Sequence[Sequence[int]],
    *,
    k: Sequence[int | float] = (1, 5, 10),
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Retrieved:
    """Judge scores (Q, N) by which samples are relevant to each query.

    Equal scores have no order: both figures are means over all orders of them. torchmetrics' functions of retrieval
    agree where all scores are positive and differ; they take scores of zero and below for not retrieved, equal ones in
    any order, and a query without relevant samples for zero.

    Args:
        scores: positive is a proponent.
        relevant: booleans (Q, N), or for each query the positions of its relevant samples.
        k: numbers of first samples; an int is a number, a float a share of all.
        ids: whose scores these are; compared with `truth_ids` where both are given.
        truth_ids: of the queries and samples of `relevant`.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.

    Raises:
        MetricError: shapes or ids that differ, no booleans, positions that do not exist, NaN, k out of range.

    >>> found = proponent_retrieval(torch.tensor([[0.1, -2.0, 0.4, -1.0]]), [[0, 3]], k=[1, 2])
    >>> found.reciprocal_rank.mean, [one.mean for one in found.recall]
    (0.5, [0.0, 0.5])
    """
    check_ids(ids, truth_ids)
    return _retrieved(_per_query(scores, relevant, k), k, resamples, seed)


class ProponentRetrieval(InfluenceMetric):
    """`proponent_retrieval` over batches of queries, on one process or several.

    Args:
        k: numbers of first samples; an int is a number, a float a share of all.
        resamples: of the bootstrap over queries.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = ProponentRetrieval(k=[1])
    >>> metric.update(torch.tensor([[0.1, 0.4]]), torch.tensor([[True, False]]))
    >>> metric.update(torch.tensor([[0.4, 0.1]]), torch.tensor([[True, False]]))
    >>> metric.compute().reciprocal_rank.mean
    0.75
    """

    higher_is_better = True

    def __init__(
        self, *, k: Sequence[int | float] = (1, 5, 10), resamples: int = 10_000, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(("figures",), resamples=resamples, seed=seed, **kwargs)
        self.k = tuple(k)

    def update(
        self,
        scores: Tensor,
        relevant: Tensor | Sequence[Sequence[int]],
        *,
        ids: Ids | None = None,
        truth_ids: Ids | None = None,
    ) -> None:
        """Add queries: their scores (Q, N) and which samples are relevant, booleans (Q, N) or positions."""
        check_ids(ids, truth_ids)
        self._keep("figures", _per_query(scores, relevant, self.k))

    def compute(self) -> Retrieved:
        """The means over all queries of all processes."""
        return _retrieved(self._kept("figures").view(-1, 1 + len(self.k)), self.k, self.resamples, self.seed)

    def plot(
        self, val: Retrieved | Mapping[str, Retrieved] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Recall over k with its band, of one method or of several by name; their MRR in the legend."""
        found = named(self.compute() if val is None else val, "proponents")
        drawn = {
            f"{name}, MRR {one.reciprocal_rank.mean:.3f}": [
                Curve(one.k, [q.mean for q in one.recall], [q.low for q in one.recall], [q.high for q in one.recall])
            ]
            for name, one in found.items()
        }
        return curves(drawn, ax, "first k proponents", "share of the relevant samples among them")


def _per_query(scores: Tensor, relevant: Tensor | Sequence[Sequence[int]], k: Sequence[int | float]) -> Tensor:
    """Reciprocal rank and recalls (Q, 1 + K), nan for queries without a relevant sample."""
    scores = floats(scores, "scores", "(Q, N)")
    if not isinstance(relevant, Tensor):
        relevant = _at(relevant, scores)
    relevant = booleans(relevant, "relevant samples", tuple(scores.shape)).to(scores.device)
    counts = [count_of(one, scores.shape[1]) for one in k]
    recalls = found_among_first(scores, relevant)[:, counts] / relevant.sum(1, keepdim=True)  # 0/0 is nan
    return torch.cat([_reciprocal_ranks(scores, relevant).unsqueeze(1), recalls], 1)


def _reciprocal_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Mean over the orders of equal scores of 1 / place of the first relevant sample (Q,)."""
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    ahead = (scores > best).sum(1)
    equal = scores == best
    size, sought = equal.sum(1), (equal & relevant).sum(1)
    ranks = torch.where(sought > 0, 1.0 / (ahead + 1).double(), torch.nan)
    for query in (size > sought.clamp_min(1)).nonzero().flatten().tolist():
        if sought[query]:
            ranks[query] = _among_equals(int(ahead[query]), int(size[query]), int(sought[query]))
    return ranks


def _among_equals(ahead: int, size: int, sought: int) -> float:
    """E[1 / (ahead + J)], J the place of the first of so many sought in a random order of a group of equals."""
    place = torch.arange(1, size - sought + 2, dtype=torch.float64)
    missed = (size - place - sought + 1) / (size - place + 1)  # nothing at this place, given nothing before it
    still = torch.cat([missed.new_ones(1), missed.cumprod(0)[:-1]])
    return float((still * (1 - missed) / (ahead + place)).sum())


def _at(positions: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
    """Positions of each query's relevant samples as booleans (Q, N)."""
    queries, samples = scores.shape
    wrong = sorted({p for row in positions for p in row if not 0 <= p < samples})
    if len(positions) != queries or wrong:
        raise MetricError(
            "the relevant samples do not fit the scores",
            expected=f"for each of {queries} queries positions from 0 to {samples - 1}",
            found=f"{len(positions)} queries" + (f", positions {wrong[:5]}" if wrong else ""),
            hint="positions are columns of the scores; translate sample ids into them first",
        )
    relevant = torch.zeros(scores.shape, dtype=torch.bool)
    for query, row in enumerate(positions):
        relevant[query, list(row)] = True
    return relevant


def _retrieved(figures: Tensor, k: Sequence[int | float], resamples: int, seed: int) -> Retrieved:
    first, *recalls = (query_mean(column, resamples=resamples, seed=seed) for column in figures.unbind(1))
    return Retrieved(first, tuple(k), tuple(recalls))
