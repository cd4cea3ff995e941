"""Right-hand sides and vectors as rows (Q, P): their norms, their products, and what is not told from rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.errors import CurvatureError

_ROUNDING = 16.0  # in units of the dtype's eps


def check_rows(b: Tensor) -> None:
    """Refuse right-hand sides that cannot be solved for.

    Raises:
        CurvatureError: no rows of float32 or float64, or not finite.
    """
    if b.dim() != 2 or b.dtype not in (torch.float32, torch.float64):
        raise CurvatureError(
            "The right-hand sides are not rows of float32 or float64.",
            expected="(Q, P) float32 or float64",
            found=f"{tuple(b.shape)} {b.dtype}",
            hint="Flatten every right-hand side to one row.",
        )
    if not torch.isfinite(b).all():
        raise CurvatureError(
            "The right-hand sides contain NaN or infinity.",
            expected="finite numbers",
            hint="Look for NaN in the gradients that these are.",
        )


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (Q, P) at unit length and their norms (Q,), without a square that under- or overflows; 0 stays 0."""
    if not rows.numel():
        return rows, rows.new_zeros(len(rows))
    peak = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(peak > 0, peak, 1.0)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / norm.clamp_min(1.0), (peak * norm).squeeze(1)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Inner products row by row, (Q,)."""
    return torch.sum(left * right, 1)


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms of rows, (Q,)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def rounding_of(like: Tensor) -> float:
    """What is smaller than this, relative to the largest seen, is not told from zero."""
    return _ROUNDING * torch.finfo(like.dtype).eps


def finite_product(out: Tensor, what: str, iteration: int) -> Tensor:
    """A product without its graph.

    Raises:
        CurvatureError: it is NaN or infinite.
    """
    if not torch.isfinite(out).all():
        raise CurvatureError(
            f"{what} is NaN or infinite in iteration {iteration}.",
            expected="finite numbers",
            hint="Look for NaN in the weights, the data and the loss's second derivatives, or try float64.",
        )
    return out.detach()
