"""DataInf: an inverse curvature in closed form, written out of the training gradients themselves and never held."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, CurvatureStatistics, Evidence, nothing_seen
from lightning_influence.curvature.damping import Damping
from lightning_influence.curvature.layout import by_layer
from lightning_influence.curvature.stored import StoredEvidence
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense, GradientBlock, Gradients, Rows
from lightning_influence.gradients.blocks import spans


class DataInfCurvature(Curvature):
    """H = (1/N) Σ_i g_i g_iᵀ layer by layer, its inverse taken inside the mean; the gradients pass by at every use.

    Args:
        evidence: the training gradients, read (or captured) anew for every product and solve.
        layers: names of the parameters of each layer.
        means: mean eigenvalue of each layer.
        decay: weight decay by parameter name.
    """

    kind = "data_inf"

    def __init__(
        self,
        evidence: Evidence,
        layers: Sequence[tuple[str, ...]],
        means: Sequence[float],
        decay: Mapping[str, float] | None = None,
    ) -> None:
        self._evidence, self._layers, self._means = evidence, tuple(layers), tuple(means)
        self._decay = dict(decay or {})
        self.needs_model = not isinstance(evidence, StoredEvidence)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of all layers."""
        return tuple(name for layer in self._layers for name in layer)

    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """(1/N) Σ_i g_i (g_iᵀ v) layer by layer, and weight decay; rows in other layers than v are refused."""
        chosen = self._chosen(v, columns)
        wanted = self._wanted(chosen, rows)
        within = {name for layer in self._layers if any(n in chosen for n in layer) for name in layer}
        if cross := [name for name in wanted if name not in within]:
            raise CurvatureError(
                f"this curvature has no entries between {', '.join(cross)} and {', '.join(chosen)}",
                expected="rows and columns of the same layers",
                found="layers that DataInf keeps apart",
                hint="take MatrixFree or curvature.Dense('hessian'), which know all of H",
            )
        product = self._summed(chosen, wanted, None)
        for name, decay in self._decay.items():
            if name in wanted and name in chosen:
                product[name] = product[name] + decay * chosen[name].dense().to(product[name])
        return {name: Dense(product[name]) for name in wanted}

    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """(1/N) Σ_i (g_i g_iᵀ + λI)⁻¹ v, layer by layer, all vectors in one pass over the gradients.

        Raises:
            CurvatureError: λ and weight decay are 0 together; a part of a layer.
        """
        chosen = self._chosen(v, None)
        scales: dict[str, float] = {}
        for layer, mean in zip(self._layers, self._means, strict=True):
            mine = [name for name in layer if name in chosen]
            if mine and len(mine) < len(layer):
                missing = [name for name in layer if name not in chosen]
                raise CurvatureError(
                    f"the curvature of {', '.join(layer)} is one block, and only a part of it is asked for",
                    expected=f"gradients of {', '.join(missing)} too",
                    found=f"gradients of {', '.join(mine)}",
                    hint="take weight and bias together, or restrict InfluenceFunction(parameters=...) to some of them",
                )
            for name in mine:
                scales[name] = damping.of(mean) + self._decay.get(name, 0.0)
        if bad := [name for name, scale in scales.items() if not scale > 0]:
            raise CurvatureError(
                f"DataInf divides by the damping, which is 0 for {', '.join(bad)}",
                expected="a positive damping, or weight decay",
                found="0, or gradients that are all 0 and a damping relative to them",
                hint="pass InfluenceFunction(DataInf(), damping=...) a positive number, or leave these parameters out",
            )
        sums = self._summed(chosen, tuple(chosen), scales)
        return {name: Dense((chosen[name].dense().to(total) - total) / scales[name]) for name, total in sums.items()}

    def _summed(self, v: Gradients, wanted: Collection[str], scales: Mapping[str, float] | None) -> dict[str, Tensor]:
        """(1/N) Σ_i c_i g_i of the wanted parameters, (Q, *shape): c_i = g_iᵀ v, of whose layers some are in v.

        With a diagonal D of `scales` instead c_i = g_iᵀD⁻¹v / (1 + g_iᵀD⁻¹g_i), as Sherman and Morrison have it: the
        inverse of (g gᵀ + D) is D⁻¹ - D⁻¹g gᵀD⁻¹ / (1 + gᵀD⁻¹g).
        """
        sums: dict[str, Tensor] = {}
        layers = [layer for layer in self._layers if any(name in v for name in layer)]

        def add(columns: Iterator[Gradients]) -> None:
            gradients = only(columns)
            for layer in layers:
                device = next(v[name].device for name in layer if name in v)
                own = {name: gradients[name].to(device=device) for name in layer}
                weights: Tensor | None = None
                norms: Tensor | None = None
                for name in layer:
                    if name not in v:
                        continue
                    scale = 1.0 if scales is None else scales[name]
                    product = own[name].inner(v[name]) / scale  # (Q, n)
                    weights = product if weights is None else weights + product
                    if scales is not None:
                        square = own[name].norm().square() / scale  # (n,)
                        norms = square if norms is None else norms + square
                assert weights is not None
                if norms is not None:
                    weights = weights / (1 + norms)
                for name in layer:
                    if name in wanted:
                        part = weighted_sum(own[name], weights)
                        sums[name] = sums[name].add_(part) if name in sums else part

        self._evidence.visit(0, add)
        return {name: self._evidence.reduce(sums[name]) / self._evidence.num_samples for name in wanted}

    def decayed(self, decay: Mapping[str, float]) -> DataInfCurvature:
        """With weight decay beside λ."""
        both = {name: self._decay.get(name, 0.0) + decay.get(name, 0.0) for name in self.parameters}
        return DataInfCurvature(self._evidence, self._layers, self._means, both)

    def state(self) -> NoReturn:
        """Refused: it would be all the training gradients.

        Raises:
            CurvatureError: always.
        """
        raise _not_stored()

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> NoReturn:
        """Refused: there is no state.

        Raises:
            CurvatureError: always.
        """
        raise _not_stored()


class DataInf(CurvatureStatistics):
    """Influence in closed form (Kwon, Wu, Wu & Zou 2024, 2310.00902): the inverse of the mean is replaced by the mean
    of the inverses, layer by layer.

        H⁻¹ v ≈ (1/N) Σ_i (g_i g_iᵀ + λI)⁻¹ v = (1/(Nλ)) Σ_i [v - (g_iᵀ v) / (λ + |g_i|²) g_i]

    For `InfluenceFunction(DataInf())`: every question passes once over the training gradients of the store, projected
    or not, or over the training data where the store has none. The default damping, a tenth of the mean eigenvalue of
    each layer, is the paper's. Weight decay is added to λ. The error grows with the number of weights of a layer: the
    paper has the small matrices of LoRA in mind.
    """

    name = "data_inf"
    from_stored = True

    @property
    def has_shifts(self) -> bool:
        """False: it is a mean of inverses."""
        return False

    def collect(self, evidence: Evidence) -> Curvature:
        """One pass over the gradients, for their mean squares.

        Raises:
            CurvatureError: several gradients for one sample, as of exact labels.
        """
        squares: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}

        def add(columns: Iterator[Gradients]) -> None:
            for name, block in only(columns).items():
                total = block.norm().double().square().sum()
                squares[name] = squares[name] + total if name in squares else total
                sizes[name] = math.prod(block.shape)

        evidence.visit(0, add)
        if not squares:
            raise nothing_seen()
        layers = by_layer(tuple(squares))
        count = evidence.num_samples
        means = [
            float(sum(evidence.reduce(squares[n]) for n in layer)) / count / sum(sizes[n] for n in layer)
            for layer in layers
        ]
        return DataInfCurvature(evidence, layers, means)


def only(columns: Iterator[Gradients]) -> Gradients:
    """The one gradient of each sample.

    Raises:
        CurvatureError: there are several.
    """
    gradients = next(columns)
    if next(columns, None) is not None:
        raise CurvatureError(
            "DataInf takes one gradient from each sample",
            expected='labels="observed", or "sampled"',
            found='several gradients for each sample, as labels="exact" gives',
            hint='leave labels out, or pass labels="observed"',
        )
    return gradients


def weighted_sum(block: GradientBlock, weights: Tensor) -> Tensor:
    """Σ_n weights[q, n] g_n, (Q, *shape), with a part of the gradients written out at a time; weights (Q, N)."""
    if isinstance(block, Rows):
        total = weights.new_zeros(len(weights), *block.shape)
        for part in spans(len(block.words), len(weights) * block.values.shape[1]):
            values = weights[:, block.owners[part], None] * block.values[part].to(weights)  # (Q, m, D)
            total.index_add_(1, block.words[part], values)
        return total
    total = weights.new_zeros(len(weights), math.prod(block.shape))
    for part in spans(block.num_samples, total.shape[1]):
        some = block.select(torch.arange(part.start, part.stop, device=block.device))
        total.addmm_(weights[:, part], some.dense().reshape(-1, total.shape[1]).to(weights))
    return total.view(-1, *block.shape)


def _not_stored() -> CurvatureError:
    return CurvatureError(
        "DataInf is not stored",
        expected="InfluenceFunction(DataInf()), which reads the gradients that GradientSnapshot stored",
        found="a CurvatureSnapshot",
        hint="fit with GradientSnapshot(store, parameters=...), then ask with InfluenceFunction(DataInf())",
    )
