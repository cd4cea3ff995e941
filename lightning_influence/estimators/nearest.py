"""NearestFirst: exact scores for the nearest training samples in feature space, and for no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_influence.artifacts import Checkpoint, Shard
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import (
    Attributor,
    Estimator,
    Queries,
    ScoreBlock,
    Stage,
    by_span,
    query_side,
    train_side,
)
from lightning_influence.gradients import Gradients, inner
from lightning_influence.replay import features_of


class NearestFirst(Attributor):
    """Score only each query's nearest neighbours (Guo et al. 2021, FastIF, 2012.15781).

    Features are what goes into the last layer, at the checkpoint of the estimator's last term: of the training samples
    as `GradientSnapshot(features=True)` stored them, of the queries as the model gives them now; near is a small
    Euclidean distance. All other samples are not ranked, and have a score of 0 in `influence.scores`.

    Args:
        estimator: a bilinear estimator, such as `InfluenceFunction()`.
        neighbours: how many samples are scored for each query.

    Raises:
        QueryError: no features in the store, no model, neighbours < 1.
    """

    def __init__(self, estimator: Estimator, neighbours: int = 1000) -> None:
        whole = isinstance(neighbours, int) and not isinstance(neighbours, bool) and neighbours >= 1
        if not isinstance(estimator, Estimator) or not whole:
            raise QueryError(
                "this cannot be narrowed down to neighbours",
                expected="a bilinear estimator, and 1 neighbour or more",
                found=f"{type(estimator).__name__}, {neighbours!r} neighbours",
                hint="write NearestFirst(InfluenceFunction(), neighbours=1000)",
            )
        self._estimator, self._neighbours = estimator, neighbours

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """One block a query, over its neighbours in dataset order."""
        terms = self._estimator.terms(stage)
        at = terms[-1].query_at
        shards = self._with_features(stage, at)
        seen: list[Tensor] = []  # features (Q, D), from the pass that takes their gradients

        def watched(checkpoint: Checkpoint, names: Collection[str]) -> Gradients:
            assert stage.module is not None
            with features_of(stage.module) as features:
                gradients = queries.gradients_at(checkpoint, names)
                if checkpoint.step == at.step:
                    seen.append(features.rows(len(queries)).cpu())
            return gradients

        transformed = query_side(terms, replace(queries, gradients_at=watched), stage.projection)
        near = self._nearest(shards, seen[-1])  # (Q, k), each row ascending
        union = torch.unique(near)
        total: Tensor | None = None
        for ids, of_span in by_span(terms, stage.store):
            wanted = torch.isin(ids, union)
            if not bool(wanted.any()):
                continue
            for index, shard in of_span:
                train = train_side(terms[index], shard, ids)
                columns = torch.arange(len(ids)) if train.columns is None else train.columns
                rows = wanted[columns].nonzero().squeeze(1)
                some = {name: block.select(rows) for name, block in train.gradients.items()}
                products = inner(some, transformed[index])
                if train.weights is not None:
                    products = products * train.weights[rows].to(products)
                if total is None:
                    total = products.new_zeros(len(queries), len(union))
                places = torch.searchsorted(union, ids[columns[rows]])
                total.index_add_(1, places.to(total.device), products.to(total))
        if total is not None:
            for q, own in enumerate(near):
                yield ScoreBlock(
                    slice(q, q + 1), own, total[q : q + 1, torch.searchsorted(union, own).to(total.device)]
                )

    def _with_features(self, stage: Stage, at: Checkpoint) -> Sequence[Shard]:
        """The shards of a checkpoint; a QueryError if one of them lacks features."""
        shards = stage.store.shards(at)
        if not shards or any("features" not in shard.records for shard in shards):
            raise QueryError(
                f"the store holds no features at step {at.step}",
                expected="features beside the gradients",
                found=f"records of {', '.join(shards[0].records) or 'nothing'}" if shards else "no gradients",
                hint="fit with GradientSnapshot(store, ..., features=True)",
            )
        return shards

    def _nearest(self, shards: Sequence[Shard], mine: Tensor) -> Tensor:
        """Ids of the nearest training samples of queries with features (Q, D): (Q, k), ascending in a row."""
        k = self._neighbours
        best, ids = mine.new_zeros(len(mine), 0), torch.zeros(len(mine), 0, dtype=torch.int64)
        for shard in shards:
            best = torch.cat([best, torch.cdist(mine, shard.records["features"].float())], 1)
            ids = torch.cat([ids, shard.sample_ids.expand(len(mine), -1)], 1)
            if best.shape[1] > k:
                best, places = best.topk(k, dim=1, largest=False)
                ids = ids.gather(1, places)
        return ids.sort(1).values
