"""Solving min ‖b − A x‖ when A is known only by its products and those of its transpose: CGLS, LSMR, Neumann, dense.

A may have any shape and rank; every solver starts from x = 0 and so finds the solution of least norm, A⁺ b. As in
`solvers`, all rows of b are solved at once and at unit length, a row that is finished leaves the batch, nothing warns,
and what cannot be meant is refused with a `CurvatureError`. A step costs two products, one with A and one with Aᵀ. With
κ = σmax/σmin, ‖Aᵀr‖ = τ ‖Aᵀb‖ leaves x an error of up to κ² τ, and rounding one of eps (κ + κ² ‖r‖/(‖A‖‖x‖)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.curvature.rows import check_rows, finite_product, rounding_of, row_norms, unit_rows
from lightning_influence.curvature.solvers import GROWTH, HELPS, SAFETY, MatVec, Progress, largest_eigenvalue
from lightning_influence.errors import CurvatureError

_PATIENCE = 10  # steps in which a series, whose every step lowers ‖Aᵀr‖, may fail to: it has come to rounding
_DENSE = 8192  # columns that are written out at most
_CHUNK = 64  # columns a product


@dataclass(frozen=True)
class LeastSquares:
    """What a solver found, row by row, and how good it is; r = b − A x by products with this very x.

    Attributes:
        x: (Q, n), in units of b over units of A.
        residual: (Q,), ‖r‖/‖b‖; 0 where b is 0. Its least value is 0 only where b lies in the range of A.
        normal_residual: (Q,), ‖Aᵀr‖/‖Aᵀb‖, which is 0 at every solution; 0 where Aᵀb is 0.
        iterations: steps of the row that took most.
        products: with A or Aᵀ, of any number of rows, all together.
        converged: whether one of the two residuals of every row is at most the tolerance.
        diverged: whether a Neumann series diverged; x is then the best iterate before that.
    """

    x: Tensor
    residual: Tensor
    normal_residual: Tensor
    iterations: int
    products: int
    converged: bool
    diverged: bool = False


def cgls(
    apply: MatVec,
    adjoint: MatVec,
    b: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    progress: Progress | None = None,
) -> LeastSquares:
    """A⁺ b by conjugate gradients on AᵀA x = Aᵀb, which is never formed.

        q = A p,   α = ‖s‖²/‖q‖²,   x ← x + α p,   r ← r − α q,   s = Aᵀr,   p ← s + (‖s‖²new/‖s‖²old) p

    (Hestenes & Stiefel 1952; Björck 1996, "Numerical methods for least squares problems", 7.4). ‖r‖ and the error of x
    fall at every step, ‖Aᵀr‖ need not. Where the recurrence has met the tolerance and the true residuals have not, a
    row starts over from the true r for as long as that helps. Where Aᵀb is not 0 but within rounding of it, x stays 0,
    unconverged.

    Args:
        apply: A x of every row, (Q, n) -> (Q, m), any Q.
        adjoint: Aᵀ u of every row, (Q, m) -> (Q, n).
        b: (Q, m), float32 or float64.
        tolerance: a row is done when ‖Aᵀr‖/‖Aᵀb‖ or ‖r‖/‖b‖ is at most this.
        max_iterations: steps that a row may take; with more to go it is returned with ``converged=False``.
        progress: called after every step with the products so far and the worst ‖Aᵀr‖/‖Aᵀb‖ of the rows at work.

    Raises:
        CurvatureError: NaN or infinity from a product (names the iteration); a product of another shape or type; a `b`
            that is not rows of float32 or float64.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> b = torch.tensor([[6.0, 0.0, 0.0]], dtype=torch.float64)
        >>> solution = cgls(lambda x: x @ A.T, lambda u: u @ A, b)
        >>> [round(value, 6) for value in solution.x[0].tolist()], solution.iterations, solution.products
        ([5.0, -3.0], 2, 7)
    """
    return _refined(_cgls, _Problem("CGLS", apply, adjoint, b, progress), tolerance, max_iterations)


def lsmr(
    apply: MatVec,
    adjoint: MatVec,
    b: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    progress: Progress | None = None,
) -> LeastSquares:
    """A⁺ b by MINRES on AᵀA x = Aᵀb, which is never formed: ‖Aᵀr‖ is the least in its Krylov space, and never grows.

        A V_k = U_{k+1} B_k,   x_k = V_k y,   y = argmin ‖Aᵀ(b − A V_k y)‖

    (Fong & Saunders 2011, arXiv:1006.0758, by the Golub–Kahan process, B_k lower bidiagonal). It can stop earlier than
    `cgls` at the same tolerance. Arguments, restarts and errors are those of `cgls`.
    """
    return _refined(_lsmr, _Problem("LSMR", apply, adjoint, b, progress), tolerance, max_iterations)


def neumann(
    apply: MatVec,
    adjoint: MatVec,
    b: Tensor,
    *,
    scale: float | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    progress: Progress | None = None,
) -> LeastSquares:
    """A⁺ b by the normalised Neumann series of AᵀA.

        x ← x + Aᵀ(b − A x)/scale²,   started at 0

    (Lyu et al. 2023, arXiv:2312.05586). It converges if and only if scale > ‖A‖₂/√2, ‖Aᵀr‖ then falling at every step,
    by 1 − (σmin/scale)² in the end; `cgls` and `lsmr` need far fewer steps. A row whose ‖Aᵀr‖ grows has diverged: its
    best iterate is kept. Arguments and errors as for `cgls`, and:

    Args:
        scale: in units of A. None: 1.1 times ‖A‖₂ by power iteration on AᵀA, whose products are counted too.

    Raises:
        CurvatureError: a series diverges before any iterate is better than x = 0; the scale is not positive.
    """
    problem = _Problem("The Neumann series", apply, adjoint, b, progress)
    rows = problem.rows
    x, s, size = problem.x[rows], problem.s[rows], problem.size[rows]
    if scale is None:  # v ← Aᵀu/‖Aᵀu‖, u = A v/‖A v‖: ‖Aᵀu‖ is ‖A‖₂ in the end, and no square under- or overflows
        one = size.new_ones(1)

        def power(v: Tensor) -> Tensor:
            return problem.adjoint(unit_rows(problem.apply(v, one))[0], one)

        scale = SAFETY * (largest_eigenvalue(power, s) if len(rows) else 1.0)
    if not 0 < scale < float("inf"):
        raise CurvatureError(
            "The Neumann series has no scale to divide by.",
            expected="a positive scale, in units of A",
            found=scale,
            hint="Pass a scale of ‖A‖₂ or more, or None to measure it.",
        )
    best_step, last, diverged = torch.zeros_like(rows), torch.ones_like(size), False
    for step in range(1, max_iterations + 1):
        if not rows.numel():
            break
        ratio = scale / size
        x = x + s / ratio[:, None] / ratio[:, None]
        r = problem.r[rows] - problem.apply(x, size)
        s = problem.adjoint(r, size)
        before, last, best = last, row_norms(s), problem.normal_residual[rows]
        problem.keep(rows, last < best, x, row_norms(r), last)
        problem.steps[rows], best_step = step, torch.where(last < best, step, best_step)
        noise = rounding_of(x) * ratio * (1 + ratio * row_norms(x))
        stuck = step - best_step >= _PATIENCE
        worse = (last > GROWTH * best + noise) | (stuck & (last > best + noise))
        if (worse & (best >= 1)).any():
            needed = scale * (1 + (last / before)[worse].max().item()) ** 0.5
            raise CurvatureError(
                f"The Neumann series diverges at scale {scale:.6g}, and no iterate is better than x = 0.",
                expected=f"‖A‖₂ below √2 scale = {2**0.5 * scale:.6g}",
                found=f"‖Aᵀ(b − Ax)‖ = {last[worse].max().item():.3g} ‖Aᵀb‖ in step {step}, so ‖A‖₂ >= {needed:.6g}",
                hint=f"Take a scale above ‖A‖₂/√2, so above {needed / 2**0.5:.6g} (None measures it), or CGLS or LSMR.",
            )
        diverged = diverged or bool(worse.any())
        problem.report(last)
        going = (last > tolerance) & (row_norms(r) > tolerance) & ~worse & ~stuck
        rows, x, s, size, last, best_step = _kept(going, rows, x, s, size, last, best_step)
    return problem.solution(tolerance, diverged)


def dense_least_squares(apply: MatVec, n: int, b: Tensor) -> LeastSquares:
    """A⁺ b by writing A out, column by column, and its singular values (LAPACK gelsd on the CPU, in the type of b).

    For small n only: the truth that the others are held against. Singular values below eps max(m, n) of the largest
    count as zero.

    Args:
        apply: A x of every row, (Q, n) -> (Q, m), any Q.
        n: columns of A, at most 8192.
        b: (Q, m), float32 or float64.

    Raises:
        CurvatureError: a larger n; NaN, infinity or another shape from a product.
    """
    check_rows(b)
    if n > _DENSE:
        raise CurvatureError(
            "The matrix has too many columns to be written out.",
            expected=f"n <= {_DENSE}",
            found=n,
            hint="Use lsmr or cgls, which need only products.",
        )
    solver, unit = "Dense least squares", torch.eye(n, dtype=b.dtype, device=b.device)
    chunks = [unit[start : start + _CHUNK] for start in range(0, n, _CHUNK)]
    columns = [_sound(solver, apply(chunk), chunk, "A", b.shape[1], i) for i, chunk in enumerate(chunks, 1)]
    transposed = torch.cat([b.new_zeros(0, b.shape[1]), *columns])  # (n, m)
    problem = _Problem(solver, lambda x: x @ transposed, lambda u: u @ transposed.T, b)
    rows, size = problem.rows, problem.size[problem.rows]
    if len(rows):
        x = torch.linalg.lstsq(transposed.T.cpu(), problem.r[rows].T.cpu(), driver="gelsd").solution.T.to(b.device)
        x = x * size[:, None]
        r = problem.r[rows] - problem.apply(x, size)
        problem.keep(
            rows, torch.ones_like(rows, dtype=torch.bool), x, row_norms(r), row_norms(problem.adjoint(r, size))
        )
    problem.products = len(columns)
    return problem.solution(float("inf"))


class _Problem:
    """One solve: its products, checked and counted under the solver's name, where it starts, and the best x so far.

    Rows of b are at unit length, and every row has its own unit of A, `size` = ‖Aᵀb‖/‖b‖: solvers see A/size and
    x size, whose squares neither under- nor overflow.
    """

    def __init__(
        self, solver: str, apply: MatVec, adjoint: MatVec, b: Tensor, progress: Progress | None = None
    ) -> None:
        check_rows(b)
        self.solver, self.products = solver, 0
        self._apply, self._adjoint, self._progress = apply, adjoint, progress
        self._m, self._n = b.shape[1], -1  # n: as the first product with Aᵀ says
        self.r, self._norms = unit_rows(b.detach())
        self.s, self.size = unit_rows(self.adjoint(self.r, b.new_ones(1)))  # Aᵀr in units of size: ‖s‖ = 1
        self.rows = self.size.nonzero().squeeze(1)  # of x that are not 0
        self.residual, self.normal_residual = ((part > 0).to(b.dtype) for part in (self._norms, self.size))
        self.size = torch.where(self.size > 0, self.size, 1.0)
        self.x, self.steps = torch.zeros_like(self.s), torch.zeros_like(self.size, dtype=torch.int64)

    def apply(self, rows: Tensor, size: Tensor) -> Tensor:
        """A/size times every row, (Q, n) -> (Q, m)."""
        self.products += 1
        out = _sound(self.solver, self._apply(rows), rows, "A", self._m, self.products // 2)
        return out / size[:, None]

    def adjoint(self, rows: Tensor, size: Tensor) -> Tensor:
        """Aᵀ/size times every row, (Q, m) -> (Q, n)."""
        self.products += 1
        out = _sound(self.solver, self._adjoint(rows), rows, "Aᵀ", self._n, self.products // 2)
        self._n = out.shape[1]
        return out / size[:, None]

    def report(self, normal: Tensor) -> None:
        """Tell the caller how far the rows at work are, (Q,)."""
        if self._progress is not None:
            self._progress(self.products, normal.max().item())

    def keep(self, rows: Tensor, better: Tensor, x: Tensor, residual: Tensor, normal: Tensor) -> None:
        """Take these x for those of the rows where they are better."""
        rows = rows[better]
        self.x[rows], self.residual[rows], self.normal_residual[rows] = _kept(better, x, residual, normal)

    def solution(self, tolerance: float, diverged: bool = False) -> LeastSquares:
        """What was kept, in the caller's units."""
        x, iterations = self.x / self.size[:, None] * self._norms[:, None], int(self.steps.max()) if len(self.x) else 0
        converged = bool((torch.minimum(self.residual, self.normal_residual) <= tolerance).all())
        return LeastSquares(x, self.residual, self.normal_residual, iterations, self.products, converged, diverged)


_State: TypeAlias = tuple[Tensor, ...]  # of a recurrence, row by row; x (Q, n) is its first
# problem, sizes, largest ‖Ap‖/‖p‖ so far, state -> state, ‖r‖, ‖s‖, largest, whether a row must end here
_Stepped: TypeAlias = tuple[_State, Tensor, Tensor, Tensor, Tensor]
_Step: TypeAlias = Callable[[_Problem, Tensor, Tensor, _State], _Stepped]
_Method: TypeAlias = tuple[Callable[[Tensor, Tensor], _State], _Step]  # the state at x = 0 from r (Q, m) and s (Q, n)


def _refined(method: _Method, problem: _Problem, tolerance: float, max_iterations: int) -> LeastSquares:
    """Passes of `method`, each on the true residual that the last one left, while they help (iterative refinement)."""
    rows, r, s, largest = problem.rows, problem.r.clone(), problem.s.clone(), torch.zeros_like(problem.size)
    first = True
    while rows.numel():
        norms = torch.stack([problem.residual[rows], problem.normal_residual[rows]], 1)
        goals, size = (torch.finfo(r.dtype).eps * norms).clamp_min(tolerance), problem.size[rows]
        budget = max_iterations - problem.steps[rows]
        step, taken, largest[rows] = _pass(method, problem, r[rows], s[rows], size, goals, budget, largest[rows])
        problem.steps[rows] += taken
        x = problem.x[rows] + step
        left = problem.r[rows] - problem.apply(x, size)
        pull = problem.adjoint(left, size)
        residual, normal = row_norms(left), row_norms(pull)
        helped = (normal <= HELPS * norms[:, 1]) | (first & _told(largest[rows]))  # few steps may raise ‖Aᵀr‖
        problem.keep(rows, helped, x, residual, normal)
        r[rows], s[rows], first = left, pull, False
        rows = rows[helped & (torch.minimum(residual, normal) > tolerance) & (problem.steps[rows] < max_iterations)]
    return problem.solution(tolerance)


def _pass(
    method: _Method, problem: _Problem, r: Tensor, s: Tensor, size: Tensor, goals: Tensor, budget: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From x = 0 until ‖r‖ or ‖s‖ meets its goal (Q, 2), or the budget is spent: x, steps taken, largest ‖Ap‖/‖p‖."""
    begin, advance = method
    found, taken, largest = torch.zeros_like(s), torch.zeros_like(budget), top.clone()
    rows, step, state = torch.arange(len(r), device=r.device), 0, begin(r, s)
    residual, normal, ended = row_norms(r), row_norms(s), budget <= 0
    while True:
        floor = torch.finfo(r.dtype).eps * top * residual  # the rounding error of the product that s is
        going = (residual > goals[:, 0]) & (normal > torch.maximum(goals[:, 1], floor)) & (step < budget) & ~ended
        going = going & _told(top)
        if not going.all():
            found[rows], taken[rows], largest[rows] = state[0], step, top
            rows, size, goals, budget, top = _kept(going, rows, size, goals, budget, top)
            state = _kept(going, *state)
        if not rows.numel():
            return found, taken, largest
        state, residual, normal, top, ended = advance(problem, size, top, state)
        step += 1
        problem.report(normal)


def _cgls_begin(r: Tensor, s: Tensor) -> _State:
    return torch.zeros_like(s), r, s, row_norms(s)


def _cgls_step(problem: _Problem, size: Tensor, largest: Tensor, state: _State) -> _Stepped:
    x, r, p, before = state
    q = problem.apply(p, size)
    image, length = row_norms(q), row_norms(p)
    largest = torch.maximum(largest, image / length)
    flat = image <= rounding_of(q) * largest * length
    alpha = torch.where(flat, 0.0, (before / torch.where(flat, 1.0, image)).square())[:, None]
    x, r = x + alpha * p, r - alpha * q
    s = problem.adjoint(r, size)
    residual, normal = row_norms(r), row_norms(s)
    p = s + (normal / before).square()[:, None] * p
    noise = (normal >= before) & (normal <= rounding_of(r) * largest * residual)
    return (x, r, p, normal), residual, normal, largest, flat | noise


def _lsmr_begin(r: Tensor, s: Tensor) -> _State:
    (u, beta), (v, zeta_bar) = unit_rows(r), unit_rows(s)
    alpha, zero, one = zeta_bar / beta, torch.zeros_like(beta), torch.ones_like(beta)
    vectors, process = (torch.zeros_like(v), u, v, v, torch.zeros_like(v)), (alpha, alpha, one, one, one, zero)
    return *vectors, *process, zero, zeta_bar, beta, zero, one, zero, zero


def _lsmr_step(problem: _Problem, size: Tensor, largest: Tensor, state: _State) -> _Stepped:
    """In Fong & Saunders' letters: α, β of the Golub–Kahan process; |ζ̄| = ‖Aᵀr‖; d dotted, t with a tilde, for ‖r‖."""
    x, u, v, h, h_bar, alpha, alpha_bar, rho_old, rho_bar_old, c_bar, s_bar, zeta_old, zeta_bar, *state_r = state
    beta_dd, beta_d, rho_d, tau_t, theta_t = state_r
    u, beta = unit_rows(problem.apply(v, size) - alpha[:, None] * u)
    largest = torch.maximum(largest, torch.hypot(alpha, beta))  # ‖A v‖
    v, alpha = unit_rows(problem.adjoint(u, size) - beta[:, None] * v)
    rho = torch.hypot(alpha_bar, beta)
    cos, sin = alpha_bar / rho, beta / rho
    theta, alpha_bar, theta_bar = sin * alpha, cos * alpha, s_bar * rho
    rho_bar = torch.hypot(c_bar * rho, theta)
    c_bar, s_bar = c_bar * rho / rho_bar, theta / rho_bar
    zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
    h_bar = h - (theta_bar / rho_old * rho / rho_bar_old)[:, None] * h_bar
    x = x + (zeta / rho / rho_bar)[:, None] * h_bar
    h = v - (theta / rho)[:, None] * h
    beta_hat, beta_dd, rho_t = cos * beta_dd, -sin * beta_dd, torch.hypot(rho_d, theta_bar)
    c_t, s_t, tau_t = rho_d / rho_t, theta_bar / rho_t, (zeta_old - theta_t * tau_t) / rho_t
    beta_d, theta_t, rho_d = c_t * beta_hat - s_t * beta_d, s_t * rho_bar, c_t * rho_bar
    residual = torch.hypot(beta_d - (zeta - theta_t * tau_t) / rho_d, beta_dd)
    state = (x, u, v, h, h_bar, alpha, alpha_bar, rho, rho_bar, c_bar, s_bar, zeta, zeta_bar)
    return (*state, beta_dd, beta_d, rho_d, tau_t, theta_t), residual, zeta_bar.abs(), largest, alpha <= 0


_cgls: _Method = (_cgls_begin, _cgls_step)
_lsmr: _Method = (_lsmr_begin, _lsmr_step)


def _sound(solver: str, out: Tensor, rows: Tensor, what: str, width: int, iteration: int) -> Tensor:
    fits = out.dim() == 2 and len(out) == len(rows) and width in (-1, out.shape[1])
    if not fits or out.dtype != rows.dtype or out.device != rows.device:
        raise CurvatureError(
            f"{solver}: a product with {what} has another shape, type or device than it should.",
            expected=f"({len(rows)}, {'n' if width < 0 else width}) {rows.dtype} on {rows.device}",
            found=f"{tuple(out.shape)} {out.dtype} on {out.device}",
            hint="A must take (Q, n) to (Q, m), and Aᵀ (Q, m) to (Q, n), for every number of rows Q.",
        )
    return finite_product(out, f"{solver}: a product with {what}", iteration)


def _told(largest: Tensor) -> Tensor:
    """Whether Aᵀb, whose length is 1, is told from the rounding error of its product, so that x is not noise."""
    return rounding_of(largest) * largest < 1


def _kept(going: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part[going] for part in parts)
