"""LowRank: the eigenpairs of largest |λ| of the Hessian or Gauss–Newton matrix, by Krylov iteration, to be stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature, CurvatureStatistics, Evidence
from lightning_influence.curvature.damping import Damping
from lightning_influence.curvature.eigen import eigen
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.curvature.solvers import MatVec
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Gradients, accumulation_dtype

_ROUNDING = 64.0  # in units of the type's eps: what is smaller, relative to the largest product, counts as nothing


class LowRank(CurvatureStatistics):
    """H ≈ Uᵀ Λ U, the `rank` eigenpairs of largest |λ| that a Krylov space shows (Schioppa et al. 2022, 2112.03052;
    Arnoldi's iteration, which for a symmetric H is Lanczos' with every vector orthogonalised against all before).

    Args:
        rank: eigenpairs to keep; `rank` times the number of parameters is stored, and twice that or more needed while
            they are found.
        matrix: `"ggn"` or `"hessian"`, of which negative eigenvalues are kept too.
        iterations: walks over the training set; `None` takes as many as give a Krylov space of 2 rank + 10 dimensions.
        block_size: vectors multiplied in each walk. A Krylov space of the same dimension takes fewer walks with more of
            them, and shows the spectrum less well.
        seed: of the vectors that it starts from.
    """

    def __init__(
        self,
        rank: int = 50,
        matrix: Literal["ggn", "hessian"] = "ggn",
        *,
        iterations: int | None = None,
        block_size: int = 1,
        seed: int = 0,
    ) -> None:
        if matrix not in ("ggn", "hessian"):
            raise CurvatureError("unknown matrix", expected='"ggn" or "hessian"', found=repr(matrix), hint="choose one")
        if rank < 1 or block_size < 1 or (iterations is not None and iterations * block_size < rank):
            raise CurvatureError(
                "a Krylov space of these dimensions does not hold so many eigenpairs",
                expected="rank and block_size of at least 1, and iterations * block_size >= rank",
                found=f"rank={rank}, iterations={iterations}, block_size={block_size}",
                hint="leave iterations out, or raise it to twice the rank over the block size",
            )
        self.rank, self.matrix, self.block_size, self.seed = rank, matrix, block_size, seed
        self.iterations = -(-(2 * rank + 10) // block_size) if iterations is None else iterations

    @property
    def name(self) -> str:  # type: ignore[override]
        """What its artifacts are called: `low_rank_` and the matrix."""
        return f"low_rank_{self.matrix}"

    @property
    def uses_labels(self) -> bool:
        """False."""
        return False

    @property
    def stands_for(self) -> Literal["hessian", "ggn"]:
        """The matrix that was asked for."""
        return self.matrix

    def collect(self, evidence: Evidence) -> LowRankCurvature:
        """The eigenpairs; fewer than `rank` where the others are zero."""
        parameters = evidence.selection.parameters
        space = ParameterSpace({name: tuple(p.shape) for name, p in parameters.items()})
        some = next(iter(parameters.values()))
        like = torch.empty(0, dtype=accumulation_dtype(*parameters.values()), device=some.device)
        dimension = min(space.size, self.iterations * self.block_size)
        krylov = _Krylov(evidence.operator(self.matrix).matvec, space.size, dimension, like, self.seed)
        krylov.grow(self.block_size)
        pairs = krylov.largest(self.rank, space.names[0])
        return LowRankCurvature(space, pairs)


@dataclass(frozen=True)
class EigenPairs:
    """Eigenpairs of a symmetric matrix, |λ| descending.

    Attributes:
        values: λ, (r,).
        vectors: U, one a row, orthonormal, (r, P).
        residuals: ‖H u − λ u‖ of each, (r,): how far it is from an eigenpair.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class LowRankCurvature(Curvature):
    """H = Uᵀ Λ U + weight decay: in the complement of U there is no curvature but that of the decay.

    So (H + λI)⁻¹ divides by λᵢ + decay + λ in the span of U and by decay + λ outside, exactly, also where the decay
    differs among the parameters. With neither decay nor damping the inverse is that of the span: components outside are
    dropped, as Schioppa et al. (2022) do.

    Attributes:
        pairs: U and Λ, without weight decay.
        decay: weight decay by parameter name.
    """

    kind = "low_rank"

    def __init__(self, space: ParameterSpace, pairs: EigenPairs, decay: Mapping[str, float] | None = None) -> None:
        self._space, self.pairs, self.decay = space, pairs, dict(decay or {})
        self._last: tuple[float, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """All that U spans."""
        return self._space.names

    @property
    def mean_eigenvalue(self) -> float:
        """Σ |λ| / P, the complement counted as 0 and weight decay apart: the scale of a relative damping."""
        return float(self.pairs.values.double().abs().sum()) / self._space.size

    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """H[rows, columns] v; every row knows every column."""
        chosen = self._chosen(v, columns)
        wanted = self._wanted(chosen, rows)
        flat = self._space.rows(chosen, self.pairs.values)
        values, vectors = self.pairs.values.to(flat), self.pairs.vectors.to(flat)
        product = (flat @ vectors.T * values) @ vectors + self._space.diagonal(self.decay, flat) * flat
        return self._space.named(product, wanted, chosen)

    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """(H + λI)⁻¹ v; H may be indefinite.

        Raises:
            CurvatureError: v lacks a parameter; H + λI is singular.
        """
        chosen = self._chosen(v, None)
        self._space.check_complete(chosen)
        flat = self._space.rows(chosen, self.pairs.values)
        shift = damping.of(self.mean_eigenvalue)
        floor = self._space.diagonal(self.decay, self.pairs.values) + shift
        if not bool(floor.any()) and len(self.pairs.values):
            vectors = self.pairs.vectors.to(flat)
            solved = (flat @ vectors.T / self.pairs.values.to(flat)) @ vectors
        else:
            root, basis, divisors = (part.to(flat) for part in self._whitened(floor, shift))
            flat = flat / root
            inside = flat @ basis.T
            solved = (flat - inside @ basis + (inside / divisors) @ basis) / root
        return self._space.named(solved, tuple(chosen), chosen)

    def _whitened(self, floor: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """√D (P,), eigenvectors (r, P) of D^-½ Uᵀ Λ U D^-½ and 1 + its eigenvalues (r,), for D = diag(floor)."""
        if self._last is not None and self._last[0] == shift:
            return self._last[1]
        if not bool((floor > 0).all()):
            bare = [name for name in self.parameters if not self.decay.get(name, 0.0)]
            raise CurvatureError(
                "a curvature of low rank cannot be inverted where it has neither weight decay nor damping",
                expected="weight decay on every parameter, or a positive damping",
                found=f"neither on {', '.join(bare)}",
                hint="pass a positive damping=",
            )
        root = floor.sqrt()
        if not len(self.pairs.values):
            return root, self.pairs.vectors, self.pairs.values
        orthogonal, triangle = torch.linalg.qr((self.pairs.vectors / root).T)  # (P, r), (r, r)
        values, rotation = eigen((triangle * self.pairs.values) @ triangle.T, self.parameters[0])
        divisors = 1 + values
        if not bool(divisors.abs().min() > _ROUNDING * torch.finfo(values.dtype).eps * divisors.abs().max()):
            raise CurvatureError(
                "a curvature of low rank cannot be inverted with this damping",
                expected="a damping that is not the negative of an eigenvalue",
                found=f"damping {shift:.6g} and eigenvalues from {float(self.pairs.values.min()):.6g} to "
                f"{float(self.pairs.values.max()):.6g}",
                hint='pass another damping=, or take matrix="ggn", which has no negative eigenvalues',
            )
        self._last = (shift, (root, (orthogonal @ rotation).T, divisors))
        return self._last[1]

    def shifts(self, damping: Damping) -> dict[str, float]:
        """λ of every parameter, the same for all."""
        return dict.fromkeys(self.parameters, damping.of(self.mean_eigenvalue))

    def decayed(self, decay: Mapping[str, float]) -> LowRankCurvature:
        """H with weight decay, by parameter name, on its diagonal."""
        total = {name: self.decay.get(name, 0.0) + decay.get(name, 0.0) for name in self.parameters}
        return LowRankCurvature(self._space, self.pairs, {name: value for name, value in total.items() if value})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The eigenpairs, the shapes and the decay."""
        tensors = {"values": self.pairs.values, "vectors": self.pairs.vectors, "residuals": self.pairs.residuals}
        shapes = [[name, list(shape)] for name, shape in self._space.shapes.items()]
        return tensors, {"shapes": shapes, "decay": self.decay}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRankCurvature:
        """The curvature that `state` described."""
        space = ParameterSpace({str(name): tuple(int(size) for size in shape) for name, shape in config["shapes"]})
        pairs = EigenPairs(tensors["values"], tensors["vectors"], tensors["residuals"])
        return cls(space, pairs, {str(name): float(value) for name, value in config["decay"].items()})


class _Krylov:
    """An orthonormal basis that grows by the products of what it holds, and H projected on it.

    Args:
        matvec: product with H.
        size: P.
        dimension: vectors at most.
        like: type and device.
        seed: of random vectors, drawn on the CPU.
    """

    def __init__(self, matvec: MatVec, size: int, dimension: int, like: Tensor, seed: int) -> None:
        self._matvec, self._generator = matvec, torch.Generator().manual_seed(seed)
        self._basis = like.new_zeros(dimension, size)
        self._filled = 0
        self._projected = torch.zeros(dimension, dimension, dtype=torch.float64, device=like.device)
        self._scale = 0.0  # of the largest product
        self._left: list[tuple[int, Tensor]] = []  # from which vector on, what of their products lies outside the basis

    @property
    def _known(self) -> Tensor:
        return self._basis[: self._filled]

    def grow(self, block_size: int) -> None:
        """Multiply block by block until the basis is full or the rest of the space is flat."""
        block, drawn = self._random(block_size), True
        while len(block):
            start, self._filled = self._filled, self._filled + len(block)
            self._basis[start : self._filled] = block
            image = self._matvec(block)  # (b, P)
            self._projected[: self._filled, start : self._filled] = (self._known @ image.T).double()
            largest = float(torch.linalg.vector_norm(image, dim=1).max())
            self._scale = max(self._scale, largest)
            if drawn and start and self._is_nothing(largest):
                return  # a random vector, orthogonal to all that was found, has no curvature: nothing else has
            left = self._outside(image)
            block = self._directions(left)
            left = left - (left @ block.T) @ block
            if not self._is_nothing(float(torch.linalg.vector_norm(left, dim=1).max())):
                self._left.append((start, left))
            if drawn := not len(block):
                block = self._random(block_size)

    def largest(self, rank: int, owner: str) -> EigenPairs:
        """The eigenpairs of the projection with largest |λ|, those that are nothing left out."""
        upper = torch.triu(self._projected[: self._filled, : self._filled])
        values, rotation = eigen(upper + torch.triu(upper, 1).T, owner)
        order = values.abs().argsort(descending=True)[:rank]
        order = order[values[order].abs() > _ROUNDING * self._eps * self._scale]
        values, rotation = values[order], rotation[:, order].to(self._basis)  # (m, r)
        vectors = rotation.T @ self._known
        left = torch.zeros_like(vectors)  # H u − λ u, (r, P)
        for start, rows in self._left:
            left += rotation[start : start + len(rows)].T @ rows
        return EigenPairs(values.to(self._basis), vectors, torch.linalg.vector_norm(left, dim=1))

    @property
    def _eps(self) -> float:
        return torch.finfo(self._basis.dtype).eps

    def _is_nothing(self, norm: float) -> bool:
        return norm <= _ROUNDING * self._eps * self._scale

    def _outside(self, rows: Tensor) -> Tensor:
        """Rows without their part in the basis, up to rounding errors of their own size."""
        return rows - (rows @ self._known.T) @ self._known

    def _directions(self, rows: Tensor) -> Tensor:
        """Orthonormal rows that span what is more than rounding in `rows`, as many as there is room for."""
        room = len(self._basis) - self._filled
        kept: list[Tensor] = []
        for row in rows[:room]:
            for _ in range(2):
                for other in kept:
                    row = row - (other @ row) * other
            if not self._is_nothing(float(torch.linalg.vector_norm(row))):
                # Once more: at unit length, the rounding errors of a row that was short are not small.
                row = self._outside(F.normalize(row, dim=0).unsqueeze(0)).squeeze(0)
                kept.append(F.normalize(row, dim=0))
        return torch.stack(kept) if kept else rows[:0]

    def _random(self, count: int) -> Tensor:
        """Random orthonormal rows, orthogonal to the basis."""
        count = min(count, len(self._basis) - self._filled)
        draw = torch.randn(count, self._basis.shape[1], generator=self._generator, dtype=torch.float64)
        rows = self._outside(draw.to(self._basis))
        orthogonal: Tensor = torch.linalg.qr(rows.T)[0]
        return orthogonal.T.contiguous()
