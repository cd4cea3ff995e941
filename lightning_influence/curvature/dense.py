"""Exact curvature of a few parameters as one matrix: Fisher, Gauss–Newton or Hessian; the reference for the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_influence.curvature.block_diagonal import BlockDiagonal, CurvatureBlock, expect_shapes, shifted
from lightning_influence.curvature.curvature import Curvature, CurvatureStatistics, Evidence, nothing_seen
from lightning_influence.curvature.eigen import eigen
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense as DenseGradients
from lightning_influence.gradients import GradientBlock, Gradients, accumulation_dtype

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_COLUMNS = 64  # Hessian columns asked for at a time


class DenseBlock(CurvatureBlock):
    """H written out, over parameters laid end to end.

    Args:
        shapes: of the parameters, in the order in which they are laid.
        matrix: H (P, P), without weight decay.
        decay: weight decay (P,).
    """

    kind = "dense"

    def __init__(self, shapes: Shapes, matrix: Tensor, decay: Tensor | None = None) -> None:
        self._shapes, self.names, self.matrix = dict(shapes), tuple(shapes), matrix
        self.decay = matrix.new_zeros(len(matrix)) if decay is None else decay

    @property
    def shapes(self) -> Shapes:
        """Of the parameters."""
        return self._shapes

    @property
    def mean_eigenvalue(self) -> float:
        """trace(H) / P."""
        return float(self.matrix.diagonal().double().mean())

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return eigen(self.matrix + torch.diag(self.decay), self.names[0])

    def matvec(self, v: Gradients) -> Gradients:
        """H v."""
        flat = flattened(v, self.names)
        matrix = (self.matrix + torch.diag(self.decay)).to(flat.device)
        kind = torch.promote_types(flat.dtype, matrix.dtype)
        return laid_out(flat.to(kind) @ matrix.to(kind), self.shapes)

    def solve(self, v: Gradients, damping: float) -> Gradients:
        """(H + λI)⁻¹ v by the eigen-decomposition, which is made once; H may be indefinite."""
        flat = flattened(v, self.names)
        values, vectors = self._eigen
        kind = torch.promote_types(flat.dtype, values.dtype)
        values, vectors = values.to(flat.device, kind), vectors.to(flat.device, kind)
        divisors = shifted(values, damping, self.names)
        return laid_out(((flat.to(kind) @ vectors) / divisors) @ vectors.T, self.shapes)

    def decayed(self, decay: Mapping[str, float]) -> DenseBlock:
        """With weight decay on the diagonal."""
        parts = [self.decay.new_full((math.prod(s),), decay.get(name, 0.0)) for name, s in self.shapes.items()]
        return DenseBlock(self.shapes, self.matrix, self.decay + torch.cat(parts))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The matrix and the shapes."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"matrix": self.matrix, "decay": self.decay}, {"shapes": shapes}

    @classmethod
    def load(cls, names: tuple[str, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> DenseBlock:
        """The block that `state` described."""
        shapes = {name: tuple(int(size) for size in config["shapes"][name]) for name in names}
        size = sum(map(math.prod, shapes.values()))
        expect_shapes(tensors, {"matrix": (size, size), "decay": (size,)})
        return cls(shapes, tensors["matrix"], tensors["decay"])


class OuterSums:
    """Σ_n ∇ℓ_n ∇ℓ_nᵀ over parameters laid end to end."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.total: Tensor | None = None
        self.dtype = torch.float32

    def add(self, gradients: Gradients) -> None:
        """Add a column."""
        flat = flattened(gradients, self.names)  # (N, P)
        if self.total is None:
            self.shapes = {name: gradients[name].shape for name in self.names}
            self.total = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64, device=flat.device)
            self.dtype = flat.dtype
        self.total += flat.T @ flat

    def update(self, columns: Iterator[Gradients]) -> None:
        """Add a batch."""
        for gradients in columns:
            self.add(gradients)

    def block(self, evidence: Evidence, num_samples: int) -> DenseBlock:
        """The mean over the samples of all processes."""
        if self.total is None:
            raise nothing_seen()
        return DenseBlock(self.shapes, (evidence.reduce(self.total) / num_samples).to(self.dtype))


class Dense(CurvatureStatistics):
    """The exact matrix of a few parameters.

    Args:
        matrix: `"fisher"`: mean of ∇ℓ ∇ℓᵀ over the labels that are asked for; `"ggn"`: mean of Jᵀ (∇²_z ℓ) J, the
            generalised Gauss–Newton matrix (Schraudolph 2002), equal to the Fisher with exact labels; `"hessian"`: ∇²
            of the mean loss, indefinite in general.
        at_most: most parameters; P of them need P² numbers.
    """

    def __init__(self, matrix: Literal["fisher", "ggn", "hessian"] = "ggn", *, at_most: int = 8192) -> None:
        if matrix not in ("fisher", "ggn", "hessian"):
            raise CurvatureError(
                "unknown matrix", expected='"fisher", "ggn" or "hessian"', found=repr(matrix), hint="choose one"
            )
        self.matrix, self.at_most = matrix, at_most

    @property
    def name(self) -> str:  # type: ignore[override]
        """What its artifacts are called: `dense_` and the matrix."""
        return f"dense_{self.matrix}"

    @property
    def uses_labels(self) -> bool:
        """Of the Fisher matrix alone."""
        return self.matrix == "fisher"

    @property
    def stands_for(self) -> Literal["hessian", "ggn"]:
        """The Gauss–Newton matrix for the Fisher matrix, else the one that was asked for."""
        return "hessian" if self.matrix == "hessian" else "ggn"

    def collect(self, evidence: Evidence) -> Curvature:
        """The whole matrix.

        Raises:
            CurvatureError: more than `at_most` parameters.
        """
        shapes = {name: tuple(p.shape) for name, p in evidence.selection.parameters.items()}
        size = sum(math.prod(shape) for shape in shapes.values())
        if size > self.at_most:
            raise CurvatureError(
                "the exact matrix of so many parameters does not fit",
                expected=f"at most {self.at_most} parameters",
                found=f"{size} parameters, a matrix of {size * size * 8 / 1e9:.1f} GB in float64",
                hint="select fewer parameters, use EKFAC(), or InfluenceFunction(curvature=MatrixFree())",
            )
        if self.matrix == "fisher":
            sums = OuterSums(evidence.selection.names)
            evidence.visit(0, sums.update)
            return BlockDiagonal([sums.block(evidence, evidence.num_samples)])
        operator = evidence.operator(self.matrix)
        parameters = evidence.selection.parameters.values()
        some, kind = next(iter(parameters)), accumulation_dtype(*parameters)
        rows = []
        for start in range(0, size, _COLUMNS):
            unit = torch.zeros(min(_COLUMNS, size - start), size, dtype=kind, device=some.device)
            unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1
            rows.append(operator.matvec(unit))
        matrix = torch.cat(rows)
        return BlockDiagonal([DenseBlock(shapes, (matrix + matrix.T) / 2)])


def flattened(v: Gradients, names: tuple[str, ...]) -> Tensor:
    """Vectors laid end to end, (Q, P)."""
    return torch.cat([v[name].dense().flatten(1) for name in names], 1)


def laid_out(flat: Tensor, shapes: Shapes) -> dict[str, GradientBlock]:
    """The inverse of `flattened`."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = torch.split(flat, sizes, 1)  # type: ignore[no-untyped-call,unused-ignore]
    return {n: DenseGradients(part.reshape(-1, *s)) for (n, s), part in zip(shapes.items(), parts, strict=True)}
