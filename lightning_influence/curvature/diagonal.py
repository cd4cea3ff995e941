"""Diagonal curvature: one number a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.block_diagonal import BlockDiagonal, CurvatureBlock, shifted
from lightning_influence.curvature.curvature import Accumulator, Curvature, Evidence, OnePass, nothing_seen
from lightning_influence.gradients import Gradients, Rows, Selection


class DiagonalBlock(CurvatureBlock):
    """H = diag(d) of one parameter; vectors that touch few words of a look-up stay so.

    Args:
        name: the parameter.
        diagonal: d, shaped like it, without weight decay.
        decay: weight decay.
    """

    kind = "diagonal"

    def __init__(self, name: str, diagonal: Tensor, decay: float = 0.0) -> None:
        self.names, self.diagonal, self.decay = (name,), diagonal, decay

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameter's."""
        return {self.names[0]: tuple(self.diagonal.shape)}

    @property
    def mean_eigenvalue(self) -> float:
        """mean(d)."""
        return float(self.diagonal.double().mean())

    def matvec(self, v: Gradients) -> Gradients:
        """(d + decay) v."""
        return self._scaled(v, self.diagonal + self.decay)

    def solve(self, v: Gradients, damping: float) -> Gradients:
        """v / (d + decay + λ)."""
        return self._scaled(v, shifted(self.diagonal, self.decay + damping, self.names).reciprocal())

    def _scaled(self, v: Gradients, factor: Tensor) -> Gradients:
        (name,) = self.names
        return {name: v[name].to(dtype=torch.promote_types(v[name].dtype, factor.dtype)).multiplied(factor)}

    def decayed(self, decay: Mapping[str, float]) -> DiagonalBlock:
        """With weight decay on the diagonal."""
        return DiagonalBlock(self.names[0], self.diagonal, self.decay + decay.get(self.names[0], 0.0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The diagonal."""
        return {"diagonal": self.diagonal}, {"decay": self.decay}

    @classmethod
    def load(cls, names: tuple[str, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiagonalBlock:
        """The block that `state` described."""
        return cls(names[0], tensors["diagonal"], float(config["decay"]))


class SquareSums:
    """Σ_n (∇ℓ_n)² of some parameters."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, gradients: Gradients) -> None:
        """Add a column."""
        for name in self.names:
            block = gradients[name]
            if name not in self.sums:
                self.sums[name] = torch.zeros(block.shape, dtype=torch.float64, device=block.device)
                self.dtypes[name] = torch.promote_types(block.dtype, torch.float32)
            if isinstance(block, Rows):
                self.sums[name].index_add_(0, block.words, block.values.double().square())
            else:
                self.sums[name] += block.dense().square().sum(0)

    def blocks(self, evidence: Evidence, num_samples: int) -> list[DiagonalBlock]:
        """The mean over the samples of all processes."""
        if not self.sums:
            raise nothing_seen()
        return [
            DiagonalBlock(name, (evidence.reduce(total) / num_samples).to(self.dtypes[name]))
            for name, total in self.sums.items()
        ]


class _AllSquares(Accumulator):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._sums = SquareSums(names)

    def update(self, columns: Iterator[Gradients]) -> None:
        for gradients in columns:
            self._sums.add(gradients)

    def finish(self, evidence: Evidence, num_samples: int) -> Curvature:
        return BlockDiagonal(self._sums.blocks(evidence, num_samples))


class Diagonal(OnePass):
    """The diagonal of the Fisher information: d = (1/N) Σ_n (∇ℓ_n)², over the labels that are asked for. One pass, and
    any layer whose per-sample gradients can be captured."""

    name = "diagonal"

    def accumulator(self, selection: Selection) -> Accumulator:
        """Sums of squares."""
        return _AllSquares(selection.names)
