"""A layer's parameters as one matrix per group, (G, O, I) with the bias as last input, turned into an eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_influence.curvature.layout import LayerBlock
from lightning_influence.gradients import Dense, Factored, GradientBlock, Gradients
from lightning_influence.gradients.blocks import spans


@dataclass(frozen=True)
class Rotation:
    """How weight and bias of a layer lie in (G, O, I), and the bases in which their curvature is diagonal.

    Attributes:
        shape: of the weight.
        bias: whether the layer's bias is the last of the I inputs.
        groups: G.
        transposed: the weight is kept as (inputs, outputs).
        inputs: Q_A (G, I, I); outputs: Q_G (G, O, O). `None` before they are known.
    """

    shape: tuple[int, ...]
    bias: bool
    groups: int
    transposed: bool
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    @classmethod
    def of(cls, block: LayerBlock) -> Rotation:
        """The layout of a matrix, without bases yet."""
        return cls(block.shapes[0], len(block.names) > 1, block.groups, block.transposed)

    def with_bases(self, inputs: Tensor, outputs: Tensor) -> Rotation:
        """The same layout in these bases."""
        return replace(self, inputs=inputs, outputs=outputs)

    def factors(self, gradients: Gradients, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Inputs (G, N, T, I), without the 1 for a bias, and output gradients (G, N, T, O)."""
        block = gradients[names[0]]
        assert isinstance(block, Factored)
        a, g = block.inputs, block.output_grads
        if self.transposed:
            a, g = g, a
        kind = torch.promote_types(torch.promote_types(a.dtype, g.dtype), torch.float32)
        a = torch.unflatten(a.to(kind), 2, (self.groups, -1)).permute(2, 0, 1, 3)
        g = torch.unflatten(g.to(kind), 2, (self.groups, -1)).permute(2, 0, 1, 3)
        return a, g

    def input_products(self, a: Tensor, counted: Tensor | None) -> Tensor:
        """Σ over samples and positions of a aᵀ, (G, I, I), with the 1 for a bias appended to every a.

        Args:
            a: inputs (G, N, T, I), without that 1.
            counted: (G, NT), the positions that count; `None` for all.
        """
        flat = a.flatten(1, 2)  # (G, NT, I)
        kept = flat if counted is None else flat * counted.unsqueeze(2)
        products = kept.transpose(1, 2) @ flat
        if not self.bias:
            return products
        sums = kept.sum(1)
        count = products.new_full((len(flat),), flat.shape[1]) if counted is None else counted.sum(1).to(products)
        count = count.view(-1, 1, 1)
        return torch.cat([torch.cat([products, sums[:, None]], 1), torch.cat([sums[:, :, None], count], 1)], 2)

    def matrices(self, v: Gradients, names: Sequence[str]) -> Tensor:
        """Vectors (Q, *shape) of weight and bias as (Q, G, O, I)."""
        weight = v[names[0]].dense()
        weight = weight.transpose(1, 2) if self.transposed else weight
        matrix = weight.reshape(len(weight), self.groups, weight.shape[1] // self.groups, -1)
        if self.bias:
            bias = v[names[1]].dense().view(*matrix.shape[:3], 1)
            matrix = torch.cat([matrix, bias], -1)
        return matrix

    def parts(self, matrix: Tensor, names: Sequence[str]) -> dict[str, GradientBlock]:
        """The inverse of `matrices`."""
        found: dict[str, Tensor] = {}
        if self.bias:
            found[names[1]] = matrix[..., -1].flatten(1)
            matrix = matrix[..., :-1]
        weight = matrix.flatten(1, 2)  # (Q, GO, I)
        found[names[0]] = weight.transpose(1, 2) if self.transposed else weight.reshape(len(weight), *self.shape)
        return pieces({name: found[name] for name in names})

    def scaled(self, v: Gradients, names: Sequence[str], factors: Tensor) -> dict[str, GradientBlock]:
        """Q_G[(Q_Gᵀ V Q_A) · factors]Q_Aᵀ for vectors of weight and bias; factors (G, O, I)."""
        matrix = self.matrices(v, names)
        kind = torch.promote_types(matrix.dtype, factors.dtype)
        q_a, q_g = self._bases(matrix.device, kind)
        rotated = q_g.transpose(1, 2) @ matrix.to(kind) @ q_a
        rotated *= factors.to(matrix.device, kind)
        return self.parts(q_g @ rotated @ q_a.transpose(1, 2), names)

    def squares(self, gradients: Gradients, names: Sequence[str]) -> Tensor:
        """Σ_n (Q_Gᵀ ∇W ℓ_n Q_A)², (G, O, I)."""
        a, g = self.factors(gradients, names)
        q_a, q_g = self._bases(a.device, a.dtype)
        shape, g = a.shape, g @ q_g[:, None]  # (G, N, T, O)
        if self.bias:
            a = torch.unflatten(torch.baddbmm(q_a[:, -1:], a.flatten(1, 2), q_a[:, :-1]), 1, shape[1:3])
        else:
            a = a @ q_a[:, None]  # (G, N, T, I)
        if a.shape[2] == 1:
            return g[:, :, 0].square().transpose(1, 2) @ a[:, :, 0].square()
        total = a.new_zeros(len(a), g.shape[3], a.shape[3])
        for span in spans(a.shape[1], len(a) * g.shape[3] * a.shape[3]):
            whole = g[:, span].transpose(2, 3) @ a[:, span]  # (G, n, O, I)
            total += whole.square_().sum(1)
        return total

    def _bases(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.inputs is not None and self.outputs is not None
        return self.inputs.to(device, dtype), self.outputs.to(device, dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases, and the layout as plain JSON."""
        assert self.inputs is not None and self.outputs is not None
        facts = {"shape": list(self.shape), "bias": self.bias, "groups": self.groups, "transposed": self.transposed}
        return {"inputs": self.inputs, "outputs": self.outputs}, facts

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Rotation:
        """The rotation that `state` described."""
        shape = tuple(int(size) for size in config["shape"])
        layout = (bool(config["bias"]), int(config["groups"]), bool(config["transposed"]))
        return cls(shape, *layout, tensors["inputs"], tensors["outputs"])


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, GradientBlock]:
    """Tensors (Q, *shape) by parameter name as blocks."""
    return {name: Dense(tensor) for name, tensor in tensors.items()}
