"""ParameterSpace: named parameters laid end to end, for curvatures that know them as one vector."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from lightning_influence.curvature.dense import Shapes
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense, GradientBlock, Gradients


class ParameterSpace:
    """Where every parameter lies in a vector of P numbers.

    Args:
        shapes: of the parameters, in the order in which they are laid.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes, self.names = dict(shapes), tuple(shapes)
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    def spans(self) -> Iterator[tuple[str, slice]]:
        """Every parameter's name and place."""
        start = 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            yield name, slice(start, stop)
            start = stop

    def rows(self, v: Gradients, like: Tensor) -> Tensor:
        """Vectors as rows (Q, P) on the device of `like`, in its type or a wider one of v; zero where v lacks one."""
        some = next(iter(v.values()), None)
        kind = like.dtype if some is None else torch.promote_types(like.dtype, some.dtype)
        flat = like.new_zeros(0 if some is None else some.num_samples, self.size, dtype=kind)
        for name, span in self.spans():
            if name in v:
                flat[:, span] = v[name].dense().flatten(1).to(flat)
        return flat

    def named(self, flat: Tensor, names: Collection[str], like: Gradients) -> dict[str, GradientBlock]:
        """The parameters `names` of rows (Q, P), in that order, on the device of the vectors `like`."""
        device = next((block.device for block in like.values()), flat.device)
        spans = dict(self.spans())
        return {name: Dense(flat[:, spans[name]].reshape(-1, *self.shapes[name]).to(device)) for name in names}

    def diagonal(self, decay: Mapping[str, float], like: Tensor) -> Tensor:
        """Numbers by parameter name, 0 where there is none, as a vector (P,) of the type and device of `like`."""
        diagonal = like.new_zeros(self.size)
        for name, span in self.spans():
            diagonal[span] = decay.get(name, 0.0)
        return diagonal

    def check_complete(self, v: Gradients) -> None:
        """Refuse to invert with a part of the parameters.

        Raises:
            CurvatureError: v lacks some.
        """
        if missing := [name for name in self.names if name not in v]:
            raise CurvatureError(
                "the inverse of a curvature without blocks takes all of its parameters at once",
                expected=f"vectors of {', '.join(missing)} too",
                found=f"vectors of {', '.join(v) or 'nothing'}",
                hint="give zeros for parameters that the measurement does not depend on, or estimate the curvature of "
                "these parameters alone",
            )
