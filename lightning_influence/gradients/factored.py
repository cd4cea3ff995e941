"""Gradients of a weight that is used in products, held as the factors of their outer products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients.blocks import (
    Dense,
    GradientBlock,
    accumulation_dtype,
    spans,
    tensor_is_finite,
)


class Factored(GradientBlock):
    """∂ℓ_n/∂W = Σ_t output_grads[n,t] ⊗ inputs[n,t], never written out unless that is cheaper.

    Args:
        inputs: (N, T, I), what the layer saw at every position.
        output_grads: (N, T, O), the gradient at the layer's output.
        shape: shape of the parameter, with ``shape[0] == O`` and the rest multiplying to I; default (O, I).
    """

    kind = "factored"

    def __init__(self, inputs: Tensor, output_grads: Tensor, shape: Sequence[int] | None = None) -> None:
        if inputs.dim() != 3 or output_grads.dim() != 3 or inputs.shape[:2] != output_grads.shape[:2]:
            raise ValueError(
                f"factors must be (N, T, I) and (N, T, O), not {tuple(inputs.shape)} and {tuple(output_grads.shape)}"
            )
        self.inputs, self.output_grads = inputs, output_grads
        self._shape = tuple(shape) if shape is not None else (output_grads.shape[2], inputs.shape[2])
        if self._shape[0] != output_grads.shape[2] or math.prod(self._shape[1:]) != inputs.shape[2]:
            raise ValueError(f"factors {tuple(inputs.shape)}, {tuple(output_grads.shape)} do not make {self._shape}")

    @property
    def num_samples(self) -> int:
        return self.inputs.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.inputs.dtype, self.output_grads.dtype)

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Both factors in the accumulation type."""
        kind = accumulation_dtype(self.inputs, self.output_grads)
        return self.inputs.to(kind), self.output_grads.to(kind)

    def dense(self) -> Tensor:
        inputs, output_grads = self._factors()
        return torch.bmm(output_grads.transpose(1, 2), inputs).view(-1, *self._shape)  # (N, O, I)

    def compact(self) -> GradientBlock:
        """Dense if that holds fewer numbers, else the block itself."""
        _, positions, width = self.inputs.shape
        height = self.output_grads.shape[2]
        return Dense(self.dense().to(self.dtype)) if height * width <= positions * (height + width) else self

    def sum(self) -> Tensor:
        inputs, output_grads = self._factors()
        return (output_grads.flatten(0, 1).T @ inputs.flatten(0, 1)).view(self._shape)

    def inner(self, query: GradientBlock) -> Tensor:
        """Σ_{t,s} (inputs·inputs)(output_grads·output_grads), or dense products where those cost less."""
        if not isinstance(query, Factored):
            return super().inner(query)
        self._check_alike(query)
        n, t, width = self.inputs.shape
        q, s, height = query.output_grads.shape
        if q * n * t * s * (width + height) > (n * t + q * s + q * n) * width * height:
            return super().inner(query)
        kind = accumulation_dtype(self.inputs, self.output_grads, query.inputs, query.output_grads)
        query_inputs, query_grads = query.inputs.to(kind), query.output_grads.to(kind)
        out = torch.empty(q, n, dtype=kind, device=self.device)
        for mine in spans(n, s * t):
            inputs = self.inputs[mine].to(kind).flatten(0, 1).T  # (I, nT)
            grads = self.output_grads[mine].to(kind).flatten(0, 1).T  # (O, nT)
            for theirs in spans(q, s * inputs.shape[1]):
                products = query_inputs[theirs].flatten(0, 1) @ inputs  # (qS, nT)
                products *= query_grads[theirs].flatten(0, 1) @ grads
                out[theirs, mine] = products.view(-1, s, mine.stop - mine.start, t).sum((1, 3))
        return out

    def pairwise(self, other: GradientBlock) -> Tensor:
        if not isinstance(other, Factored):
            return super().pairwise(other)
        self._check_alike(other, same_samples=True)
        t, width = self.inputs.shape[1:]
        s, height = other.output_grads.shape[1:]
        if t * s * (width + height) > (t + s + 1) * width * height:
            return super().pairwise(other)
        kind = accumulation_dtype(self.inputs, self.output_grads, other.inputs, other.output_grads)
        products = torch.bmm(self.inputs.to(kind), other.inputs.to(kind).transpose(1, 2))  # (N, T, S)
        products *= torch.bmm(self.output_grads.to(kind), other.output_grads.to(kind).transpose(1, 2))
        return products.sum((1, 2))

    def plus(self, other: GradientBlock) -> GradientBlock:
        if not isinstance(other, Factored):
            return super().plus(other)
        self._check_alike(other, same_samples=True)
        inputs = torch.cat([self.inputs, other.inputs], 1)
        return Factored(inputs, torch.cat([self.output_grads, other.output_grads], 1), self._shape).compact()

    def select(self, index: Tensor) -> Factored:
        index = index.to(self.device)
        return Factored(self.inputs[index], self.output_grads[index], self._shape)

    def scaled(self, weights: Tensor) -> Factored:
        weights = weights.to(self.device, accumulation_dtype(self.output_grads)).view(-1, 1, 1)
        return Factored(self.inputs, (self.output_grads * weights).to(self.output_grads.dtype), self._shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factored:
        device = device or self.device
        return Factored(
            self.inputs.to(device=device, dtype=dtype or self.inputs.dtype),
            self.output_grads.to(device=device, dtype=dtype or self.output_grads.dtype),
            self._shape,
        )

    def tensors(self) -> dict[str, Tensor]:
        shape = torch.tensor(self._shape, dtype=torch.int64)
        return {"inputs": self.inputs, "output_grads": self.output_grads, "shape": shape}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Factored:
        return cls(tensors["inputs"], tensors["output_grads"], [int(size) for size in tensors["shape"]])

    @classmethod
    def join(cls, blocks: Sequence[Factored]) -> Factored:
        longest = max(block.inputs.shape[1] for block in blocks)

        def padded(factor: Tensor) -> Tensor:
            return torch.nn.functional.pad(factor, (0, 0, 0, longest - factor.shape[1]))

        return cls(
            torch.cat([padded(block.inputs) for block in blocks]),
            torch.cat([padded(block.output_grads) for block in blocks]),
            blocks[0].shape,
        )

    def all_finite(self) -> bool:
        return tensor_is_finite(self.inputs) and tensor_is_finite(self.output_grads)

    def nbytes(self) -> int:
        return self.inputs.nbytes + self.output_grads.nbytes
