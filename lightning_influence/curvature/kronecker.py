"""K-FAC and EK-FAC: the curvature of a matrix as a Kronecker product of what goes in and what comes back.

Per layer, with a the inputs (1 appended for a bias) and g the output gradients at each position t of a sample:

    K-FAC     H ≈ A ⊗ G,  A = mean over positions of a aᵀ,  G = (1/N) Σ_n Σ_t g gᵀ
    EK-FAC    H ≈ (Q_A ⊗ Q_G) diag(Λ) (Q_A ⊗ Q_G)ᵀ,  Λ = (1/N) Σ_n (Q_Gᵀ ∇W ℓ_n Q_A)²

(Martens & Grosse 2015, 1503.05671; George et al. 2018, 1806.03884.)

Q_A, Q_G are the eigenvectors of A and G. Λ is taken over the gradients of whole samples, with labels drawn afresh.
Positions to which no gradient comes under any label (padding) do not count in A: it would depend on the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.block_diagonal import BlockDiagonal, CurvatureBlock, expect_shapes, shifted
from lightning_influence.curvature.curvature import (
    Accumulator,
    Curvature,
    CurvatureStatistics,
    Evidence,
    OnePass,
    nothing_seen,
)
from lightning_influence.curvature.eigen import eigen
from lightning_influence.curvature.layout import LayerBlock, layer_blocks
from lightning_influence.curvature.rotation import Rotation, pieces
from lightning_influence.curvature.whole import WholeSums
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Gradients, Rows, Selection


class KroneckerBlock(CurvatureBlock):
    """H = (Q_A ⊗ Q_G) diag(Λ) (Q_A ⊗ Q_G)ᵀ of a weight and its bias.

    Args:
        names: weight, and bias if there is one.
        rotation: Q_A (G, I, I) and Q_G (G, O, O) of each of the G groups, and how the parameters lie in (G, O, I).
        eigenvalues: Λ (G, O, I), without weight decay.
        decay: weight decay.
    """

    kind = "kronecker"
    decays_as_one = True

    def __init__(self, names: Sequence[str], rotation: Rotation, eigenvalues: Tensor, decay: float = 0.0) -> None:
        self.names, self.rotation, self.eigenvalues, self.decay = tuple(names), rotation, eigenvalues, decay

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of weight and bias."""
        groups, outputs, _ = self.eigenvalues.shape
        return dict(zip(self.names, (self.rotation.shape, (groups * outputs,)), strict=False))

    @property
    def mean_eigenvalue(self) -> float:
        """mean(Λ)."""
        return float(self.eigenvalues.double().mean())

    def matvec(self, v: Gradients) -> Gradients:
        """Q_G[(Q_Gᵀ V Q_A) · (Λ + decay)]Q_Aᵀ."""
        return self.rotation.scaled(v, self.names, self.eigenvalues + self.decay)

    def solve(self, v: Gradients, damping: float) -> Gradients:
        """Q_G[(Q_Gᵀ V Q_A) / (Λ + decay + λ)]Q_Aᵀ."""
        divisors = shifted(self.eigenvalues, self.decay + damping, self.names)
        return self.rotation.scaled(v, self.names, divisors.reciprocal())

    def decayed(self, decay: Mapping[str, float]) -> KroneckerBlock:
        """With the weight's decay: a bias that decays otherwise has no place of its own in the eigenbasis."""
        return KroneckerBlock(self.names, self.rotation, self.eigenvalues, self.decay + decay.get(self.names[0], 0.0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases, eigenvalues, and the layout."""
        tensors, facts = self.rotation.state()
        return {**tensors, "eigenvalues": self.eigenvalues}, {**facts, "decay": self.decay}

    @classmethod
    def load(cls, names: tuple[str, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> KroneckerBlock:
        """The block that `state` described."""
        rotation, eigenvalues = Rotation.load(tensors, config), tensors["eigenvalues"]
        groups, outputs, inputs = eigenvalues.shape
        expect_shapes(tensors, {"inputs": (groups, inputs, inputs), "outputs": (groups, outputs, outputs)})
        if math.prod(rotation.shape) != groups * outputs * (inputs - rotation.bias) or len(names) != 1 + rotation.bias:
            raise ValueError(f"{eigenvalues.numel()} eigenvalues for {', '.join(names)} of shape {rotation.shape}")
        return cls(names, rotation, eigenvalues, float(config["decay"]))


class RowsBlock(CurvatureBlock):
    """H of a look-up table (V, D): words do not meet, and each has eigenvalues in a basis that all share.

    A is the diagonal of word frequencies, so nothing of size V × V exists; vectors that touch few words stay so.

    Args:
        names: the embedding weight.
        basis: Q_G (D, D).
        eigenvalues: Λ (V, D), without weight decay.
        decay: weight decay.
    """

    kind = "rows"

    def __init__(self, names: Sequence[str], basis: Tensor, eigenvalues: Tensor, decay: float = 0.0) -> None:
        self.names, self.basis, self.eigenvalues, self.decay = tuple(names), basis, eigenvalues, decay

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the weight."""
        return {self.names[0]: tuple(self.eigenvalues.shape)}

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over the words that occurred: the others have no curvature, and no gradient either."""
        occurred = self.eigenvalues.double().sum(1) > 0
        return float(self.eigenvalues[occurred].double().mean()) if bool(occurred.any()) else 0.0

    def matvec(self, v: Gradients) -> Gradients:
        """(V Q_G · (Λ + decay)) Q_Gᵀ, row by row."""
        return self._scaled(v, self.eigenvalues + self.decay)

    def solve(self, v: Gradients, damping: float) -> Gradients:
        """(V Q_G / (Λ + decay + λ)) Q_Gᵀ, row by row."""
        return self._scaled(v, shifted(self.eigenvalues, self.decay + damping, self.names).reciprocal())

    def _scaled(self, v: Gradients, factors: Tensor) -> Gradients:
        (name,) = self.names
        block = v[name]
        kind = torch.promote_types(block.dtype, factors.dtype)
        basis, factors = self.basis.to(block.device, kind), factors.to(block.device, kind)
        if isinstance(block, Rows):
            values = ((block.values.to(kind) @ basis) * factors[block.words]) @ basis.T  # (M, D)
            return {name: Rows(block.words, block.owners, values, block.num_samples, block.num_words)}
        return pieces({name: ((block.dense().to(kind) @ basis) * factors) @ basis.T})

    def decayed(self, decay: Mapping[str, float]) -> RowsBlock:
        """With weight decay on the diagonal."""
        return RowsBlock(self.names, self.basis, self.eigenvalues, self.decay + decay.get(self.names[0], 0.0))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Basis and eigenvalues."""
        return {"basis": self.basis, "eigenvalues": self.eigenvalues}, {"decay": self.decay}

    @classmethod
    def load(cls, names: tuple[str, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> RowsBlock:
        """The block that `state` described."""
        width = tensors["eigenvalues"].shape[1]
        expect_shapes(tensors, {"basis": (width, width)})
        return cls(names, tensors["basis"], tensors["eigenvalues"], float(config["decay"]))


class _MatrixSums:
    """Σ a aᵀ and Σ g gᵀ of one matrix, and in the second pass Σ (Q_Gᵀ ∇W Q_A)²."""

    def __init__(self, block: LayerBlock, gradients: Gradients) -> None:
        self.layout = block
        self.rotation = Rotation.of(block)
        a, g = self.rotation.factors(gradients, block.names)  # (G, N, T, I), (G, N, T, O)
        self.dtype = a.dtype
        width = a.shape[3] + self.rotation.bias  # I
        self.inputs = torch.zeros(len(a), width, width, dtype=torch.float64, device=a.device)
        self.outputs = torch.zeros(g.shape[0], g.shape[3], g.shape[3], dtype=torch.float64, device=g.device)
        self.eigenvalues = torch.zeros(len(g), g.shape[3], width, dtype=torch.float64, device=a.device)
        self.positions = torch.zeros(len(a), 1, 1, dtype=torch.float64, device=a.device)
        self._reached: Tensor | None = None  # (G, NT), positions of this batch that some column has a gradient at

    def add_column(self, gradients: Gradients) -> None:
        """Add the output gradients of one column; positions without any, such as padding, will not count in A."""
        g = self.rotation.factors(gradients, self.layout.names)[1]
        flat = g.flatten(1, 2)  # (G, NT, O)
        self.outputs += flat.transpose(1, 2) @ flat
        if g.shape[2] > 1:
            reached = torch.linalg.vector_norm(flat, dim=2) > 0  # many times faster than any()
            self._reached = reached if self._reached is None else self._reached | reached

    def end_batch(self, gradients: Gradients) -> None:
        """Add the inputs of a batch, which are those of any of its columns, once."""
        a = self.rotation.factors(gradients, self.layout.names)[0]  # (G, N, T, I)
        counted, self._reached = self._reached, None
        if counted is not None and bool(counted.all()):
            counted = None
        self.inputs += self.rotation.input_products(a, counted)
        self.positions += a.shape[1] * a.shape[2] if counted is None else counted.sum(1).view(-1, 1, 1)

    def _reduced(self, evidence: Evidence, num_samples: int) -> tuple[Tensor, Tensor]:
        """A and G of all processes."""
        a, g, count = (evidence.reduce(t) for t in (self.inputs, self.outputs, self.positions))
        return a / count.clamp_min(1), g / num_samples

    def rotate(self, evidence: Evidence, num_samples: int) -> tuple[Tensor, Tensor]:
        """Fix the bases; returns the eigenvalues of A (G, I) and of G (G, O)."""
        a, g = self._reduced(evidence, num_samples)
        owner = self.layout.names[0]
        of_inputs, q_a = eigen(a, owner, self.dtype)
        of_outputs, q_g = eigen(g, owner, self.dtype)
        self.rotation = self.rotation.with_bases(evidence.broadcast(q_a), evidence.broadcast(q_g))
        return of_inputs.clamp_min(0), of_outputs.clamp_min(0)

    def add_eigenvalues(self, gradients: Gradients) -> None:
        """Add (Q_Gᵀ ∇W ℓ_n Q_A)² of every sample."""
        self.eigenvalues += self.rotation.squares(gradients, self.layout.names)

    def block(self, eigenvalues: Tensor) -> CurvatureBlock:
        return KroneckerBlock(self.layout.names, self.rotation, eigenvalues.to(self.dtype))


class _RowsSums:
    """Word counts and Σ g gᵀ of a look-up, and in the second pass Σ (Q_Gᵀ g_w)² by word."""

    def __init__(self, block: LayerBlock, gradients: Gradients) -> None:
        self.layout = block
        rows = self._rows(gradients)
        words, width = rows.shape
        device = rows.device
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        self.counts = torch.zeros(words, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.eigenvalues = torch.zeros(words, width, dtype=torch.float64, device=device)
        self.basis = torch.eye(width, dtype=self.dtype, device=device)
        self._reached: Tensor | None = None  # (M,), rows of this batch that some column has a gradient at

    def _rows(self, gradients: Gradients) -> Rows:
        rows = gradients[self.layout.names[0]]
        assert isinstance(rows, Rows)
        return rows

    def add_column(self, gradients: Gradients) -> None:
        """Add a column; repeated words of a sample are one position, with their gradients summed."""
        values = self._rows(gradients).values.to(self.dtype)
        self.outputs += values.T @ values
        reached = (values != 0).any(1)
        self._reached = reached if self._reached is None else self._reached | reached

    def end_batch(self, gradients: Gradients) -> None:
        """Count the words of a batch, which are those of any of its columns, once."""
        assert self._reached is not None
        self.counts += torch.bincount(self._rows(gradients).words[self._reached], minlength=len(self.counts))
        self._reached = None

    def rotate(self, evidence: Evidence, num_samples: int) -> tuple[Tensor, Tensor]:
        counts, g = evidence.reduce(self.counts), evidence.reduce(self.outputs) / num_samples
        of_outputs, basis = eigen(g, self.layout.names[0], self.dtype)
        self.basis = evidence.broadcast(basis)
        return counts / counts.sum().clamp_min(1), of_outputs.clamp_min(0)

    def add_eigenvalues(self, gradients: Gradients) -> None:
        rows = self._rows(gradients)
        squares = (rows.values.to(self.dtype) @ self.basis).square_()
        self.eigenvalues.index_add_(0, rows.words, squares.double())

    def block(self, eigenvalues: Tensor) -> CurvatureBlock:
        return RowsBlock(self.layout.names, self.basis, eigenvalues.to(self.dtype))


class _Factors(Accumulator):
    """The first pass over all layers: covariances, and whatever small parameters need."""

    def __init__(self, selection: Selection, exact_up_to: int, statistics: str) -> None:
        self._selection, self._exact_up_to, self._statistics = selection, exact_up_to, statistics
        self.layers: list[_MatrixSums | _RowsSums | WholeSums] | None = None

    def update(self, columns: Iterator[Gradients]) -> None:
        last: Gradients | None = None
        for gradients in columns:
            if self.layers is None:
                self.layers = [self._sums(block, gradients) for block in layer_blocks(self._selection, gradients)]
            for layer in self.layers:
                layer.add_column(gradients)
            last = gradients
        if last is not None:
            for layer in self.known():
                layer.end_batch(last)

    def finish(self, evidence: Evidence, num_samples: int) -> Curvature:
        """K-FAC: Λ = λ_A λ_Gᵀ."""
        blocks: list[CurvatureBlock] = []
        for layer in self.known():
            if isinstance(layer, WholeSums):
                blocks += layer.blocks(evidence, num_samples)
                continue
            of_inputs, of_outputs = layer.rotate(evidence, num_samples)
            if isinstance(layer, _RowsSums):
                blocks.append(layer.block(of_inputs[:, None].to(of_outputs) * of_outputs[None]))
            else:
                blocks.append(layer.block(of_outputs[:, :, None] * of_inputs[:, None, :]))
        return BlockDiagonal(blocks)

    def known(self) -> list[_MatrixSums | _RowsSums | WholeSums]:
        """The layers, which the first batch showed."""
        if self.layers is None:
            raise nothing_seen()
        return self.layers

    def _sums(self, block: LayerBlock, gradients: Gradients) -> _MatrixSums | _RowsSums | WholeSums:
        if block.form == "matrix":
            return _MatrixSums(block, gradients)
        if block.form == "rows":
            return _RowsSums(block, gradients)
        if block.numel > self._exact_up_to and any(len(shape) > 1 for shape in block.shapes):
            raise CurvatureError(
                f"{self._statistics} has no form for {', '.join(block.names)}",
                expected="Linear, Conv1d/2d/3d, Embedding or MultiheadAttention layers, and small parameters",
                found=f"gradients of shape {' and '.join(map(str, block.shapes))} in one piece",
                hint="leave these parameters out of CurvatureSnapshot(parameters=...), or use Diagonal(), LowRank() "
                "or InfluenceFunction(curvature=MatrixFree())",
            )
        return WholeSums(block, self._exact_up_to)


class KFAC(OnePass):
    """Kronecker-factored curvature: one pass over the training set (Martens & Grosse 2015, 1503.05671).

        H ≈ A ⊗ G,  A = mean over positions of a aᵀ,  G = (1/N) Σ_n Σ_t g gᵀ

    with a the inputs of a layer (1 appended for its bias) and g the gradients at its output. Positions without a
    gradient, such as padding, do not count.

    Serves Linear, Conv1d/2d/3d (groups kept apart), Embedding and MultiheadAttention (its packed projection as three
    groups); the other parameters of a layer (LayerNorm) exactly where they are few, else by their diagonal.

    Args:
        exact_up_to: number of weights up to which the parameters of other layers get a whole matrix.

    Raises:
        CurvatureError: when it is collected: a layer with a weight matrix and without a Kronecker form, named.
    """

    name = "kfac"

    def __init__(self, *, exact_up_to: int = 512) -> None:
        self.exact_up_to = exact_up_to

    def accumulator(self, selection: Selection) -> Accumulator:
        """Sums of covariances."""
        return _Factors(selection, self.exact_up_to, type(self).__name__)


class EKFAC(CurvatureStatistics):
    """Eigenvalue-corrected K-FAC: a second pass measures the curvature along the eigenvectors of the first
    (George et al. 2018, 1806.03884; for influence: Grosse et al. 2023, 2308.03296).

        H ≈ (Q_A ⊗ Q_G) diag(Λ) (Q_A ⊗ Q_G)ᵀ,  Λ = (1/N) Σ_n (Q_Gᵀ ∇W ℓ_n Q_A)²

    with Q_A, Q_G the eigenvectors of K-FAC's A and G, and the gradients of whole samples.

    Args:
        exact_up_to: as in `KFAC`.

    Raises:
        CurvatureError: as `KFAC`.
    """

    name = "ekfac"

    def __init__(self, *, exact_up_to: int = 512) -> None:
        self.exact_up_to = exact_up_to

    def collect(self, evidence: Evidence) -> Curvature:
        """Bases from the first pass, eigenvalues from the second, with fresh labels."""
        factors = _Factors(evidence.selection, self.exact_up_to, type(self).__name__)
        evidence.visit(0, factors.update)
        rotated = [layer for layer in factors.known() if not isinstance(layer, WholeSums)]
        for layer in rotated:
            layer.rotate(evidence, evidence.num_samples)

        def measure(columns: Iterator[Gradients]) -> None:
            for gradients in columns:
                for layer in rotated:
                    layer.add_eigenvalues(gradients)

        evidence.visit(1, measure)
        blocks: list[CurvatureBlock] = []
        for each in factors.known():
            if isinstance(each, WholeSums):
                blocks += each.blocks(evidence, evidence.num_samples)
            else:
                blocks.append(each.block(evidence.reduce(each.eigenvalues) / evidence.num_samples))
        return BlockDiagonal(blocks)
