"""LowRankGradients: queries' gradients of a weight as products of two thin factors, to contract without forming one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_influence.gradients.blocks import (
    CHUNK_ELEMENTS,
    GradientBlock,
    accumulation_dtype,
    spans,
    tensor_is_finite,
)

if TYPE_CHECKING:
    from lightning_influence.gradients.factored import Factored

_EXACT = 512  # shorter side up to which singular vectors are computed exactly
_OVERSAMPLED, _POWERS = 16, 2  # of the randomised range finder (Halko, Martinsson & Tropp 2011, 0909.4061)


class LowRankGradients(GradientBlock):
    """∇m_q ≈ Σ_r left[q,r] ⊗ right[q,r], the R largest singular triplets: for queries, which are not stored.

    Args:
        left: (Q, R, O), for the first dimension of the parameter.
        right: (Q, R, I), for all others.
        shape: (O, ...), the rest multiplying to I; default (O, I).
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int] | None = None) -> None:
        if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
            raise ValueError(f"factors must be (Q, R, O) and (Q, R, I), not {tuple(left.shape)}, {tuple(right.shape)}")
        self.left, self.right = left, right
        self._shape = tuple(shape) if shape is not None else (left.shape[2], right.shape[2])
        if self._shape[0] != left.shape[2] or math.prod(self._shape[1:]) != right.shape[2]:
            raise ValueError(f"factors {tuple(left.shape)}, {tuple(right.shape)} do not make {self._shape}")

    @classmethod
    def of(cls, block: GradientBlock, rank: int) -> LowRankGradients:
        """The best approximation of this rank to every gradient of a matrix-like parameter.

        Large matrices are decomposed by a seeded randomised range finder, so every process finds the same.
        """
        dense = block.dense().flatten(2)  # (Q, O, I)
        parts = [_decomposed(dense[i : i + 1], rank) for i in range(len(dense))]
        shorter = min(rank, *dense.shape[1:])
        left = torch.cat([left for left, _ in parts]) if parts else dense.new_zeros(0, shorter, dense.shape[1])
        right = torch.cat([right for _, right in parts]) if parts else dense.new_zeros(0, shorter, dense.shape[2])
        return cls(left.contiguous(), right.contiguous(), block.shape)

    @property
    def num_samples(self) -> int:
        return self.left.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    def dense(self) -> Tensor:
        kind = accumulation_dtype(self.left, self.right)
        return torch.bmm(self.left.to(kind).transpose(1, 2), self.right.to(kind)).view(-1, *self._shape)

    def against_factors(self, train: Factored) -> Tensor:
        """Σ_t Σ_r (left · output_grads)(right · inputs), (Q, N), or products of written-out gradients where those take
        fewer operations, a few queries at a time."""
        self._check_alike(train)
        n, t, width = train.inputs.shape
        height, size = train.output_grads.shape[2], math.prod(self._shape)
        formed = n * t * size + self.num_samples * size * (n + self.rank * -(-n // _at_a_time(size)))
        if self.num_samples * self.rank * n * t * (width + height) > formed:
            return self._against_formed(train)
        kind = accumulation_dtype(self.left, self.right, train.inputs, train.output_grads)
        groups = (train.groups, -1)
        left = torch.unflatten(self.left.to(kind), 2, groups).permute(2, 0, 1, 3)  # (G, Q, R, O)
        right = self.right.to(kind)
        out = torch.empty(self.num_samples, n, dtype=kind, device=self.device)
        for mine in spans(n, self.rank * t):
            inputs = torch.unflatten(train.inputs[mine].to(self.device, kind).flatten(0, 1), 1, groups).permute(1, 2, 0)
            grads = torch.unflatten(train.output_grads[mine].to(self.device, kind).flatten(0, 1), 1, groups).permute(
                1, 2, 0
            )
            for theirs in spans(self.num_samples, train.groups * self.rank * inputs.shape[2]):
                products = right[theirs].flatten(0, 1) @ inputs  # (G, qR, nT)
                products *= left[:, theirs].flatten(1, 2) @ grads
                out[theirs, mine] = products.sum(0).view(-1, self.rank, mine.stop - mine.start, t).sum((1, 3))
        return out

    def _against_formed(self, train: Factored) -> Tensor:
        size = math.prod(self._shape)
        kind = accumulation_dtype(self.left, self.right, train.inputs, train.output_grads)
        out = torch.empty(self.num_samples, train.num_samples, dtype=kind, device=self.device)
        step = _at_a_time(size)
        for start in range(0, train.num_samples, step):
            mine = slice(start, min(start + step, train.num_samples))
            chosen = torch.arange(mine.start, mine.stop)
            formed = train.select(chosen).dense().flatten(1).to(self.device, kind)  # (n, P)
            for theirs in spans(self.num_samples, size):
                whole = LowRankGradients(self.left[theirs], self.right[theirs], self._shape).dense()
                out[theirs, mine] = whole.flatten(1).to(kind) @ formed.T
        return out

    def select(self, index: Tensor) -> LowRankGradients:
        index = index.to(self.device)
        return LowRankGradients(self.left[index], self.right[index], self._shape)

    def scaled(self, weights: Tensor) -> LowRankGradients:
        weights = weights.to(self.device, accumulation_dtype(self.left)).view(-1, 1, 1)
        return LowRankGradients((self.left * weights).to(self.left.dtype), self.right, self._shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRankGradients:
        device = device or self.device
        return LowRankGradients(
            self.left.to(device=device, dtype=dtype or self.left.dtype),
            self.right.to(device=device, dtype=dtype or self.right.dtype),
            self._shape,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "shape": torch.tensor(self._shape)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRankGradients:
        return cls(tensors["left"], tensors["right"], [int(size) for size in tensors["shape"]])

    @classmethod
    def join(cls, blocks: Sequence[LowRankGradients]) -> LowRankGradients:
        highest = max(block.rank for block in blocks)

        def padded(factor: Tensor) -> Tensor:
            return pad(factor, (0, 0, 0, highest - factor.shape[1]))

        left = torch.cat([padded(block.left) for block in blocks])
        return cls(left, torch.cat([padded(block.right) for block in blocks]), blocks[0].shape)

    def all_finite(self) -> bool:
        return tensor_is_finite(self.left) and tensor_is_finite(self.right)

    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


def _at_a_time(size: int) -> int:
    """Training gradients of `size` numbers that are written out together."""
    return max(32, CHUNK_ELEMENTS // max(1, size))


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Thin factors (1, R, O) and (1, R, I) of one matrix (1, O, I), singular values shared evenly between them."""
    shorter = min(matrix.shape[1:])
    if shorter <= _EXACT or 2 * (rank + _OVERSAMPLED) >= shorter:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(matrix.shape[2], rank + _OVERSAMPLED, generator=generator, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
        for _ in range(_POWERS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.transpose(1, 2) @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.transpose(1, 2) @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:, :rank].sqrt()[..., None]  # (1, R, 1)
    return u[:, :, :rank].transpose(1, 2) * root, vh[:, :rank] * root
