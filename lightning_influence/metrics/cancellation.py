"""Cancellation ratio: how much of a layer's per-sample gradients cancels in their sum?

Σ_p Σ_i |∂ℓ_i/∂p| / Σ_p |Σ_i ∂ℓ_i/∂p| for each layer, 1 where all samples pull the same way. Yeh et al. 2022
(2202.11844): in layers where it is large, single samples have large gradients that say little of what training changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import floats, same_shape
from lightning_influence.metrics.drawing import COLOURS, axes
from lightning_influence.metrics.metric import InfluenceMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cancellation_ratio(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The ratio of each layer, from its per-sample gradients.

    Args:
        gradients: layer -> (N, *parameter), of the same N samples.

    Returns:
        layer -> ratio, from 1 up; inf where the sum is zero and the gradients are not, nan where all are zero.

    Raises:
        MetricError: NaN or infinity, or no samples.

    >>> cancellation_ratio({"head": torch.tensor([[3.0, 1.0], [-1.0, 1.0]])})
    {'head': 1.5}
    """
    return {name: _ratio(*_sums(name, values)) for name, values in gradients.items()}


class CancellationRatio(InfluenceMetric):
    """`cancellation_ratio` over batches of samples, on one process or several: both sums are added up.

    Args:
        shapes: layer -> shape of its parameter, such as {name: p.shape for name, p in model.named_parameters()}.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = CancellationRatio({"head": (2,)})
    >>> metric.update({"head": torch.tensor([[3.0, 1.0]])})
    >>> metric.update({"head": torch.tensor([[-1.0, 1.0]])})
    >>> metric.compute()
    {'head': 1.5}
    """

    higher_is_better = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], **kwargs: Any) -> None:
        super().__init__((), **kwargs)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        for number, shape in enumerate(self.shapes.values()):  # layers' names have dots, states' names may not
            self.add_state(f"absolute_{number}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"signed_{number}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Add samples: layer -> per-sample gradients (N, *parameter), of all layers."""
        if gradients.keys() != self.shapes.keys():
            raise MetricError(
                "the gradients are not those of the layers",
                expected=", ".join(self.shapes),
                found=", ".join(gradients) or "none",
                hint="pass the gradients of all layers that the metric was made for",
            )
        sums = []
        for name, shape in self.shapes.items():
            same_shape(f"gradients of {name!r}", tuple(gradients[name].shape), (*gradients[name].shape[:1], *shape))
            sums.append(_sums(name, gradients[name]))
        for number, (absolute, signed) in enumerate(sums):
            for kind, more in (("absolute", absolute), ("signed", signed)):
                so_far = getattr(self, f"{kind}_{number}")
                setattr(self, f"{kind}_{number}", so_far + more.to(so_far.device))

    def compute(self) -> dict[str, float]:
        """The ratio of each layer over all samples of all processes."""
        return {
            name: _ratio(getattr(self, f"absolute_{number}"), getattr(self, f"signed_{number}"))
            for number, name in enumerate(self.shapes)
        }

    def plot(self, val: Mapping[str, float] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """A bar for each layer; dashed, 1, where nothing cancels."""
        found = self.compute() if val is None else val
        figure, ax = axes(ax)
        ax.bar(range(len(found)), list(found.values()), color=COLOURS[0])
        ax.set_xticks(range(len(found)), list(found), rotation=45, ha="right")
        ax.axhline(1, color="#767676", linestyle="--")
        ax.set_ylabel("cancellation ratio")
        return figure, ax


def _sums(name: str, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_p Σ_i |g|, a number, and Σ_i g of the parameter's shape."""
    rows = floats(
        gradients.flatten(1) if gradients.dim() > 1 else gradients.unsqueeze(1), f"gradients of {name!r}", "(N, P)"
    )
    return rows.abs().sum(), rows.sum(0).view(gradients.shape[1:])


def _ratio(absolute: Tensor, signed: Tensor) -> float:
    return float(absolute / signed.abs().sum())
