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
    join_dense,
    spans,
    tensor_is_finite,
)


class Factored(GradientBlock):
    """∂ℓ_n/∂W = Σ_t output_grads[n,t] ⊗ inputs[n,t], never written out unless that is cheaper.

    The weight of a grouped convolution, and the three projections that an attention keeps in one weight, are G
    such weights on top of each other: group g of the rows multiplies group g of the inputs only.

    Args:
        inputs: (N, T, G·I), what the layer saw at every position, group after group.
        output_grads: (N, T, G·O), the gradient at the layer's output, group after group.
        shape: shape of the parameter, with ``shape[0] == G·O`` and the rest multiplying to I; default (G·O, I).
        groups: G.
    """

    kind = "factored"

    def __init__(
        self, inputs: Tensor, output_grads: Tensor, shape: Sequence[int] | None = None, groups: int = 1
    ) -> None:
        if inputs.dim() != 3 or output_grads.dim() != 3 or inputs.shape[:2] != output_grads.shape[:2]:
            raise ValueError(
                f"factors must be (N, T, I) and (N, T, O), not {tuple(inputs.shape)} and {tuple(output_grads.shape)}"
            )
        width, height = inputs.shape[2], output_grads.shape[2]
        if groups < 1 or width % groups or height % groups:
            raise ValueError(f"factors of {width} and {height} numbers do not fall into {groups} groups")
        self.inputs, self.output_grads, self.groups = inputs, output_grads, groups
        self._shape = tuple(shape) if shape is not None else (height, width // groups)
        if self._shape[0] != height or math.prod(self._shape[1:]) != width // groups:
            raise ValueError(
                f"factors {tuple(inputs.shape)}, {tuple(output_grads.shape)} in {groups} group(s) "
                f"do not make {self._shape}"
            )

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

    def _by_group(self) -> tuple[Tensor, Tensor]:
        """Both factors in the accumulation type, (N, T, G, I) and (N, T, G, O)."""
        inputs, output_grads = self._factors()
        parts = (self.groups, -1)
        return torch.unflatten(inputs, 2, parts), torch.unflatten(output_grads, 2, parts)

    def dense(self) -> Tensor:
        if self.groups > 1:
            inputs, output_grads = self._by_group()
            return torch.einsum("ntgo,ntgi->ngoi", output_grads, inputs).reshape(-1, *self._shape)
        return self.written_out(accumulation_dtype(self.inputs, self.output_grads))

    def written_out(self, dtype: torch.dtype) -> Tensor:
        if self.groups > 1:
            return super().written_out(dtype)
        inputs, output_grads = self.inputs.to(dtype), self.output_grads.to(dtype)
        return torch.bmm(output_grads.transpose(1, 2), inputs).view(-1, *self._shape)  # (N, O, I)

    def compact(self) -> GradientBlock:
        """Dense if that holds fewer numbers, else the block itself."""
        positions = self.inputs.shape[1]
        factors = positions * (self.inputs.shape[2] + self.output_grads.shape[2])  # numbers per sample
        return Dense(self.dense().to(self.dtype)) if math.prod(self._shape) <= factors else self

    def sum(self) -> Tensor:
        if self.groups > 1:
            inputs, output_grads = self._by_group()
            return torch.einsum("ntgo,ntgi->goi", output_grads, inputs).reshape(self._shape)
        inputs, output_grads = self._factors()
        return (output_grads.flatten(0, 1).T @ inputs.flatten(0, 1)).view(self._shape)

    def inner(self, query: GradientBlock) -> Tensor:
        """Σ_{t,s} (inputs·inputs)(output_grads·output_grads), or dense products where those cost less, and for
        groups; a query of another form chooses its own way (`against_factors`)."""
        if not isinstance(query, Factored):
            return query.against_factors(self)
        if self.groups > 1 or query.groups > 1:
            return super().inner(query)
        self._check_alike(query)
        n, t, width = self.inputs.shape
        q, s, height = query.output_grads.shape
        if q * n * t * s * (width + height) > (n * t + q * s + q * n) * width * height:
            return super().inner(query)
        kind = accumulation_dtype(self.inputs, self.output_grads, query.inputs, query.output_grads)
        query_inputs, query_grads = query.inputs.to(kind), query.output_grads.to(kind)
        out = torch.empty(q, n, dtype=kind, device=query.device)
        for mine in spans(n, s * t):
            inputs = self.inputs[mine].to(query.device, kind).flatten(0, 1).T  # (I, nT)
            grads = self.output_grads[mine].to(query.device, kind).flatten(0, 1).T  # (O, nT)
            for theirs in spans(q, s * inputs.shape[1]):
                products = query_inputs[theirs].flatten(0, 1) @ inputs  # (qS, nT)
                products *= query_grads[theirs].flatten(0, 1) @ grads
                out[theirs, mine] = products.view(-1, s, mine.stop - mine.start, t).sum((1, 3))
        return out

    def pairwise(self, other: GradientBlock) -> Tensor:
        if not isinstance(other, Factored):
            return super().pairwise(other)
        self._check_alike(other, same_samples=True)
        if self.groups > 1 or other.groups > 1:
            return self._pairwise_in_chunks(other)
        t, width = self.inputs.shape[1:]
        s, height = other.output_grads.shape[1:]
        if t * s * (width + height) > (t + s + 1) * width * height:
            return super().pairwise(other)
        kind = accumulation_dtype(self.inputs, self.output_grads, other.inputs, other.output_grads)
        products = torch.bmm(self.inputs.to(kind), other.inputs.to(kind).transpose(1, 2))  # (N, T, S)
        products *= torch.bmm(self.output_grads.to(kind), other.output_grads.to(kind).transpose(1, 2))
        return products.sum((1, 2))

    def _pairwise_in_chunks(self, other: Factored) -> Tensor:
        """Row by row from the dense forms of a few samples at a time."""
        parts = [torch.arange(part.start, part.stop) for part in spans(self.num_samples, math.prod(self._shape))]
        if len(parts) <= 1:
            return super().pairwise(other)
        return torch.cat([self.select(part)._pairwise_in_chunks(other.select(part)) for part in parts])

    def plus(self, other: GradientBlock) -> GradientBlock:
        """The positions of both; dense where the other block is of another form or falls into other groups."""
        if not isinstance(other, Factored) or other.groups != self.groups:
            return super().plus(other)
        self._check_alike(other, same_samples=True)
        inputs = torch.cat([self.inputs, other.inputs], 1)
        return Factored(inputs, torch.cat([self.output_grads, other.output_grads], 1), self._shape, self.groups)

    def select(self, index: Tensor) -> Factored:
        index = index.to(self.device)
        return Factored(self.inputs[index], self.output_grads[index], self._shape, self.groups)

    def scaled(self, weights: Tensor) -> Factored:
        weights = weights.to(self.device, accumulation_dtype(self.output_grads)).view(-1, 1, 1)
        grads = (self.output_grads * weights).to(self.output_grads.dtype)
        return Factored(self.inputs, grads, self._shape, self.groups)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factored:
        device = device or self.device
        return Factored(
            self.inputs.to(device=device, dtype=dtype or self.inputs.dtype),
            self.output_grads.to(device=device, dtype=dtype or self.output_grads.dtype),
            self._shape,
            self.groups,
        )

    def tensors(self) -> dict[str, Tensor]:
        shape = torch.tensor(self._shape, dtype=torch.int64)
        groups = {"groups": torch.tensor([self.groups])} if self.groups > 1 else {}
        return {"inputs": self.inputs, "output_grads": self.output_grads, "shape": shape, **groups}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Factored:
        shape = [int(size) for size in tensors["shape"]]
        groups = int(tensors["groups"]) if "groups" in tensors else 1  # first stores have no groups
        return cls(tensors["inputs"], tensors["output_grads"], shape, groups)

    @classmethod
    def join(cls, blocks: Sequence[Factored]) -> GradientBlock:
        if len({block.groups for block in blocks}) > 1:
            return join_dense(blocks)
        longest = max(block.inputs.shape[1] for block in blocks)

        def padded(factor: Tensor) -> Tensor:
            return torch.nn.functional.pad(factor, (0, 0, 0, longest - factor.shape[1]))

        return cls(
            torch.cat([padded(block.inputs) for block in blocks]),
            torch.cat([padded(block.output_grads) for block in blocks]),
            blocks[0].shape,
            blocks[0].groups,
        )

    def all_finite(self) -> bool:
        return tensor_is_finite(self.inputs) and tensor_is_finite(self.output_grads)

    def nbytes(self) -> int:
        return self.inputs.nbytes + self.output_grads.nbytes
