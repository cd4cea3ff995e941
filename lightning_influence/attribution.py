"""The answer to a query: which training samples moved its measurement most, by a running top-k over blocks of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_influence.artifacts import UNBOUNDED, StepRange
from lightning_influence.artifacts.tensor_files import write_tensors
from lightning_influence.errors import QueryError, StoreError
from lightning_influence.estimators.estimator import (
    Attributor,
    Estimator,
    Queries,
    Stage,
    Term,
    by_span,
    own_side,
    train_side,
)
from lightning_influence.gradients import Gradients, Projection
from lightning_influence.gradients.blocks import spans

_NOBODY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Ranking:
    """Samples in order of importance for every query.

    Attributes:
        sample_ids: (Q, k) int64.
        scores: (Q, k).
    """

    sample_ids: Tensor
    scores: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> Ranking:
        return Ranking(self.sample_ids[rows], self.scores[rows])


class Attribution:
    """Proponents and opponents of some queries.

    Proponents have the highest scores (training on them lowered the query's measurement), opponents the lowest. Equal
    scores are ordered by dataset position.

    `Trainer.predict` returns one for every batch; it is filled when the whole prediction epoch has been scored, and
    reading it earlier is refused.

    Args:
        query_ids: (Q,) int64, the queries' positions in their dataset; those of several predict loaders end to end.
        proponents, opponents: (Q, k) each; `None` until they are known.
    """

    def __init__(self, query_ids: Tensor, proponents: Ranking | None = None, opponents: Ranking | None = None) -> None:
        self.query_ids = query_ids
        self._proponents, self._opponents = proponents, opponents

    @property
    def proponents(self) -> Ranking:
        """The k samples with the highest scores, highest first."""
        return _filled(self._proponents)

    @property
    def opponents(self) -> Ranking:
        """The k samples with the lowest scores, lowest first."""
        return _filled(self._opponents)

    def fill(self, proponents: Ranking, opponents: Ranking) -> None:
        """Complete an attribution that was handed out before its queries were scored."""
        self._proponents, self._opponents = proponents, opponents

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, rows: int | slice | Tensor) -> Attribution:
        """Some of the queries; an integer gives an attribution of that one query."""
        if isinstance(rows, int):
            rows = torch.arange(len(self))[rows : rows + 1 or None]
            if not len(rows):
                raise IndexError("no such query")
        return Attribution(self.query_ids[rows], self.proponents[rows], self.opponents[rows])

    def __iter__(self) -> Iterator[Attribution]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        state = "not scored yet" if self._proponents is None else f"k={self._proponents.scores.shape[1]}"
        return f"Attribution({len(self)} queries, {state})"

    @classmethod
    def joined(cls, parts: Sequence[Attribution]) -> Attribution:
        """Several attributions as one, ordered by query id; a query that several of them answer is taken once."""
        ids = torch.cat([part.query_ids for part in parts])
        order = torch.argsort(ids, stable=True)
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = ids[order].diff() != 0
        first = order[new]
        pro = [part.proponents for part in parts]
        con = [part.opponents for part in parts]
        return cls(ids[first], _stacked(pro)[first], _stacked(con)[first])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the answers to a safetensors file, as a whole or not at all.

        Raises:
            StoreError: the disk is full or refuses.
        """
        tensors = {"query_ids": self.query_ids}
        for name, side in (("proponents", self.proponents), ("opponents", self.opponents)):
            tensors |= {f"{name}.sample_ids": side.sample_ids, f"{name}.scores": side.scores}
        write_tensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Read what `save` wrote.

        Raises:
            StoreError: no such file, or not one that `save` wrote.
        """
        try:
            found = load_file(path)
            sides = [Ranking(found[f"{s}.sample_ids"], found[f"{s}.scores"]) for s in ("proponents", "opponents")]
            return cls(found["query_ids"], *sides)
        except (OSError, SafetensorError, KeyError) as error:
            raise StoreError(
                f"{path} holds no attribution",
                expected="a file that Attribution.save wrote",
                found=f"{type(error).__name__}: {error}",
                hint="ask again with InfluenceModule(..., save_to=path)",
            ) from error


def _stacked(sides: Sequence[Ranking]) -> Ranking:
    return Ranking(torch.cat([side.sample_ids for side in sides]), torch.cat([side.scores for side in sides]))


def _filled(ranking: Ranking | None) -> Ranking:
    if ranking is None:
        raise QueryError(
            "these queries have not been scored yet",
            expected="a finished Trainer.predict",
            found="an attribution read inside the prediction epoch",
            hint="read it after trainer.predict has returned, or call influence.query(batch)",
        )
    return ranking


class TopK:
    """A running top-k over blocks of scores, in bounded memory and independent of how the blocks are cut and ordered.

    Equal scores are ordered by sample id.

    Args:
        num_queries: Q.
        k: entries kept for every query.
        largest: keep the highest scores, or the lowest.

    Raises:
        QueryError: k < 1.
    """

    def __init__(self, num_queries: int, k: int, *, largest: bool = True) -> None:
        if k < 1:
            raise QueryError(
                "k must be positive", expected=">= 1", found=f"k = {k}", hint="ask for at least one sample"
            )
        self._k, self._largest = k, largest
        self._ids = torch.full((num_queries, k), _NOBODY)
        self._scores = torch.full((num_queries, k), float("-inf" if largest else "inf"))

    def update(self, queries: slice, sample_ids: Tensor, scores: Tensor) -> None:
        """Take in the scores (q, n) of some queries against the samples `sample_ids` (n,), which were not seen before.

        Raises:
            QueryError: a score among the first k is NaN or infinite.
        """
        if bool((sample_ids[1:] < sample_ids[:-1]).any()):
            order = torch.argsort(sample_ids)
            sample_ids, scores = sample_ids[order], scores[:, order.to(scores.device)]
        kept = _first_k(scores, self._k, self._largest)  # (q, min(k, n))
        values, ids = scores.gather(1, kept).cpu(), sample_ids[kept.cpu()]
        refuse_not_finite(values)
        self._take(queries, ids, values)

    def merge(self, other: TopK) -> None:
        """Take in what another process has kept for the same queries; a sample that both have seen counts once."""
        known = (other._ids[:, :, None] == self._ids[:, None, :]).any(2)
        worst = float("-inf" if self._largest else "inf")
        self._take(slice(None), other._ids.masked_fill(known, _NOBODY), other._scores.masked_fill(known, worst))

    def _take(self, queries: slice, ids: Tensor, values: Tensor) -> None:
        """Candidates (q, m) beside those that are kept; the first k stay."""
        kind = torch.promote_types(self._scores.dtype, values.dtype)
        self._scores, values = self._scores.to(kind), values.to(kind)
        both = torch.cat([self._scores[queries], values], 1)
        names = torch.cat([self._ids[queries], ids], 1)
        order = torch.argsort(names, dim=1, stable=True)
        order = order.gather(1, torch.argsort(both.gather(1, order), dim=1, descending=self._largest, stable=True))
        order = order[:, : self._k]
        self._scores[queries], self._ids[queries] = both.gather(1, order), names.gather(1, order)

    @property
    def found(self) -> int:
        """Number of samples that were seen, at most k."""
        return int((self._ids != _NOBODY).sum(1).min()) if len(self._ids) else self._k

    def ranking(self) -> Ranking:
        """The best so far, best first.

        Raises:
            QueryError: fewer than k samples were seen.
        """
        if self.found < self._k:
            raise QueryError(
                "k exceeds the number of samples that were trained on",
                expected=f"k <= {self.found}",
                found=f"k = {self._k}",
                hint="choose a smaller k, or let the fit see more of its data (limit_train_batches)",
            )
        return Ranking(self._ids, self._scores)


def _first_k(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Positions (q, min(k, n)) of the largest (or smallest) scores, in no order, ties going to the lower position."""
    n = scores.shape[1]
    if n <= k:
        return torch.arange(n, device=scores.device).expand(len(scores), n)
    best, positions = scores.topk(k, dim=1, largest=largest)
    edge = best[:, -1:]
    inside = scores >= edge if largest else scores <= edge
    if bool((inside.sum(1) == k).all()) or bool(best.isnan().any()):
        return positions
    tied = scores == edge  # at the edge topk takes any of the tied
    room = k - (inside & ~tied).sum(1, keepdim=True)
    return (inside & (~tied | (tied.cumsum(1) <= room))).nonzero()[:, 1].view(len(scores), k)


def attribute(stage: Stage, attributor: Attributor, queries: Queries, k: int) -> tuple[Ranking, Ranking]:
    """(proponents, opponents) of every query, from one pass over the blocks of scores.

    Samples that no block speaks of (in flight: never trained on) are not ranked.

    Raises:
        QueryError: k exceeds the number of samples; a score is NaN or infinite; whatever the attributor refuses.
    """
    highest, lowest = TopK(len(queries), k), TopK(len(queries), k, largest=False)
    for block in attributor.score_blocks(stage, queries):
        highest.update(block.queries, block.sample_ids, block.scores)
        lowest.update(block.queries, block.sample_ids, block.scores)
    return highest.ranking(), lowest.ranking()


def refuse_meaningless(attributor: Attributor, answers: Attribution) -> None:
    """Whatever the attributor refuses once it sees the answers."""
    largest = torch.maximum(answers.proponents.scores[:, 0].abs(), answers.opponents.scores[:, 0].abs())
    attributor.check(largest, answers.query_ids)


def score_matrix(stage: Stage, attributor: Attributor, queries: Queries) -> Tensor:
    """All scores (Q, N), samples in dataset order (for a stream: in the order of their ids). A sample that was never
    trained on, in flight, has a column of zeros.

    Raises:
        QueryError: a score is NaN or infinite; whatever the attributor refuses.
    """
    length = attributor.answering(stage)[1].store.manifest.dataset_length
    ids = torch.arange(length) if length < UNBOUNDED else None
    scores: Tensor | None = None
    for block in attributor.score_blocks(stage, queries):
        refuse_not_finite(block.scores)
        ids = block.sample_ids if ids is None else ids  # the blocks of a stream have all its samples
        scores = block.scores.new_zeros(len(queries), len(ids), device="cpu") if scores is None else scores
        scores[block.queries, torch.searchsorted(ids, block.sample_ids)] = block.scores.cpu()
    if scores is None:
        raise QueryError("there are no scores", expected="training samples", found="none", hint="look at the store")
    attributor.check(scores.abs().amax(1), torch.arange(len(queries)))
    return scores


def self_influence(stage: Stage, estimator: Estimator) -> Tensor:
    """Score of every training sample for its own loss, (N,): high for mislabelled and atypical samples.

        sum over terms c of w_c(z) < T_c grad l(z; theta_c), grad l(z; theta_c) >

    TracIn: sum over c of eta_c |grad l(z; theta_c)|^2 (Pruthi et al. 2020, section 4.1); in flight, where a sample's
    gradient is known at the weights that trained on it, sum over t of eta_t / B_t |grad l(z; w_t)|^2, which is 0 for
    one that was never trained on.
    """
    terms, parts, length = estimator.terms(stage), [], stage.store.manifest.dataset_length
    for ids, shards in by_span(terms, stage.store):
        total: Tensor | None = None
        for index, shard in shards:
            train = train_side(terms[index], shard, ids)
            products = _own_products(terms[index], train.gradients, stage.projection)
            total = train.added(total, products[None], len(ids))
        if total is not None:
            if length < UNBOUNDED and len(ids) != length and isinstance(terms[shards[0][0]].train_at, StepRange):
                return total.new_zeros(length).index_copy_(0, ids.to(total.device), total[0])
            parts.append(total[0])
    return torch.cat(parts)


def _own_products(term: Term, gradients: Gradients, projection: Projection | None) -> Tensor:
    """⟨T g, g⟩ of every sample, (N,); a few samples at a time, since T may write their gradients out."""
    count = next(iter(gradients.values())).num_samples
    numel = sum(math.prod(block.shape) for block in gradients.values())
    parts = []
    for span in spans(count, numel):
        some = {name: block.select(torch.arange(span.start, span.stop)) for name, block in gradients.items()}
        own = own_side(term, some, projection)
        parts.append(sum((some[name].pairwise(block) for name, block in own.items()), torch.zeros(())))
    return torch.cat(parts)


def removal_effects(stage: Stage, attributor: Attributor, queries: Queries, sets: Sequence[Tensor]) -> Tensor:
    """Predicted change of each query's m when each set of samples is removed and the model trained again, (Q, S).

        m(without S) - m = (1/N) sum over z in S of score(q, z)

    Args:
        sets: sample ids of each removal, (k,) int64.

    Raises:
        QueryError: an attributor whose scores only rank; an id that is no training sample, or twice in a set.
    """
    length = attributor.answering(stage)[1].store.manifest.dataset_length
    if not attributor.counterfactual:
        raise QueryError(
            f"the scores of {type(attributor).__name__} rank samples: they are no amounts",
            expected="an estimator whose scores are changes of m, such as InfluenceFunction",
            found=type(attributor).__name__,
            hint="fit with CurvatureSnapshot too and ask with InfluenceFunction()",
        )
    for ids in sets:
        wrong = ids[(ids < 0) | (ids >= length)].tolist()
        if wrong or len(set(ids.tolist())) != len(ids):
            raise QueryError(
                "these samples cannot be removed",
                expected=f"different ids from 0 to {length - 1}",
                found=f"{wrong[:5]}" if wrong else "an id twice",
                hint="sample ids are positions in the training set",
            )
    member = torch.zeros(length, len(sets), dtype=torch.float64)  # (N, S)
    for number, ids in enumerate(sets):
        member[ids, number] = 1 / length
    effects = torch.zeros(len(queries), len(sets), dtype=torch.float64)
    for block in attributor.score_blocks(stage, queries):
        refuse_not_finite(block.scores)
        effects[block.queries] += block.scores.double().cpu() @ member[block.sample_ids]
    return effects


def refuse_not_finite(scores: Tensor) -> None:
    """QueryError if a score (q, n) is NaN or infinite."""
    if not bool(torch.isfinite(scores).all()):
        bad = (~torch.isfinite(scores)).any(1).nonzero().flatten().tolist()
        raise QueryError(
            "a score is NaN or infinite",
            expected="finite scores",
            found=f"{len(bad)} queries, first at {bad[0]}",
            hint="the query's gradient is not finite at one of the checkpoints: look at its loss there",
        )
