"""Eigenpairs by Krylov iteration against torch.linalg in float64: which are kept, how they invert, and how they lie."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.curvature import Absolute, Curvature, LowRank, LowRankCurvature, Relative
from lightning_influence.curvature import Dense as DenseStatistics
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense, Gradients, select
from tests.curvature.losses import Case, classifier, draws, language_model

SHAPES = {"a": (2, 3), "b": (4,)}  # of the parameters of a matrix that is given


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(draws(len(values), len(values), seed=seed))
    return (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T


class Given:
    """Evidence whose matrix is given; counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        module: Any = nn.Module()
        module.a = nn.Parameter(torch.zeros(2, 3, dtype=matrix.dtype))
        module.b = nn.Parameter(torch.zeros(len(matrix) - 6, dtype=matrix.dtype))
        self.selection, self.matrix, self.rows = select(module, "all"), matrix, list[int]()

    def operator(self, matrix: str) -> Any:
        return SimpleNamespace(matvec=self.product)

    def product(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return rows @ self.matrix


def collected(matrix: Tensor, rank: int, **options: Any) -> LowRankCurvature:
    return LowRank(rank, **options).collect(Given(matrix))  # type: ignore[arg-type]


def vectors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Dense]:
    return {name: Dense(draws(2, *shape, seed=seed + k)) for k, (name, shape) in enumerate(shapes.items())}


def flat(v: Gradients, names: Any = tuple(SHAPES)) -> Tensor:
    return torch.cat([v[name].dense().flatten(1) for name in names], 1)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


INDEFINITE = [-4.0, -1.5, -0.3, 0.05, 0.1, 0.2, 0.9, 2.0, 3.0, 7.0]


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("make", [classifier, language_model], ids=["mlp", "lm"])
def test_all_eigenpairs_are_the_dense_matrix(make, block_size, matrix):
    case: Case = make()
    evidence = case.evidence(batch_size=100)
    shapes = {name: tuple(p.shape) for name, p in case.module.named_parameters()}
    low = LowRank(len(case.flat()), matrix, block_size=block_size).collect(evidence)
    dense = DenseStatistics(matrix).collect(evidence)
    v = vectors(shapes)
    close(flat(low.matvec(v), shapes), flat(dense.matvec(v), shapes))
    decay = {name: 0.1 + 0.1 * k for k, name in enumerate(shapes)}
    dampings = [Absolute(0.3), Relative(0.1)] if matrix == "ggn" else [Absolute(0.3)]
    for damping in dampings:
        close(flat(low.solve(v, damping), shapes), flat(dense.solve(v, damping), shapes), 1e-9)
        close(
            flat(low.decayed(decay).solve(v, damping), shapes),
            flat(dense.decayed(decay).solve(v, damping), shapes),
            1e-9,
        )
    assert float(low.pairs.residuals.max()) < 1e-10


@pytest.mark.parametrize(("rank", "block_size"), [(1, 1), (3, 1), (4, 2), (6, 3), (10, 1)])
def test_the_largest_eigenvalues_are_kept_negative_ones_too(rank, block_size):
    pairs = collected(with_spectrum(INDEFINITE), rank, block_size=block_size).pairs
    expected = sorted(INDEFINITE, key=abs, reverse=True)[:rank]
    close(pairs.values, torch.tensor(expected, dtype=torch.float64))
    close(pairs.vectors @ pairs.vectors.T, torch.eye(rank, dtype=torch.float64))
    close(pairs.vectors @ with_spectrum(INDEFINITE), pairs.values[:, None] * pairs.vectors)


def test_negative_curvature_of_a_model():
    case = classifier()
    values = torch.linalg.eigvalsh(case.hessian())
    expected = values[values.abs().argsort(descending=True)[:6]]
    assert float(expected.min()) < 0
    found = LowRank(6, "hessian", iterations=25).collect(case.evidence(batch_size=100))
    close(found.pairs.values, expected, 1e-6)


@pytest.mark.parametrize(("iterations", "block_size"), [(5, 1), (3, 2), (2, 4)])
def test_residuals_say_how_far_a_pair_is_from_an_eigenpair(iterations, block_size):
    matrix = with_spectrum(INDEFINITE)
    pairs = collected(matrix, 4, iterations=iterations, block_size=block_size).pairs
    left = pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors
    close(pairs.residuals, left.norm(dim=1))
    assert float(pairs.residuals.max()) > 1e-3


@pytest.mark.parametrize("block_size", [1, 3])
def test_eigenvalues_that_repeat_are_all_found(block_size):
    values = [2.0] * 4 + [-1.0] * 3 + [0.5] * 3
    pairs = collected(with_spectrum(values), 10, block_size=block_size).pairs
    close(pairs.values, torch.tensor([2.0] * 4 + [-1.0] * 3 + [0.5] * 3, dtype=torch.float64))


@pytest.mark.parametrize("block_size", [1, 4])
def test_eigenvectors_stay_orthogonal_where_eigenvalues_fall_steeply(block_size):
    """Lanczos' iteration without orthogonalisation finds such pairs several times over."""
    values = [(-1) ** k * 10.0 ** (-k / 6) for k in range(80)]
    pairs = collected(with_spectrum(values), 40, iterations=80 // block_size, block_size=block_size).pairs
    torch.testing.assert_close(pairs.values, torch.tensor(values[:40], dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((pairs.vectors @ pairs.vectors.T - torch.eye(40, dtype=torch.float64)).abs().max()) < 1e-13


def test_it_stops_where_nothing_is_left():
    evidence: Any = Given(with_spectrum([3.0, -2.0] + [0.0] * 8))
    pairs = LowRank(8).collect(evidence).pairs
    close(pairs.values, torch.tensor([3.0, -2.0], dtype=torch.float64))
    assert len(evidence.rows) <= 5
    assert float(pairs.residuals.max()) < 1e-12


def test_products_are_as_many_as_asked_for():
    evidence: Any = Given(with_spectrum(INDEFINITE))
    LowRank(2, iterations=3, block_size=2).collect(evidence)
    assert evidence.rows == [2, 2, 2]


def test_a_flat_loss():
    curvature = collected(torch.zeros(10, 10, dtype=torch.float64), 3)
    v = vectors(SHAPES)
    assert len(curvature.pairs.values) == 0 and curvature.mean_eigenvalue == 0
    close(flat(curvature.solve(v, Absolute(0.5))), 2 * flat(v))
    assert not flat(curvature.matvec(v)).any()
    with pytest.raises(CurvatureError, match="neither weight decay nor damping"):
        curvature.solve(v, Absolute(0.0))


def lost(curvature: LowRankCurvature) -> Tensor:
    """UᵀΛU."""
    return (curvature.pairs.vectors.T * curvature.pairs.values) @ curvature.pairs.vectors


@pytest.mark.parametrize("decay", [{}, {"a": 0.4}, {"a": 0.4, "b": 0.02}])
def test_the_inverse_outside_of_the_span(decay):
    """There the only curvature is that of the decay and the damping."""
    curvature = collected(with_spectrum(INDEFINITE), 4).decayed(decay)
    v = vectors(SHAPES)
    diagonal = torch.tensor([decay.get("a", 0.0)] * 6 + [decay.get("b", 0.0)] * 4, dtype=torch.float64)
    matrix = lost(curvature) + torch.diag(diagonal)
    close(flat(curvature.matvec(v)), flat(v) @ matrix)
    for damping in (0.3, 1e-3):
        shifted = matrix + damping * torch.eye(10, dtype=torch.float64)
        close(flat(curvature.solve(v, Absolute(damping))), torch.linalg.solve(shifted, flat(v).T).T, 1e-9)


def test_without_damping_the_inverse_is_that_of_the_span():
    curvature = collected(with_spectrum(INDEFINITE), 4)
    v = vectors(SHAPES)
    close(flat(curvature.solve(v, Absolute(0.0))), flat(v) @ torch.linalg.pinv(lost(curvature), rtol=1e-9))
    with pytest.raises(CurvatureError, match=r"neither weight decay nor damping[\s\S]*neither on b"):
        curvature.decayed({"a": 0.1}).solve(v, Absolute(0.0))


def test_a_damping_that_meets_a_negative_eigenvalue():
    curvature = collected(with_spectrum(INDEFINITE), 4)
    with pytest.raises(CurvatureError, match="cannot be inverted"):
        curvature.solve(vectors(SHAPES), Absolute(4.0))


def test_a_relative_damping_is_in_units_of_the_mean_absolute_eigenvalue():
    curvature = collected(with_spectrum(INDEFINITE), 4)
    assert curvature.mean_eigenvalue == pytest.approx((7 + 4 + 3 + 2) / 10)
    assert curvature.decayed({"a": 3.0}).mean_eigenvalue == curvature.mean_eigenvalue
    v = vectors(SHAPES)
    close(flat(curvature.solve(v, Relative(0.1))), flat(curvature.solve(v, Absolute(0.16))))


def test_dampings_do_not_add_up():
    curvature = collected(with_spectrum(INDEFINITE), 4).decayed({"a": 0.1})
    v = vectors(SHAPES)
    first = flat(curvature.solve(v, Absolute(0.3)))
    curvature.solve(v, Absolute(0.7))
    assert torch.equal(flat(curvature.solve(v, Absolute(0.3))), first)


def test_any_rows_and_columns():
    curvature = collected(with_spectrum(INDEFINITE), 4).decayed({"a": 0.5})
    matrix = lost(curvature) + torch.diag(torch.tensor([0.5] * 6 + [0.0] * 4, dtype=torch.float64))
    v = vectors(SHAPES)
    found = curvature.matvec(v, rows=["b"], columns=["a"])
    assert list(found) == ["b"]
    close(found["b"].dense(), v["a"].dense().flatten(1) @ matrix[:6, 6:])
    found = curvature.matvec({"b": v["b"]}, rows=["a", "b"])
    close(flat(found), v["b"].dense() @ matrix[6:])
    with pytest.raises(CurvatureError, match="holds nothing for 'c'"):
        curvature.matvec(v, rows=["c"])
    with pytest.raises(CurvatureError, match="vectors of b too"):
        curvature.solve({"a": v["a"]}, Absolute(1.0))
    assert list(curvature.solve({"b": v["b"], "a": v["a"]}, Absolute(1.0))) == ["b", "a"]


def test_state_and_back():
    curvature = collected(with_spectrum(INDEFINITE), 4).decayed({"a": 0.5})
    tensors, config = curvature.state()
    config = json.loads(json.dumps(config, sort_keys=True))
    again = Curvature.kinds["low_rank"].load({name: tensor.clone() for name, tensor in tensors.items()}, config)
    v = vectors(SHAPES)
    assert isinstance(again, LowRankCurvature) and again.parameters == curvature.parameters
    assert torch.equal(flat(again.matvec(v)), flat(curvature.matvec(v)))
    assert torch.equal(flat(again.solve(v, Relative(0.1))), flat(curvature.solve(v, Relative(0.1))))
    assert torch.equal(again.pairs.residuals, curvature.pairs.residuals) and again.decay == {"a": 0.5}


def test_seeds():
    matrix = with_spectrum(INDEFINITE)
    pairs = [collected(matrix, 3, iterations=6, seed=seed).pairs for seed in (0, 0, 1)]
    assert torch.equal(pairs[0].vectors, pairs[1].vectors)
    assert not torch.equal(pairs[0].vectors, pairs[2].vectors)


def test_float32():
    curvature = collected(with_spectrum(INDEFINITE).float(), 10)
    close(curvature.pairs.values.double(), torch.tensor(sorted(INDEFINITE, key=abs, reverse=True)).double(), 1e-5)
    v = vectors(SHAPES)
    shifted = with_spectrum(INDEFINITE) + 0.5 * torch.eye(10, dtype=torch.float64)
    solved = curvature.solve({name: block.to(dtype=torch.float32) for name, block in v.items()}, Absolute(0.5))
    assert solved["a"].dtype == torch.float32
    close(flat(solved).double(), torch.linalg.solve(shifted, flat(v).T).T, 1e-4)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"block_size": 0}, {"rank": 10, "iterations": 4, "block_size": 2}, {"matrix": "fisher"}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(CurvatureError):
        LowRank(**wrong)


def test_settings_make_the_same_statistics_again():
    settings = LowRank(5, "hessian", block_size=2, seed=3).settings()
    assert LowRank(**settings).settings() == settings and LowRank(5, "hessian").name == "low_rank_hessian"
