"""Eigen-decompositions of covariances: in the model's precision, in float64 where that fails, else an error by name."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.errors import CurvatureError


def eigen(matrix: Tensor, owner: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(eigenvalues (..., P) ascending, eigenvectors (..., P, P) in columns) of symmetric matrices (..., P, P).

    Args:
        owner: the parameter that the matrix belongs to, for the error.
        dtype: type to try first and to return; that of the matrix if `None`.

    Raises:
        CurvatureError: NaN or infinite entries, or no convergence in float64 either.
    """
    dtype = dtype or matrix.dtype
    if not bool(torch.isfinite(matrix).all()):
        raise CurvatureError(
            f"the covariance of {owner!r} is NaN or infinite",
            expected="finite covariances",
            found=f"{int((~torch.isfinite(matrix)).sum())} entries that are not",
            hint="look for samples with infinite activations or losses; in half precision use a wider type",
        )
    matrix = (matrix + matrix.transpose(-1, -2)) / 2
    for kind in dict.fromkeys((dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(kind))
        except RuntimeError:  # torch.linalg.LinAlgError: the algorithm did not converge
            continue
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values.to(dtype), vectors.to(dtype)
    raise CurvatureError(
        f"the eigen-decomposition of {owner!r} failed",
        expected="a decomposition in float32 or float64",
        found=f"a matrix of shape {tuple(matrix.shape)} for which both failed",
        hint="leave the layer out of CurvatureSnapshot(parameters=...), or use Diagonal() statistics",
    )
