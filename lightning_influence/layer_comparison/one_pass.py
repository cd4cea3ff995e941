"""Scores, self-influence and cancellation of every layer from one pass over the store: each shard is read once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.estimators.estimator import (
    Estimator,
    Queries,
    Stage,
    Term,
    by_span,
    own_side,
    query_side,
    train_side,
)
from lightning_influence.gradients import Dense, GradientBlock, Gradients, Rows
from lightning_influence.gradients.blocks import spans
from lightning_influence.layer_comparison.layers import Layer


@dataclass(frozen=True)
class LayerSums:
    """What a pass over the store finds; the last row of the first two is of all parameters of the estimator.

    Attributes:
        scores: (L + 1, Q, N), the part of the estimator's sum that goes through the parameters of each layer.
        self_influence: (L + 1, N), alike, of every training sample for its own loss; `None` if nobody asked.
        cancellations: (L, C), the cancellation ratio of each layer at each checkpoint.
    """

    scores: Tensor
    self_influence: Tensor | None
    cancellations: Tensor


def summed_by_layer(
    stage: Stage, estimator: Estimator, queries: Queries, layers: Sequence[Layer], *, self_influence: bool
) -> LayerSums:
    """The estimator's sum, its inner products sorted by the layers that their parameters belong to.

        score_l(q, z) = Σ_c Σ_{p in l} < [T_c ∇m(q; θ_c)]_p, w_c(z) ∇_p ℓ(z; θ_c) >

    A parameter may be in several layers. Where T_c treats parameters apart, as TracIn does, this is the estimator
    restricted to the layer; elsewhere it is the layer's share of the whole.
    """
    terms, length = estimator.terms(stage), stage.store.manifest.dataset_length
    parts: dict[int, list[Term]] = defaultdict(list)
    for term in terms:
        parts[term.query_at.step].append(term)
    members = _members(layers, {name for term in terms for name in term.parameters})
    scores, own = _Table(members, len(layers) + 1, length), _Table(members, len(layers) + 1, length)
    ratios = []
    for part in parts.values():  # query gradients are held for one checkpoint at a time
        transformed = query_side(part, queries)
        cancelled = _Cancellation()
        for ids, shards in by_span(part, stage.store):
            for index, shard in shards:
                train = train_side(part[index], shard, ids)
                where = ids if train.columns is None else ids[train.columns]
                for name, block in train.gradients.items():
                    scores.add(name, where, block.inner(transformed[index][name]), train.weights)
                    cancelled.add(name, block)
                if self_influence:
                    for name, products in _own_products(part[index], train.gradients).items():
                        own.add(name, where, products[None], train.weights)
        ratios.append([cancelled.ratio(layer) for layer in layers])
    found = own.sums[:, 0] if self_influence else None
    return LayerSums(scores.sums, found, torch.tensor(ratios, dtype=torch.float64).T)


class _Table:
    """Sums (R, Q, N), to which the products of a parameter are added in every row that it belongs to."""

    def __init__(self, members: dict[str, list[int]], rows: int, num_samples: int) -> None:
        self._members, self._rows, self._num_samples = members, rows, num_samples
        self.sums = torch.zeros(rows, 0, num_samples)

    def add(self, name: str, samples: Tensor, products: Tensor, weights: Tensor | None) -> None:
        """Products (Q, n) of a parameter with the samples (n,), each at its weight (n,)."""
        products = products if weights is None else products * weights.to(products)
        products = products.cpu()
        if self.sums.shape[1] != len(products):
            self.sums = products.new_zeros(self._rows, len(products), self._num_samples)
        elif self.sums.dtype != products.dtype:
            self.sums = self.sums.to(torch.promote_types(self.sums.dtype, products.dtype))
        for row in self._members[name]:
            self.sums[row].index_add_(1, samples, products.to(self.sums.dtype))


@dataclass
class _Cancellation:
    """Σ_i |∂ℓ_i/∂p| and Σ_i ∂ℓ_i/∂p of each parameter, in float64; as `metrics.CancellationRatio`, but from blocks, of
    which word embeddings are never written out."""

    absolute: dict[str, float] = field(default_factory=dict)
    signed: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, block: GradientBlock) -> None:
        """Take in the gradients of some samples."""
        self.absolute[name] = self.absolute.get(name, 0.0) + _absolute(block)
        more = block.sum().double()
        self.signed[name] = self.signed[name].add_(more) if name in self.signed else more

    def ratio(self, layer: Layer) -> float:
        """Of the parameters of a layer together: inf where the sums are zero and the gradients are not."""
        names = [name for name in layer.parameters if name in self.signed]
        absolute = torch.tensor(sum(self.absolute[name] for name in names), dtype=torch.float64)
        return float(absolute / sum((self.signed[name].abs().sum().cpu() for name in names), torch.zeros(())))


def _absolute(block: GradientBlock) -> float:
    if isinstance(block, Dense | Rows):  # the rows of a word embedding are those that are not zero
        return float(block.values.double().abs().sum())
    total = 0.0
    for span in spans(block.num_samples, math.prod(block.shape)):
        total += float(block.select(torch.arange(span.start, span.stop)).dense().double().abs().sum())
    return total


def _own_products(term: Term, gradients: Gradients) -> dict[str, Tensor]:
    """⟨T g, g⟩ of every sample by parameter, (n,) each; a few samples at a time, since T may write gradients out."""
    count = next(iter(gradients.values())).num_samples
    found: dict[str, list[Tensor]] = defaultdict(list)
    for span in spans(count, sum(math.prod(block.shape) for block in gradients.values())):
        whole = span.stop - span.start == count
        chosen = torch.arange(span.start, span.stop)
        some = gradients if whole else {name: block.select(chosen) for name, block in gradients.items()}
        for name, block in own_side(term, some, None).items():
            found[name].append(some[name].pairwise(block))
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _members(layers: Sequence[Layer], names: set[str]) -> dict[str, list[int]]:
    """In which rows each parameter counts: those of its layers, and the last, of all."""
    return {name: [*(i for i, layer in enumerate(layers) if name in layer.parameters), len(layers)] for name in names}
