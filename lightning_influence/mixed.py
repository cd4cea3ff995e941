"""How much of a prediction comes from which training run: all runs' samples ranked on one scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.attribution import Attribution, TopK, refuse_not_finite
from lightning_influence.errors import QueryError
from lightning_influence.estimators import Attributor, Queries, Stage
from lightning_influence.estimators.multi_stage import MultiStage


@dataclass(frozen=True)
class MixedAttribution:
    """Samples of several training runs, on one scale: the predicted change of a query's m when the run that a sample
    belongs to, and all runs after it, are repeated without it.

    Attributes:
        runs: one attribution a run, the finetuning run first; scores are score(q, z)/N of the run, in units of m.
        amounts: (Q, runs), Σ_z |score(q, z)|/N: all that a run's samples pull at the query, in either direction. Sums
            without the bars say nothing: at the end of training the pulls cancel.
    """

    runs: tuple[Attribution, ...]
    amounts: Tensor

    @property
    def finetuning(self) -> Attribution:
        """The samples of the run that was asked."""
        return self.runs[0]

    @property
    def pretraining(self) -> Attribution:
        """The samples of the first run."""
        return self.runs[-1]

    @property
    def shares(self) -> Tensor:
        """(Q, runs), each run's part of the amounts; they sum to 1."""
        return self.amounts / self.amounts.sum(1, keepdim=True).clamp_min(torch.finfo(self.amounts.dtype).tiny)

    def __repr__(self) -> str:
        parts = ", ".join(f"{share:.0%}" for share in self.shares.mean(0).tolist())
        return f"MixedAttribution({len(self.runs[0])} queries, of the runs from the last to the first {parts})"


def mixed_attribution(stage: Stage, estimator: Attributor, queries: Queries, k: int) -> MixedAttribution:
    """Rank the samples of all runs that a query goes back through.

    Args:
        k: samples of each end and each run.

    Raises:
        QueryError: an estimator that is not of several runs, or only ranks; a run whose store holds no gradients.
    """
    if not isinstance(estimator, MultiStage):
        raise QueryError(
            "there is one training run to attribute to",
            expected="MultiStage(...)",
            found=repr(estimator),
            hint="take query(batch); or link the run to an earlier one with StageLinker and ask with MultiStage",
        )
    if not estimator.counterfactual:
        raise QueryError(
            "scores that only rank have no scale that two runs could share",
            expected="an inner InfluenceFunction, and link=Proximity() or Source()",
            found=repr(estimator),
            hint="ask each run alone, or take estimators whose scores are amounts",
        )
    found = [_ranked(*each, k) for each in _each_run(stage, estimator, queries)]
    return MixedAttribution(tuple(answer for answer, _ in found), torch.stack([amount for _, amount in found], 1))


def _each_run(stage: Stage, estimator: Attributor, queries: Queries) -> Iterator[tuple[Attributor, Stage, Queries]]:
    """Who scores the samples of each run, the one that was asked first."""
    while isinstance(estimator, MultiStage):
        yield estimator.own(), stage, queries
        queries = estimator.pulled(stage, queries, of_any=isinstance(estimator.inner, MultiStage))
        stage, estimator = estimator.parent(stage), estimator.inner
    yield estimator, stage, queries


def _ranked(estimator: Attributor, stage: Stage, queries: Queries, k: int) -> tuple[Attribution, Tensor]:
    """The first k of both ends, and Σ|score|/N (Q,), from one pass."""
    length = stage.store.manifest.dataset_length
    kept = min(k, length)
    highest, lowest = TopK(len(queries), kept), TopK(len(queries), kept, largest=False)
    amounts = torch.zeros(len(queries), dtype=torch.float64)
    for block in estimator.score_blocks(stage, queries):
        refuse_not_finite(block.scores)
        effects = block.scores / length
        highest.update(block.queries, block.sample_ids, effects)
        lowest.update(block.queries, block.sample_ids, effects)
        amounts[block.queries] += effects.abs().double().sum(1).cpu()
    return Attribution(torch.arange(len(queries)), highest.ranking(), lowest.ranking()), amounts
