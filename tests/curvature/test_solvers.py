"""The solvers against torch.linalg in float64: what they solve, what they say of it, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_influence.curvature.solvers import Solution, conjugate_gradient, largest_eigenvalue, lissa, minres
from lightning_influence.errors import CurvatureError

KRYLOV = [conjugate_gradient, minres]
SOLVERS: list[Callable[..., Solution]] = [*KRYLOV, lissa]
NAMES = [solver.__name__ for solver in SOLVERS]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    basis, _ = torch.linalg.qr(draws(len(values), len(values), seed=seed))
    return (basis * values) @ basis.T


def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows @ matrix


class Counted:
    """A product that remembers how many rows it was asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.rows = matrix, list[int]()

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return rows @ self.matrix


def true_residual(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    return (b - x @ matrix).norm(dim=1) / b.norm(dim=1)


SPD = with_spectrum(torch.linspace(1.0, 5.0, 12))
INDEFINITE = with_spectrum([-4.0, -1.5, -0.3, 0.2, 0.9, 2.0, 3.0, 7.0])
SINGULAR = with_spectrum([0.0, 0.0, 0.0, 0.5, 1.0, 2.0, 2.0, 6.0])


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_positive_definite(solve):
    b = draws(3, 12, seed=1)
    solution = solve(product(SPD), b, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(SPD, b.T).T, rtol=1e-10, atol=1e-11)
    assert solution.converged and solution.iterations > 0
    assert solution.residual.shape == (3,) and (solution.residual <= 1e-12).all()


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=7),
    queries=st.integers(1, 4),
    size=st.sampled_from([1e-200, 1.0, 1e200]),
    seed=st.integers(0, 1000),
)
def test_any_positive_definite_matrix_and_any_size_of_the_right_hand_side(values, queries, size, seed):
    matrix, b = with_spectrum(values, seed), draws(queries, len(values), seed=seed + 1)
    expected = torch.linalg.solve(matrix, b.T).T
    for solve in KRYLOV:
        solution = solve(product(matrix), b * size, tolerance=1e-12)
        torch.testing.assert_close(solution.x / size, expected, rtol=1e-9, atol=1e-9)
        assert solution.converged


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_float32(solve):
    b = draws(3, 12, seed=1)
    solution = solve(product(SPD.float()), b.float() * 1e-30, tolerance=1e-5)
    assert solution.x.dtype == solution.residual.dtype == torch.float32 and solution.converged
    torch.testing.assert_close(solution.x.double() * 1e30, torch.linalg.solve(SPD, b.T).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solve", KRYLOV)
def test_what_float32_cannot_reach_is_not_called_converged(solve):
    """The recurrences go below the tolerance; the true residual stops at eps ‖A‖‖x‖/‖b‖, and that is what counts."""
    matrix, b = with_spectrum(torch.logspace(-3, 0, 60, dtype=torch.float64)), draws(2, 60, seed=2)
    solution = solve(product(matrix.float()), b.float(), tolerance=1e-6)
    assert not solution.converged and solution.iterations < 500
    assert (true_residual(matrix.float().double(), solution.x.double(), b.float().double()) < 3e-5).all()
    assert solve(product(matrix), b, tolerance=1e-12).converged


@pytest.mark.parametrize(
    "solve, digits", [(solve, digits) for solve in KRYLOV for digits in (3, 6, 10)] + [(conjugate_gradient, 13)]
)
def test_ill_conditioned(solve, digits):
    matrix = torch.diag(torch.logspace(0, -digits, 8, dtype=torch.float64))
    b = torch.ones(1, 8, dtype=torch.float64)
    solution = solve(product(matrix), b, tolerance=1e-8)
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b.T).T, rtol=1e-7, atol=0)
    assert solution.converged


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_residual_is_the_true_one_and_stopping_early_is_not_an_error(solve, steps):
    b = draws(3, 12, seed=1)
    budget = {"depth": steps} if solve is lissa else {"max_iterations": steps}
    solution = solve(product(SPD), b, **budget)
    assert not solution.converged and solution.iterations == steps
    torch.testing.assert_close(solution.residual, true_residual(SPD, solution.x, b), rtol=1e-10, atol=1e-14)


def test_few_eigenvalues_take_few_steps():
    matrix = with_spectrum([1.0] * 10 + [3.0] * 10 + [7.0] * 10)
    for solve in KRYLOV:
        counted = Counted(matrix)
        solution = solve(counted, draws(2, 30), tolerance=1e-10)
        assert solution.converged and solution.iterations == 3 and counted.rows == [2] * 4  # the last one verifies


@pytest.mark.parametrize("solve", KRYLOV)
def test_a_preconditioner_makes_an_ill_conditioned_system_easy(solve):
    stretch = torch.logspace(-4, 4, 40, dtype=torch.float64)
    matrix = stretch[:, None] * with_spectrum(torch.linspace(1.0, 2.0, 40)) * stretch  # condition number 1e16
    b = draws(3, 40, seed=3) * stretch
    plain = solve(product(matrix), b, tolerance=1e-10, max_iterations=40)
    helped = solve(
        product(matrix), b, tolerance=1e-10, max_iterations=40, preconditioner=lambda r: r / matrix.diagonal()
    )
    assert not plain.converged and helped.converged
    torch.testing.assert_close(helped.residual, true_residual(matrix, helped.x, b), rtol=1e-2, atol=1e-14)
    exact = solve(product(matrix), b, preconditioner=lambda r: torch.linalg.solve(matrix, r.T).T)
    assert exact.converged and exact.iterations <= 2


@pytest.mark.parametrize("solve", KRYLOV)
def test_a_preconditioner_that_is_not_positive_definite(solve):
    with pytest.raises(CurvatureError, match="preconditioner that is not positive definite"):
        solve(product(SPD), draws(2, 12), preconditioner=torch.neg)


def test_indefinite_is_refused_by_conjugate_gradients_and_solved_by_minres():
    b = draws(3, 8, seed=4)
    with pytest.raises(CurvatureError, match=r"(?s)negative curvature in iteration \d+.*HINT.*GGN.*MINRES.*damping"):
        conjugate_gradient(product(INDEFINITE), b)
    solution = minres(product(INDEFINITE), b, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(INDEFINITE, b.T).T, rtol=1e-9, atol=1e-10)
    assert solution.converged
    helped = minres(product(INDEFINITE), b, tolerance=1e-12, preconditioner=product(with_spectrum([0.5] * 4 + [2] * 4)))
    torch.testing.assert_close(helped.x, solution.x, rtol=1e-9, atol=1e-10)


def test_curvature_that_is_exactly_zero_between_two_signs_is_refused():
    matrix, b = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(CurvatureError, match="negative curvature in iteration 1"):
        conjugate_gradient(product(matrix), b)
    torch.testing.assert_close(minres(product(matrix), b).x, torch.tensor([[1.0, -1.0]], dtype=torch.float64))


@pytest.mark.parametrize("tolerance", [1e-10, 0.0])
@pytest.mark.parametrize("solve", KRYLOV)
def test_singular_and_consistent_gives_the_solution_of_least_norm(solve, tolerance):
    b = draws(3, 8, seed=5) @ SINGULAR
    solution = solve(product(SINGULAR), b, tolerance=tolerance)
    expected = torch.linalg.lstsq(SINGULAR, b.T, driver="gelsd", rcond=1e-12).solution.T
    torch.testing.assert_close(solution.x, expected, rtol=1e-8, atol=1e-9)
    assert solution.converged == (tolerance > 0) and (solution.residual < 1e-10).all()


def test_singular_indefinite_and_consistent():
    matrix = with_spectrum([-3.0, -1.0, 0.0, 0.0, 0.5, 2.0])
    b = draws(3, 6, seed=5) @ matrix
    solution = minres(product(matrix), b, tolerance=1e-12)
    expected = torch.linalg.lstsq(matrix, b.T, driver="gelsd", rcond=1e-12).solution.T
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-10)
    assert solution.converged


def test_singular_and_inconsistent_gives_the_least_residual_and_says_so():
    b = draws(3, 8, seed=6)
    for matrix in (SINGULAR, with_spectrum([-3.0, -1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 2.5])):
        solution = minres(product(matrix), b)
        expected = torch.linalg.lstsq(matrix, b.T, driver="gelsd", rcond=1e-12).solution.T
        torch.testing.assert_close(solution.residual, true_residual(matrix, expected, b), rtol=1e-6, atol=0)
        assert not solution.converged and solution.iterations < 100
    found = conjugate_gradient(product(SINGULAR), b)  # least residual is not what it is after, but it must end
    assert not found.converged and found.iterations < 100 and found.residual.isfinite().all()


@pytest.mark.parametrize("solve", KRYLOV)
def test_no_curvature_at_all(solve):
    solution = solve(torch.zeros_like, draws(2, 5))
    assert not solution.x.any() and not solution.converged and (solution.residual > 0.999).all()


def test_lissa_with_a_given_scale():
    b = draws(2, 12, seed=7)
    solution = lissa(product(SPD), b, scale=5.0, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(SPD, b.T).T, rtol=1e-10, atol=1e-11)
    two = lissa(product(SPD), b, scale=5.0, depth=2)
    step = torch.eye(12, dtype=torch.float64) - SPD / 5
    torch.testing.assert_close(two.x, (b + b @ step + b @ step @ step) / 5, rtol=1e-10, atol=1e-12)
    assert lissa(product(SPD), b, scale=2.6).converged  # above half the largest eigenvalue


@pytest.mark.parametrize("matrix, scale", [(SPD, 2.4), (SPD, 0.01), (INDEFINITE, 8.0)])
def test_lissa_diverges(matrix, scale):
    with pytest.raises(CurvatureError, match=rf"(?s)LiSSA diverges at scale {scale:.6g}.*‖b − Ax‖ = .*norm .*HINT"):
        lissa(product(matrix), draws(2, len(matrix), seed=8), scale=scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), None])
def test_lissa_needs_a_scale(scale):
    with pytest.raises(CurvatureError, match="LiSSA has no scale"):
        lissa(torch.zeros_like, draws(2, 5), scale=scale)


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_zero_right_hand_sides(solve):
    b = draws(3, 12, seed=9)
    b[1] = 0
    solution = solve(product(SPD), b)
    assert solution.converged and not solution.x[1].any() and solution.residual[1] == 0
    for nothing in (torch.zeros_like(b), b[:0], b[:, :0]):
        solution = solve(product(SPD), nothing)
        assert solution.converged and solution.iterations == 0
        assert solution.x.shape == nothing.shape and not solution.x.any() and not solution.residual.any()


@pytest.mark.parametrize("budget", [3, 1000])
@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_rows_do_not_depend_on_each_other(solve, budget):
    basis = torch.linalg.eigh(SPD).eigenvectors
    mixed = draws(3, 12, seed=10)
    b = torch.stack([basis[:, 0], mixed[0], torch.zeros(12, dtype=torch.float64), 1e9 * mixed[1], 1e-9 * mixed[2]])
    options = {"depth" if solve is lissa else "max_iterations": budget, **({"scale": 5.0} if solve is lissa else {})}
    counted = Counted(SPD)
    together = solve(counted, b, **options)
    alone = [solve(product(SPD), row[None], **options) for row in b]
    for row, solution in zip(range(len(b)), alone, strict=True):
        torch.testing.assert_close(together.x[row], solution.x[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(together.residual[row], solution.residual[0], rtol=1e-4, atol=1e-14)
    assert together.iterations == max(solution.iterations for solution in alone)
    assert counted.rows[0] == 4 and (solve is lissa or counted.rows[1] == 3)  # an eigenvector is done at once


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_a_product_that_is_not_finite_names_its_iteration(solve):
    calls = 0

    def breaks(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rows @ SPD * (float("nan") if calls == 3 else 1.0)

    options = {"scale": 5.0} if solve is lissa else {}
    with pytest.raises(CurvatureError, match="curvature is NaN or infinite in iteration 3"):
        solve(breaks, draws(2, 12), **options)


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_what_is_no_right_hand_side_or_no_product(solve):
    for b in (draws(12), draws(2, 12).half(), torch.ones(2, 12, dtype=torch.int64)):
        with pytest.raises(CurvatureError, match=r"expected: \(Q, P\) float32 or float64"):
            solve(product(SPD), b)
    with pytest.raises(CurvatureError, match="right-hand sides contain NaN"):
        solve(product(SPD), draws(2, 12) * float("inf"))
    with pytest.raises(CurvatureError, match="another shape"):
        solve(lambda rows: rows[:, :3], draws(2, 12))


@pytest.mark.parametrize("solve", SOLVERS, ids=NAMES)
def test_progress_and_inputs_left_alone(solve):
    seen: list[tuple[int, float]] = []
    b = draws(2, 12, seed=11).requires_grad_()
    before = b.detach().clone()
    identity_like = solve(lambda rows: rows, b, progress=lambda step, worst: seen.append((step, worst)))
    assert identity_like.converged and not identity_like.x.requires_grad
    torch.testing.assert_close(identity_like.x, before, rtol=1e-6, atol=0)
    assert torch.equal(b, before) and seen[0][0] == 1 and seen[-1][1] <= 1e-6


@pytest.mark.parametrize("values", [[1.0, -1.0], [2.0, -5.0, 5.0], [-7.0, 1.0, 3.0], [0.5], [1e-3, 4.0, 3.0, 2.0]])
def test_largest_eigenvalue(values):
    matrix = with_spectrum(values)
    expected = torch.linalg.eigvalsh(matrix).abs().max().item()
    found = largest_eigenvalue(product(matrix), matrix[0])
    assert found == pytest.approx(expected, rel=1e-5)
    state = torch.get_rng_state()
    assert found == largest_eigenvalue(product(matrix), matrix)
    assert torch.equal(torch.get_rng_state(), state)
    single = largest_eigenvalue(product(matrix.float()), matrix[0].float(), seed=1)
    assert single == pytest.approx(expected, rel=1e-4)


def test_largest_eigenvalue_stops_and_refuses():
    assert largest_eigenvalue(torch.zeros_like, draws(4)) == 0.0
    counted = Counted(torch.eye(4, dtype=torch.float64))
    assert largest_eigenvalue(counted, draws(4)) == pytest.approx(1.0) and counted.rows == [1, 1]
    below = largest_eigenvalue(product(SPD), draws(12), iterations=3)
    assert 2.0 < below <= 5.0
    with pytest.raises(CurvatureError, match=r"Power iteration.*iteration 1"):
        largest_eigenvalue(lambda rows: rows * float("nan"), draws(4))
