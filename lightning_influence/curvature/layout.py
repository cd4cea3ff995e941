"""How parameters are grouped into blocks: a weight with its bias, look-ups by word, and the small ones of a layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_influence.gradients import Dense, Factored, GradientBlock, Gradients, Rows, Selection

_TRANSPOSED = "transformers.pytorch_utils.Conv1D"  # keeps its weight as (I, O)


@dataclass(frozen=True)
class LayerBlock:
    """Parameters that share a block of a curvature.

    Attributes:
        names: full names; of a matrix first the weight, then its bias if there is one.
        form: `"matrix"` (a weight that multiplies positions), `"rows"` (look-ups by word), `"whole"` (anything else).
        shapes: of the parameters.
        groups: of a matrix: parts of the weight that see different inputs (grouped convolutions, packed projections).
        transposed: of a matrix: the weight is kept as (inputs, outputs).
    """

    names: tuple[str, ...]
    form: Literal["matrix", "rows", "whole"]
    shapes: tuple[tuple[int, ...], ...]
    groups: int = 1
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes)


def by_layer(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Parameters with those of the same layer, as their names tell."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(tuple(members) for members in layers.values())


def layer_blocks(selection: Selection, gradients: Gradients) -> tuple[LayerBlock, ...]:
    """The blocks of a selection, as the gradients of a batch in factored form show them."""
    blocks: list[LayerBlock] = []
    taken: set[str] = set()
    uses = Counter(name for names in selection.layers.values() for name in names.values())
    for layer, names in selection.layers.items():
        rest: list[str] = []
        for local, name in names.items():
            if name in taken or name not in gradients:
                continue
            block = gradients[name]
            if isinstance(block, (Factored, Rows)):
                alone = isinstance(block, Factored) and uses[name] == 1  # a shared weight is seen by several layers
                bias = _bias_of(local, names, gradients, uses) if alone else None
                members = (name,) if bias is None or bias in taken else (name, bias)
                blocks.append(_matrix(members, block, layer, gradients))
                taken |= set(members)
            else:
                rest.append(name)
        rest = [name for name in rest if name not in taken]
        if rest:
            blocks.append(LayerBlock(tuple(rest), "whole", tuple(gradients[name].shape for name in rest)))
            taken |= set(rest)
    return tuple(blocks)


def _bias_of(local: str, names: Mapping[str, str], gradients: Gradients, uses: Mapping[str, int]) -> str | None:
    """The full name of the bias that is added to what the weight `local` gives, if it is selected and of this layer
    alone."""
    prefix, _, last = local.rpartition(".")
    if not last.endswith("weight"):
        return None
    bias = ".".join(part for part in (prefix, last.removesuffix("weight") + "bias") if part)
    name = names.get(bias)
    return name if name is not None and uses[name] == 1 and isinstance(gradients.get(name), Dense) else None


def _matrix(members: tuple[str, ...], block: GradientBlock, layer: nn.Module, gradients: Gradients) -> LayerBlock:
    shapes = tuple(gradients[name].shape for name in members)
    if isinstance(block, Rows):
        return LayerBlock(members, "rows", shapes)
    kind = type(layer)
    transposed = f"{kind.__module__}.{kind.__qualname__}" == _TRANSPOSED
    assert isinstance(block, Factored)
    return LayerBlock(members, "matrix", shapes, block.groups, transposed)
