"""Functions of a matrix by its products against those by its eigenvectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature.matrix_function import exponential, matrix_function, saturated
from lightning_influence.errors import CurvatureError


def matrix(size: int, top: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric, eigenvalues from 0 to `top`, crowded at 0 as those of networks are."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(0, 1, size, dtype=torch.float64) ** 4 * top
    return (basis @ torch.diag(values) @ basis.T).to(dtype)


def by_eigenvectors(a: Tensor, b: Tensor, function: object) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return b @ vectors * function(values) @ vectors.T  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("top", [1.0, 50.0, 1000.0])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_equal_to_eigenvectors(size, top):
    a = matrix(size, top)
    b = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, converged = matrix_function(lambda rows: rows @ a, b, (exponential, saturated), tolerance=1e-12)
    assert converged
    for got, function in zip(found, (exponential, saturated), strict=True):
        torch.testing.assert_close(got, by_eigenvectors(a, b, function), rtol=1e-8, atol=1e-9)


def test_a_row_does_not_depend_on_those_beside_it():
    a = matrix(30, 100.0)
    b = torch.randn(4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b[1] = 0
    b[2] = torch.linalg.eigh(a).eigenvectors[:, 3]  # finished after one step
    together = matrix_function(lambda rows: rows @ a, b, (exponential,), tolerance=1e-12)[0][0]
    for row in range(4):
        alone = matrix_function(lambda rows: rows @ a, b[row : row + 1], (exponential,), tolerance=1e-12)[0][0]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-9, atol=1e-12)
    assert not bool(together[1].any())


def test_saturated_is_one_at_zero_and_falls_as_one_over_sigma():
    values = torch.tensor([0.0, 1e-12, 1.0, 1e4], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 1 - torch.e**-1, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(saturated(values), expected, rtol=1e-10, atol=0)


def test_few_products_are_told_and_infinite_ones_refused():
    a = matrix(60, 1e4)
    b = torch.ones(1, 60, dtype=torch.float64)
    assert not matrix_function(lambda rows: rows @ a, b, (exponential,), max_iterations=5)[1]
    with pytest.raises(CurvatureError, match="infinite"):
        matrix_function(lambda rows: -rows @ matrix(60, 1e4), b, (exponential,))
    with pytest.raises(CurvatureError, match="NaN"):
        matrix_function(lambda rows: rows * torch.nan, b, (exponential,))
    assert matrix_function(lambda rows: rows, b[:0], (exponential,))[0][0].shape == (0, 60)
