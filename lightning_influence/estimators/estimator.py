"""What an estimator is: a function from a stage (a store, and its model and data) to terms of one bilinear form.

    score(q, z) = sum over terms c of < T_c grad m(q; theta_c), w_c(z) grad l(z; theta_c) >

The sign, here and everywhere: **score = -dm/d(epsilon) when sample z is up-weighted by epsilon.** m is lower-is-better
(a loss; margins and probabilities enter negated), so a positive score is a *proponent* (training on z lowers the
query's measurement) and a negative one an *opponent*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Shard, StepRange
from lightning_influence.curvature import stored_projection
from lightning_influence.errors import QueryError
from lightning_influence.fitted import weights_at
from lightning_influence.gradients import Gradients, Projection, inner, unpack
from lightning_influence.objective import PerSample, Reduction

Transform: TypeAlias = Callable[[Gradients], Gradients]

_MOST_BYTES = 1 << 30  # of scores held at a time, and of query gradients if their scores are smaller


def unchanged(gradients: Gradients) -> Gradients:
    """The identity transform."""
    return gradients


@dataclass(frozen=True)
class Stage:
    """One training run as an estimator sees it.

    Attributes:
        store: its artifacts.
        module: the model, for queries and for estimators that need its layers.
        train_loader: its training data, for attributors that look at the samples themselves.
        per_sample_loss: the loss that the fit was given, if any.
        stored: training gradients come from the store; else they are taken as the training data stream by.
    """

    store: ArtifactStore
    module: LightningModule | None = None
    train_loader: Any = None
    per_sample_loss: PerSample | None = None
    stored: bool = True

    @property
    def reduction(self) -> Reduction:
        """How the training loss reduces its batch, as the fit found it."""
        return "sum" if self.store.manifest.settings.get("reduction") == "sum" else "mean"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameters whose training gradients can be had: those of the store; of data that stream by, all."""
        manifest = self.store.manifest
        return manifest.selected if self.stored else tuple(manifest.parameters)

    @property
    def projection(self) -> Projection | None:
        """What the training gradients went through before they were stored; `None` if nothing, or if they stream by."""
        return stored_projection(self.store) if self.stored else None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of the store, at least one.

        Raises:
            QueryError: there is none.
        """
        checkpoints = self.store.checkpoints()
        if not checkpoints:
            raise QueryError(
                "the store holds no checkpoint",
                expected="at least one",
                found=str(self.store.root),
                hint="let the fit with GradientSnapshot reach the end of an epoch",
            )
        return checkpoints

    @contextmanager
    def at(self, checkpoint: Checkpoint) -> Iterator[LightningModule]:
        """The module with the weights of a checkpoint; its own are put back on the way out, after an exception too.

        Raises:
            QueryError: the stage has no module.
            StoreError: the weights do not fit the module.
        """
        if self.module is None:
            raise QueryError("this needs the model", expected="a module", found="none", hint="pass it to the Stage")
        with weights_at(self.module, self.store, checkpoint):
            yield self.module


@dataclass(frozen=True)
class Term:
    """One inner product of the sum.

    Attributes:
        query_at: the checkpoint whose weights the query's gradients are taken at.
        train_at: the stored training gradients: of a checkpoint, or of a range of steps recorded in flight.
        parameters: full names of the parameters that take part; the transforms see no others.
        transform: T_c, on the query's gradients; where training gradients are stored projected, they are so after it.
        train_transform: what the training gradients pass through before the product (such as keeping the top words).
        train_weight: factor of every training record, from its shard to (N,); `None` is 1.
        stored_transform: the part of T_c that acts on gradients in the form in which training gradients are stored,
            projected where they are; last of all on the query's side.
    """

    query_at: Checkpoint
    train_at: Checkpoint | StepRange
    parameters: tuple[str, ...]
    transform: Transform = unchanged
    train_transform: Transform = unchanged
    train_weight: Callable[[Shard], Tensor] | None = None
    stored_transform: Transform = unchanged


@dataclass(frozen=True)
class Queries:
    """The queries of one call, as every attributor sees them.

    Attributes:
        batches: the batches, in query order; each is put on the module's device when it is asked for.
        sizes: queries in each.
        gradients_at: per-query gradients of the measurement at the weights of a checkpoint, of the named parameters;
            the checkpoint is loaded at every call.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    gradients_at: Callable[[Checkpoint, Collection[str]], Gradients]

    def __len__(self) -> int:
        return sum(self.sizes)

    def slices(self, num_samples: int) -> Iterator[slice]:
        """All queries, as many at a time as keep their scores against `num_samples` below a gigabyte."""
        step = max(1, _MOST_BYTES // max(1, 4 * num_samples))
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of some queries against some training samples; the blocks of one call cover every pair once.

    Attributes:
        queries: which queries, as a slice of their order.
        sample_ids: (n,) int64, ascending.
        scores: (q, n), positive for proponents.
    """

    queries: slice
    sample_ids: Tensor
    scores: Tensor


class Attributor(ABC):
    """Anything that scores every training sample for every query: the interface of estimators and baselines."""

    #: Whether scores are changes of m per unit of weight, so that amounts can be predicted; otherwise they only rank.
    counterfactual: bool = False

    @abstractmethod
    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """The scores block by block, samples in dataset order within a query, so that memory stays bounded."""

    def answering(self, stage: Stage) -> tuple[Attributor, Stage]:
        """Who scores, and whose samples: this one and this run, unless queries are handed on to an earlier one."""
        return self, stage

    def asked(self, stage: Stage, queries: Queries) -> Queries:
        """The queries as they reach that run."""
        return queries

    def check(self, largest: Tensor, query_ids: Tensor) -> None:  # noqa: B027  (an optional refusal, no obligation)
        """Refuse meaningless answers, after all of them are known and saved.

        Args:
            largest: (Q,), the largest absolute score of every query.
            query_ids: (Q,), the queries' positions in their dataset, or in the batch that was asked about.
        """


class Estimator(Attributor):
    """The bilinear family: an estimator says its terms, and the scoring is written once for all of them."""

    @abstractmethod
    def terms(self, stage: Stage) -> Sequence[Term]:
        """The terms of the sum, at least one.

        Raises:
            QueryError: the store lacks what this estimator needs.
        """

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """Scores of the bilinear form: first every query gradient, a checkpoint at a time; then shards outside, terms
        inside.

        Replay shards of one span are scored together, so that the sum is complete before anything is ranked and no more
        than (Q, shard) scores are held. Records made in flight lie in training order: they are summed over the whole
        run into (q, N), with as many queries at a time as a gigabyte allows; samples that were never trained on are in
        no block.

        Where the query gradients of all checkpoints would exceed a gigabyte and the scores (Q, N) do not, checkpoints
        are scored one after the other into those.
        """
        by_checkpoint: dict[int, list[Term]] = defaultdict(list)
        for term in self.terms(stage):
            by_checkpoint[term.query_at.step].append(term)
        parts = list(by_checkpoint.values())
        projection, length = stage.projection, stage.store.manifest.dataset_length
        first = query_side(parts[0], queries, projection)
        held = len(parts) * sum(block.nbytes() for gradients in first for block in gradients.values())
        if held > _MOST_BYTES >= 8 * len(queries) * length:
            yield from _one_by_one(parts, first, stage.store, queries, projection)
            return
        transformed = first + [gradients for part in parts[1:] for gradients in query_side(part, queries, projection)]
        yield from _blocks([term for part in parts for term in part], transformed, stage.store, queries)


def _blocks(
    terms: Sequence[Term], transformed: Sequence[Gradients], store: ArtifactStore, queries: Queries
) -> Iterator[ScoreBlock]:
    for ids, shards in by_span(terms, store):
        for rows in queries.slices(len(ids)):
            chosen = None if rows.stop - rows.start == len(queries) else torch.arange(rows.start, rows.stop)
            total: Tensor | None = None
            for index, shard in shards:
                train = train_side(terms[index], shard, ids)
                total = train.added(total, inner(train.gradients, _rows(transformed[index], chosen)), len(ids))
            if total is not None:
                yield ScoreBlock(rows, ids, total)


def _one_by_one(
    parts: Sequence[Sequence[Term]],
    first: list[Gradients],
    store: ArtifactStore,
    queries: Queries,
    projection: Projection | None,
) -> Iterator[ScoreBlock]:
    """All scores as one block, with the query gradients of one checkpoint at a time; `first` is used up."""
    total: Tensor | None = None
    length = store.manifest.dataset_length
    seen = torch.zeros(length, dtype=torch.bool)
    for part in parts:
        transformed = [first.pop(0) for _ in part] if first else query_side(part, queries, projection)
        for block in _blocks(part, transformed, store, queries):
            total = block.scores.new_zeros(len(queries), length) if total is None else total
            total[block.queries].index_add_(1, block.sample_ids.to(total.device), block.scores.to(total))
            seen[block.sample_ids] = True
        del transformed
    if total is not None:
        ids = seen.nonzero().squeeze(1)
        yield ScoreBlock(slice(0, len(queries)), ids, total if bool(seen.all()) else total[:, ids.to(total.device)])


def query_side(terms: Sequence[Term], queries: Queries, projection: Projection | None = None) -> list[Gradients]:
    """T_c grad m of every term, projected as the training gradients were; each checkpoint is asked for once."""
    transformed: dict[int, Gradients] = {}
    at_step: dict[int, list[int]] = defaultdict(list)
    for index, term in enumerate(terms):
        at_step[term.query_at.step].append(index)
    for indices in at_step.values():
        names = {name for index in indices for name in terms[index].parameters}
        gradients = queries.gradients_at(terms[indices[0]].query_at, names)
        for index in indices:
            own = terms[index].transform(restricted(gradients, terms[index].parameters))
            transformed[index] = terms[index].stored_transform(own if projection is None else projection.apply(own))
    return [transformed[index] for index in range(len(terms))]


def by_span(terms: Sequence[Term], store: ArtifactStore) -> Iterator[tuple[Tensor, list[tuple[int, Shard]]]]:
    """Spans of samples in dataset order: their ids (n,), and the shards that speak of them, each with the index of its
    term. Of records made in flight the samples are those that were trained on; the gradients of shards are read only
    where they are asked for."""
    spans: dict[tuple[int, int], list[tuple[int, Shard]]] = defaultdict(list)
    for index, term in enumerate(terms):
        for shard in store.shards(term.train_at):
            spans[shard.span].append((index, shard))
    for span, shards in tqdm(sorted(spans.items()), desc="scoring", unit="shard", delay=2.0, leave=False):
        if all(isinstance(terms[index].train_at, Checkpoint) for index, _ in shards):
            yield torch.arange(*span), shards
        else:
            yield torch.unique(torch.cat([shard.sample_ids for _, shard in shards])), shards


@dataclass(frozen=True)
class TrainSide:
    """What one term sees of one shard.

    Attributes:
        gradients: grad l of its records, transformed.
        columns: where each record stands among the samples of the span, (m,); `None`: they are those samples in order.
        weights: factor of every record, (m,); `None` is 1.
    """

    gradients: Gradients
    columns: Tensor | None
    weights: Tensor | None

    def added(self, total: Tensor | None, products: Tensor, num_samples: int) -> Tensor:
        """`total` (Q, n) with the products (Q, m) of the records added at their weights; `None` begins a new one."""
        if self.weights is not None:
            products = products * self.weights.to(products)
        if self.columns is None:
            return products if total is None else total.add_(products)
        if total is None:
            total = products.new_zeros(products.shape[0], num_samples)
        return total.index_add_(1, self.columns.to(products.device), products)


def train_side(term: Term, shard: Shard, ids: Tensor) -> TrainSide:
    """The records of a shard as a term sees them, among the samples `ids` (n,) of the span."""
    gradients = term.train_transform(restricted(unpack(shard.tensors), term.parameters))
    weights = None if term.train_weight is None else term.train_weight(shard)
    replayed = isinstance(term.train_at, Checkpoint)
    return TrainSide(gradients, None if replayed else torch.searchsorted(ids, shard.sample_ids), weights)


def own_side(term: Term, gradients: Gradients, projection: Projection | None) -> Gradients:
    """T_c grad l of stored training gradients, as if they were a query's.

    Raises:
        QueryError: they are projected, and T_c acts on gradients as they were captured.
    """
    if projection is not None and term.transform is not unchanged:
        raise QueryError(
            "self-influence cannot be told from projected gradients here",
            expected="an estimator that acts on projected gradients: TracIn(), InfluenceFunction(ProjectedGram())",
            found=f"one that acts on gradients as they are captured, and a store with {projection}",
            hint="fit with GradientSnapshot(projection=None), or take another estimator",
        )
    return term.stored_transform(term.transform(gradients))


def restricted(gradients: Gradients, names: Collection[str]) -> Gradients:
    """The gradients of some of the parameters; no others are read."""
    return {name: gradients[name] for name in gradients if name in names}


def _rows(gradients: Gradients, chosen: Tensor | None) -> Gradients:
    return gradients if chosen is None else {name: block.select(chosen) for name, block in gradients.items()}


def require_parameters(stage: Stage, wanted: Collection[str], estimator: str) -> tuple[str, ...]:
    """The wanted parameters in the order of the store; a QueryError if one of them cannot be had."""
    known = stage.parameters
    missing = [name for name in wanted if name not in known]
    if missing:
        raise QueryError(
            f"{estimator} needs gradients that this {'store' if stage.stored else 'model'} does not hold",
            expected=f"gradients of {', '.join(missing)}",
            found=f"gradients of {', '.join(known) or 'no parameter'} in {stage.store.root}",
            hint="fit again with these parameters selected in GradientSnapshot, restrict `parameters` here, or let the "
            "training data stream by: influence.prepare(query_loader), then Trainer().predict(influence, train_loader)",
        )
    return tuple(name for name in known if name in wanted)
