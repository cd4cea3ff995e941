"""The least-squares solvers against the pseudoinverse in float64: what they solve, say, cost and refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.curvature.least_squares import LeastSquares, cgls, dense_least_squares, lsmr, neumann
from lightning_influence.errors import CurvatureError

KRYLOV = [cgls, lsmr]
SOLVERS: list[Callable[..., LeastSquares]] = [*KRYLOV, neumann]
NAMES = [solver.__name__ for solver in SOLVERS]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(m: int, n: int, values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A matrix (m, n) with these singular values; the others are zero."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left, _ = torch.linalg.qr(draws(m, len(values), seed=seed))
    right, _ = torch.linalg.qr(draws(n, len(values), seed=seed + 1))
    return (left * values) @ right.T


class Pair:
    """Products with a matrix and its transpose that remember how many rows each was asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.rows = matrix, list[int]()

    def apply(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return rows @ self.matrix.T

    def adjoint(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return rows @ self.matrix


def solved(solve: Callable[..., LeastSquares], matrix: Tensor, b: Tensor, **options: object) -> LeastSquares:
    pair = Pair(matrix)
    solution = solve(pair.apply, pair.adjoint, b, **options)
    assert solution.products == len(pair.rows)
    return solution


def truth(matrix: Tensor, b: Tensor) -> Tensor:
    return b @ torch.linalg.pinv(matrix, rtol=1e-12).T


def true_residuals(matrix: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r = b - x @ matrix.T
    return r.norm(dim=1) / b.norm(dim=1), (r @ matrix).norm(dim=1) / (b @ matrix).norm(dim=1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def indefinite(values: list[float], seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(draws(len(values), len(values), seed=seed))
    return (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T


INDEFINITE = indefinite([-4.0, -1.5, -0.9, 0.8, 1.0, 2.0, 3.0, 4.0])
TALL = with_singular_values(12, 8, torch.linspace(0.7, 3.0, 8))
WIDE = with_singular_values(8, 12, torch.linspace(0.7, 3.0, 8))
DEFICIENT = with_singular_values(11, 9, torch.linspace(0.7, 3.0, 5))
MATRICES = {"indefinite": INDEFINITE, "tall": TALL, "wide": WIDE, "deficient": DEFICIENT}
matrices = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
solvers = pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
krylov = pytest.mark.parametrize("solve", KRYLOV)


@solvers
@matrices
@pytest.mark.parametrize("consistent", [True, False])
def test_the_solution_of_least_norm(solve, matrix, consistent):
    m, n = matrix.shape
    b = draws(3, n, seed=1) @ matrix.T if consistent else draws(3, m, seed=2)
    solution = solved(solve, matrix, b, tolerance=1e-12)
    expected = truth(matrix, b)
    assert error(solution.x, expected) < 1e-9 and solution.converged and not solution.diverged
    dense = dense_least_squares(Pair(matrix).apply, n, b)
    assert error(dense.x, expected) < 1e-12 and dense.converged and dense.iterations == 0
    for found in (solution, dense):
        residual, normal_residual = true_residuals(matrix, found.x, b)
        torch.testing.assert_close(found.residual, residual, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(found.normal_residual, normal_residual, rtol=1e-3, atol=1e-14)
        assert found.x.shape == (3, n) and found.residual.shape == found.normal_residual.shape == (3,)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 9),
    queries=st.integers(1, 4),
    size=st.sampled_from([1e-200, 1.0, 1e200]),
    unit=st.sampled_from([1e-100, 1.0, 1e90]),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_rank_and_any_size(m, n, rank, queries, size, unit, seed):
    values = 0.2 + draws(min(m, n, rank), seed=seed + 2).abs()
    matrix, b = with_singular_values(m, n, values, seed), draws(queries, m, seed=seed + 3)
    expected = truth(matrix, b)
    for solve in KRYLOV:
        solution = solved(solve, matrix * unit, b * size, tolerance=1e-12)
        torch.testing.assert_close(solution.x / size * unit, expected, rtol=1e-8, atol=1e-8)
        assert solution.converged and solution.iterations <= 3 * len(values)


@krylov
@pytest.mark.parametrize("m, n, rank", [(30, 30, 30), (50, 30, 30), (30, 50, 30), (40, 35, 20)])
@pytest.mark.parametrize("kind", ["range", "any"])
def test_ill_conditioned(solve, m, n, rank, kind):
    """κ = 1e5; the rounding error of a b outside the range is of the order κ² eps ‖r‖/(‖A‖‖x‖), here 1e-11."""
    matrix = with_singular_values(m, n, torch.logspace(0, -5, rank, dtype=torch.float64))
    b = draws(2, m, seed=4)
    if kind == "range":
        b = truth(matrix, b) @ matrix.T
    solution = solved(solve, matrix, b, tolerance=1e-13, max_iterations=5000)
    assert error(solution.x, truth(matrix, b)) < 1e-8
    assert solution.normal_residual.max() < 1e-11  # what rounding allows; the tolerance may be out of reach


@krylov
def test_a_normal_residual_says_less_than_a_residual_where_the_condition_is_bad(solve):
    """τ = ‖Aᵀr‖/‖Aᵀb‖ leaves an error of up to κ² τ: a consistent b from an x of all directions shows it."""
    matrix = with_singular_values(30, 30, torch.logspace(0, -5, 30, dtype=torch.float64))
    x = draws(2, 30, seed=5)
    loose = solved(solve, matrix, x @ matrix.T, tolerance=1e-13)
    assert loose.converged and 1e-9 < error(loose.x, x) < 1e10 * 1e-13
    assert error(solved(solve, matrix, x @ matrix.T, tolerance=1e-16, max_iterations=5000).x, x) < 1e-8


@krylov
def test_what_it_costs(solve):
    matrix = with_singular_values(30, 20, [1.0] * 7 + [3.0] * 7 + [7.0] * 6)
    pair = Pair(matrix)
    solution = solve(pair.apply, pair.adjoint, draws(2, 30), tolerance=1e-10)
    assert solution.converged and solution.iterations == 3  # as many as there are different singular values
    assert solution.products == 2 * 3 + 3 and pair.rows == [2] * 9  # one to start, two to verify


@solvers
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_stopping_early_is_not_an_error_and_its_residuals_are_the_true_ones(solve, steps):
    b = draws(3, 12, seed=6)
    options = {"scale": 3.0} if solve is neumann else {}
    solution = solved(solve, TALL, b, max_iterations=steps, **options)
    assert not solution.converged and not solution.diverged and solution.iterations == steps
    assert solution.products == 2 * steps + (1 if solve is neumann else 3)  # every step of the series verifies itself
    residual, normal_residual = true_residuals(TALL, solution.x, b)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.normal_residual, normal_residual, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_what_each_method_minimises_over_the_krylov_space(steps):
    b = draws(1, 12, seed=7)
    space = [b @ TALL]
    for _ in range(steps - 1):
        space.append(space[-1] @ TALL.T @ TALL)
    basis, _ = torch.linalg.qr(torch.cat(space).T)  # (n, steps)
    for solve, target, columns in ((cgls, b, TALL @ basis), (lsmr, b @ TALL, TALL.T @ TALL @ basis)):
        expected = basis @ torch.linalg.lstsq(columns, target.T).solution
        found = solved(solve, TALL, b, max_iterations=steps)
        torch.testing.assert_close(found.x, expected.T, rtol=1e-9, atol=1e-11)


@solvers
@pytest.mark.parametrize("met", ["residual", "normal residual"])
def test_a_row_ends_at_the_first_iterate_that_meets_the_tolerance(solve, met):
    matrix, b, options = TALL, draws(1, 12, seed=8), {}
    if met == "residual" and solve is not neumann:  # b along small singular values, so that ‖Aᵀb‖ is small too
        matrix = with_singular_values(30, 20, torch.logspace(0, -2, 20, dtype=torch.float64))
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        b = (draws(1, 20, seed=8) / values**3) @ left.T
    elif solve is neumann:
        options = {"scale": 3.0}
        if met == "residual":  # what falls most slowly is the largest
            matrix, b, options = torch.diag(b.new_tensor([1.0, 0.7])), b.new_tensor([[0.2, 1.0]]), {"scale": 0.75}
    solution = solved(solve, matrix, b, tolerance=0.1, **options)
    before = solved(solve, matrix, b, tolerance=0.1, max_iterations=solution.iterations - 1, **options)
    assert solution.converged and not before.converged and solution.iterations > 2
    assert (solution.residual <= 0.1) == (met == "residual") and (solution.normal_residual <= 0.1) != (
        met == "residual"
    )


def test_a_first_pass_that_raises_the_normal_residual_counts():
    matrix = torch.diag(torch.tensor([1.0, 1e-3])).double()
    b = torch.tensor([[1e-5, 1.0]], dtype=torch.float64)
    solution = solved(cgls, matrix, b, max_iterations=1)
    assert solution.normal_residual > 1.0 and solution.x.any() and (solution.x * truth(matrix, b)).sum() > 0
    assert solved(cgls, matrix, b, tolerance=1e-12).converged


@krylov
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_a_right_hand_side_that_is_almost_outside_the_range(solve, dtype, share):
    """Where Aᵀb is only rounding, x is 0 within it; where it is little, rounding leaves an error of κ² eps, no more."""
    eps = torch.finfo(dtype).eps
    for seed in range(12, 50):
        m, n, rank = 10 + seed % 13, 9 + seed % 3 * 6, 2 + seed % 7
        matrix = with_singular_values(m, n, torch.logspace(0, -2, rank, dtype=torch.float64), seed)
        basis, _, _ = torch.linalg.svd(matrix)
        b = draws(2, m, seed=seed + 2)
        b = b - b @ basis[:, :rank] @ basis[:, :rank].T
        inside = share * truth(matrix, draws(2, m, seed=seed + 3))
        solution = solved(solve, matrix.to(dtype), (b + inside @ matrix.T).to(dtype), tolerance=0.0)
        assert not solution.converged and solution.products < 200
        assert ((solution.x - inside).norm(dim=1) <= 10 * 1e4 * eps * b.norm(dim=1)).all()


@krylov
def test_where_the_normal_equations_are_rounding_x_stays_zero(solve):
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1e-3], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1e-19, 1e-14, 1.0]], dtype=torch.float64)  # ‖Aᵀb‖ = 1e-17 ‖A‖‖b‖, which one step tells
    solution = solved(solve, matrix, b)
    assert not solution.converged and solution.products == 2 * 1 + 3 and not solution.x.any()
    assert solution.residual.tolist() == solution.normal_residual.tolist() == [1.0]


def test_a_transpose_that_is_not_one_ends():
    solution = cgls(lambda x: x.new_zeros(len(x), 12), lambda u: u @ TALL, draws(2, 12))
    assert not solution.converged and solution.iterations <= 2 and not solution.x.any()


def test_the_normal_residual_of_lsmr_and_of_the_series_never_grows():
    matrix = with_singular_values(40, 30, torch.logspace(0, -2, 30, dtype=torch.float64))
    for solve in (lsmr, neumann):
        seen: list[tuple[int, float]] = []
        solution = solved(
            solve, matrix, draws(2, 40), tolerance=1e-8, progress=lambda n, worst, seen=seen: seen.append((n, worst))
        )
        products, normal = (list(part) for part in zip(*seen, strict=True))
        assert normal == sorted(normal, reverse=True) and products == sorted(products)
        assert len(seen) == solution.iterations and normal[-1] == pytest.approx(
            solution.normal_residual.max().item(), rel=0.2
        )


@solvers
@pytest.mark.parametrize("budget", [3, 2000])
def test_rows_do_not_depend_on_each_other(solve, budget):
    left, _, _ = torch.linalg.svd(TALL)
    mixed = draws(3, 12, seed=8)
    nothing = torch.zeros(12, dtype=torch.float64)
    b = torch.stack([left[:, 0], mixed[0], nothing, 1e9 * mixed[1], 1e-9 * mixed[2]])
    options = {"max_iterations": budget, "tolerance": 1e-9, **({"scale": 3.0} if solve is neumann else {})}
    pair = Pair(TALL)
    together = solve(pair.apply, pair.adjoint, b, **options)
    alone = [solved(solve, TALL, row[None], **options) for row in b]
    for row, solution in enumerate(alone):
        torch.testing.assert_close(together.x[row], solution.x[0], rtol=1e-12, atol=1e-13 * b[row].abs().max().item())
        torch.testing.assert_close(together.residual[row], solution.residual[0], rtol=1e-12, atol=1e-14)
    assert together.iterations == max(solution.iterations for solution in alone)
    assert pair.rows[:3] == [5, 4, 4] and pair.rows[3] == 3  # a singular vector is done at once


@solvers
def test_rows_that_are_zero_or_that_no_x_can_lower(solve):
    matrix = torch.cat([torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.zeros(2, 3)]).double()
    b = draws(3, 5, seed=9)
    b[1], b[2, :3] = 0, 0  # nothing, and at a right angle to the range
    solution = solved(solve, matrix, b, tolerance=1e-10)
    assert solution.converged and not solution.x[1:].any() and error(solution.x[:1], truth(matrix, b[:1])) < 1e-8
    assert solution.residual[1:].tolist() == [0.0, 1.0] and solution.normal_residual[1:].tolist() == [0.0, 0.0]
    dense = dense_least_squares(Pair(matrix).apply, 3, b)
    assert not dense.x[1:].any() and dense.residual[1:].tolist() == [0.0, 1.0] and dense.converged
    for nothing in (b[:0], b[1:], b[:, :0]):
        part = matrix[: nothing.shape[1]]
        for found in (solved(solve, part, nothing), dense_least_squares(Pair(part).apply, 3, nothing)):
            assert found.converged and found.iterations == 0 and found.x.shape == (len(nothing), 3)
            assert not found.x.any()
    empty = solved(solve, matrix[:, :0], b)
    assert empty.converged and empty.x.shape == (3, 0) and empty.residual.tolist() == [1.0, 0.0, 1.0]
    assert solved(solve, torch.zeros(5, 3).double(), b).converged


@solvers
@matrices
def test_float32(solve, matrix):
    b = draws(3, len(matrix), seed=10)
    for unit in (1e-25, 1.0, 1e15):
        solution = solved(solve, (matrix * unit).float(), (b * 1e-10).float(), tolerance=1e-5)
        assert solution.x.dtype == solution.residual.dtype == solution.normal_residual.dtype == torch.float32
        assert solution.converged and error(solution.x.double() * unit * 1e10, truth(matrix, b)) < 1e-3


@krylov
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@matrices
def test_a_tolerance_that_rounding_forbids_ends_unconverged(solve, matrix, dtype):
    b = draws(3, len(matrix), seed=11)
    solution = solved(solve, matrix.to(dtype), b.to(dtype), tolerance=0.0)
    eps = torch.finfo(dtype).eps
    assert not solution.converged and solution.iterations < 300
    assert error(solution.x.double(), truth(matrix, b)) < 300 * eps and solution.normal_residual.max() < 50 * eps


@krylov
def test_noisy_products_end(solve):
    noise = torch.Generator().manual_seed(0)

    def noisy(rows: Tensor) -> Tensor:
        return rows * (1 + 1e-6 * torch.randn(rows.shape, generator=noise, dtype=rows.dtype))

    b = draws(2, 12, seed=12)
    solution = solve(lambda x: noisy(x @ TALL.T), lambda u: noisy(u @ TALL), b, tolerance=1e-10, max_iterations=500)
    assert not solution.converged and solution.iterations <= 500 and error(solution.x, truth(TALL, b)) < 1e-4


def test_the_series_is_the_series():
    b = draws(2, 12, seed=13)
    x = torch.zeros(2, 8, dtype=torch.float64)
    for _ in range(3):
        x = x + (b - x @ TALL.T) @ TALL / 2.5**2
    solution = solved(neumann, TALL, b, scale=2.5, max_iterations=3)
    torch.testing.assert_close(solution.x, x, rtol=1e-12, atol=1e-13)
    assert solution.products == 2 * 3 + 1


@pytest.mark.parametrize("ratio", [1.01, 1.2, 1.5])
def test_the_series_converges_above_the_norm_over_the_root_of_two(ratio):
    b = draws(2, 8, seed=14)  # the largest eigenvalues are a pair ±4
    solution = solved(neumann, INDEFINITE, b, scale=ratio * 4 / 2**0.5, tolerance=1e-10, max_iterations=3000)
    assert solution.converged and not solution.diverged and error(solution.x, truth(INDEFINITE, b)) < 1e-8
    assert solved(neumann, INDEFINITE, b, tolerance=1e-10, max_iterations=3000).converged


@pytest.mark.parametrize("scale", [2.7, 2.0, 1e-3])
def test_the_series_diverges_below_it_and_says_what_it_needs(scale):
    b = torch.linalg.eigh(INDEFINITE).eigenvectors[:, -1:].T.contiguous()  # the whole of b is what diverges
    with pytest.raises(
        CurvatureError, match=rf"(?s)diverges at scale {scale:.6g}, .*‖A‖₂ >= 4\n.*above 2.82843 .*LSMR"
    ):
        solved(neumann, INDEFINITE, b, scale=scale)


@pytest.mark.parametrize("scale", [2.82, 2.7, 2.0])
def test_a_series_that_diverges_late_keeps_its_best(scale):
    values, basis = torch.linalg.eigh(INDEFINITE)
    weights = torch.where(values.abs() > 3.9, 1e-3, torch.where(values.abs() > 2.5, 0.0, 1.0)).double()
    b = torch.stack([basis @ weights, basis[:, 3]])  # of the second only rounding diverges
    solution = solved(neumann, INDEFINITE, b, scale=scale, max_iterations=5000)
    assert solution.diverged and not solution.converged and 0.001 < solution.normal_residual[0] < 0.5
    seen, x = list[float](), torch.zeros(1, 8, dtype=torch.float64)
    for _ in range(100):
        x = x + (b[:1] - x @ INDEFINITE) @ INDEFINITE / scale**2
        seen.append(true_residuals(INDEFINITE, x, b[:1])[1].item())
    assert solution.normal_residual[0].item() == pytest.approx(min(seen), rel=1e-9)
    grown = solved(neumann, INDEFINITE, b[:1], scale=scale).iterations  # ends as soon as growth is beyond doubt
    assert grown == 1 + next(
        i for i, now in enumerate(seen) if now > 1.1 * min(seen[: i + 1]) or i > 9 + seen.index(min(seen))
    )
    residual, normal_residual = true_residuals(INDEFINITE, solution.x, b)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(solution.normal_residual, normal_residual, rtol=1e-9, atol=1e-14)
    assert solution.normal_residual[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_series_at_rounding_ends_and_is_not_called_diverged(dtype):
    b = draws(2, 12, seed=15).to(dtype)
    for scale in (2.5, 3.0, None):
        solution = solved(neumann, TALL.to(dtype), b, scale=scale, tolerance=0.0, max_iterations=100_000)
        assert not solution.converged and not solution.diverged and solution.iterations < 2000
        assert solution.normal_residual.max() < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_the_series_needs_a_scale(scale):
    with pytest.raises(CurvatureError, match=r"(?s)no scale to divide by.*positive scale"):
        solved(neumann, TALL, draws(2, 12), scale=scale)


@solvers
@pytest.mark.parametrize("broken", [2, 3, 6])
def test_a_product_that_is_not_finite_names_its_iteration(solve, broken):
    calls = 0

    def breaks(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rows * (float("nan") if calls == broken else 1.0)

    name = {cgls: "CGLS", lsmr: "LSMR", neumann: "The Neumann series"}[solve]
    options = {"scale": 3.0} if solve is neumann else {}
    what = "A" if broken % 2 == 0 else "Aᵀ"
    with pytest.raises(CurvatureError, match=f"{name}: a product with {what} is NaN or .* iteration {broken // 2}"):
        solve(lambda x: breaks(x @ TALL.T), lambda u: breaks(u @ TALL), draws(2, 12), **options)


@solvers
def test_what_is_no_right_hand_side_or_no_product(solve):
    for b in (draws(12), draws(2, 12).half(), torch.ones(2, 12, dtype=torch.int64)):
        with pytest.raises(CurvatureError, match=r"expected: \(Q, P\) float32 or float64"):
            solved(solve, TALL, b)
    with pytest.raises(CurvatureError, match="right-hand sides contain NaN"):
        solved(solve, TALL, draws(2, 12) * float("inf"))
    apply, adjoint, b = Pair(TALL).apply, Pair(TALL).adjoint, draws(2, 12)
    with pytest.raises(CurvatureError, match=r"(?s)product with A has another shape.*\(1, 12\).*found: \(1, 3\)"):
        solve(lambda x: apply(x)[:, :3], adjoint, b[:1])
    for wrong in (lambda u: adjoint(u)[0], lambda u: adjoint(u)[:1], lambda u: adjoint(u).float()):
        with pytest.raises(CurvatureError, match=r"(?s)product with Aᵀ has another shape.*\(2, n\).*HINT"):
            solve(apply, wrong, b)
    widths = iter([8, 7, 7, 7])
    with pytest.raises(CurvatureError, match=r"(?s)product with Aᵀ has another shape.*\(2, 8\).*\(2, 7\)"):
        solve(apply, lambda u: adjoint(u)[:, : next(widths)], b, **({"scale": 3.0} if solve is neumann else {}))


def test_dense_writes_out_small_matrices_only():
    matrix, b = draws(70, 130), draws(2, 70, seed=1)
    pair = Pair(matrix)
    solution = dense_least_squares(pair.apply, 130, b)
    assert pair.rows == [64, 64, 2] and solution.products == 3
    torch.testing.assert_close(solution.x, truth(matrix, b), rtol=1e-10, atol=1e-11)
    single = dense_least_squares(lambda x: x @ matrix.float().T, 130, b.float())
    assert single.x.dtype == torch.float32 and error(single.x.double(), truth(matrix, b)) < 1e-4
    with pytest.raises(CurvatureError, match=r"(?s)too many columns.*8192.*found: 8193.*lsmr"):
        dense_least_squares(pair.apply, 8193, b)
    with pytest.raises(CurvatureError, match="Dense least squares: a product with A is NaN"):
        dense_least_squares(lambda x: pair.apply(x) * float("nan"), 130, b)
    with pytest.raises(CurvatureError, match=r"(?s)another shape.*\(64, 70\)"):
        dense_least_squares(lambda x: pair.apply(x)[:, 1:], 130, b)
    with pytest.raises(CurvatureError, match="not rows of float32"):
        dense_least_squares(pair.apply, 130, b[0])


@solvers
def test_inputs_are_left_alone_and_nothing_is_differentiated(solve):
    b = draws(2, 12, seed=16).requires_grad_()
    before = b.detach().clone()
    matrix = TALL.clone().requires_grad_()
    state = torch.get_rng_state()
    solution = solved(solve, matrix, b)
    assert solution.converged and not solution.x.requires_grad and not solution.residual.requires_grad
    assert torch.equal(b, before) and torch.equal(matrix, TALL) and torch.equal(torch.get_rng_state(), state)
