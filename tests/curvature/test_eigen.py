"""Eigen-decompositions: what is tried, in which order, and what an error says when nothing worked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence.curvature import EKFAC
from lightning_influence.curvature.eigen import eigen
from lightning_influence.errors import CurvatureError
from tests.curvature.settings import classified, draws, evidence, model
from tests.curvature.test_kronecker import mlp

EIGH = torch.linalg.eigh
MATRIX = draws(5, 5) @ draws(5, 5).T


class Failing:
    """torch.linalg.eigh, for some types only."""

    def __init__(self, *fails: torch.dtype, nan: bool = False) -> None:
        self.fails, self.nan, self.tried = fails, nan, list[torch.dtype]()

    def __call__(self, matrix: Tensor) -> Any:
        self.tried.append(matrix.dtype)
        if matrix.dtype not in self.fails:
            return EIGH(matrix)
        if self.nan:
            return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")


def test_the_decomposition_is_that_of_the_symmetric_part():
    values, vectors = eigen(MATRIX + torch.tensor([[0.0, 1e-9], [-1e-9, 0.0]]).repeat(3, 3)[:5, :5], "w")
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, MATRIX, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    several = torch.stack([MATRIX, 2 * MATRIX])
    torch.testing.assert_close(eigen(several, "w")[0][1], 2 * values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nan", [False, True])
def test_a_failure_in_single_precision_is_repeated_in_double(monkeypatch, nan):
    failing = Failing(torch.float32, nan=nan)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigen(MATRIX, "w", torch.float32)
    assert failing.tried == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, MATRIX.float(), rtol=1e-4, atol=1e-4)


def test_single_precision_is_tried_first_and_kept(monkeypatch):
    failing = Failing()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    eigen(MATRIX, "w", torch.float32)
    assert failing.tried == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_failure_in_both_names_the_parameter(monkeypatch, dtype):
    failing = Failing(torch.float32, torch.float64)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(CurvatureError, match=r"'encoder\.weight' failed") as caught:
        eigen(MATRIX, "encoder.weight", dtype)
    assert failing.tried == list(dict.fromkeys([dtype, torch.float64]))
    assert "(5, 5)" in str(caught.value) and "Diagonal()" in caught.value.hint


def test_other_errors_of_the_user_are_not_swallowed(monkeypatch):
    def broken(matrix: Tensor) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(ZeroDivisionError):
        eigen(MATRIX, "w")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_entries_that_are_no_numbers_are_named(value):
    matrix = MATRIX.clone()
    matrix[1, 2] = value
    with pytest.raises(CurvatureError, match=r"covariance of 'encoder\.weight' is NaN or infinite"):
        eigen(matrix, "encoder.weight")


def test_a_layer_whose_decomposition_fails_is_named_by_the_estimate(monkeypatch):
    module = model(mlp)
    monkeypatch.setattr(torch.linalg, "eigh", Failing(torch.float64))
    with pytest.raises(CurvatureError, match=r"'network\.0\.weight' failed"):
        EKFAC().collect(evidence(module, classified(draws(6, 4))))
