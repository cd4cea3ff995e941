"""Solving A x = b when A is known only by its products with vectors: conjugate gradients, MINRES, LiSSA, and |λ|max.

Every solver takes a product with rows, (Q, P) -> (Q, P), and solves for all rows of b at once. A row that is finished
leaves the batch, so later products see fewer rows and no row's solution depends on the rows beside it. Rows are solved
at unit length, so the size of b, however small in float32, does not matter. No solver warns: a solution says how good
it is (`residual`, `converged`), and the caller decides whether that will do. What cannot be meant is refused with a
`CurvatureError`: NaN from a product, negative curvature under conjugate gradients, a diverging series.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.curvature.rows import check_rows, finite_product, rounding_of, row_dots, row_norms, unit_rows
from lightning_influence.errors import CurvatureError

MatVec: TypeAlias = Callable[[Tensor], Tensor]  # (Q, P) -> (Q, P): every row times the same symmetric matrix, any Q
Progress: TypeAlias = Callable[[int, float], None]  # products so far, worst ‖b − A x‖/‖b‖ of the rows still at work

HELPS = 0.75  # of the residual before: a pass that leaves more has found rounding errors, and is dropped
GROWTH = 1.1  # of a series' residual, which never grows where the series converges
SAFETY = 1.1  # on |λ|max, which power iteration approaches from below


@dataclass(frozen=True)
class Solution:
    """What a solver found, row by row, and how good it is.

    Attributes:
        x: (Q, P), in units of b over units of A.
        residual: (Q,), ‖b − A x‖/‖b‖ by a product with this very x, not by a recurrence; 0 where b is 0.
        iterations: steps of the row that took most; products that only verify a residual are not counted.
        converged: whether every residual is at most the tolerance.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    converged: bool


def conjugate_gradient(
    matvec: MatVec,
    b: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    preconditioner: MatVec | None = None,
    progress: Progress | None = None,
) -> Solution:
    """A⁻¹ b for a symmetric positive definite A, one product a step.

        α = rᵀz / pᵀAp,   x ← x + α p,   r ← r − α A p,   z = M r,   p ← z + (rᵀz)new/(rᵀz)old p

    (Hestenes & Stiefel 1952, "Methods of conjugate gradients for solving linear systems"). Where the recurrence has met
    the tolerance and the true residual has not, a row starts over from the true residual for as long as that helps. A
    direction with a curvature below 16 eps of the largest (2e-6 in float32) ends its row: semidefinite A are solved as
    far as b lies in their range.

    Args:
        matvec: product with A.
        b: (Q, P), float32 or float64.
        tolerance: on ‖b − A x‖/‖b‖ of every row.
        max_iterations: steps that a row may take. A row that needs more is returned as it is, with
            ``converged=False``: nothing is raised.
        preconditioner: product with M ≈ A⁻¹, symmetric positive definite.
        progress: called after every step.

    Raises:
        CurvatureError: negative curvature, pᵀAp <= 0 beyond rounding; NaN or infinity from a product (names the
            iteration); a preconditioner that is not positive definite; a `b` of another shape or type.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> solution = conjugate_gradient(lambda rows: rows @ A, torch.tensor([[9.0, 5.0]], dtype=torch.float64))
        >>> [round(value, 6) for value in solution.x[0].tolist()], solution.iterations, solution.converged
        ([2.0, 1.0], 2, True)
    """
    system = _System("Conjugate gradients", matvec, preconditioner, progress)
    return _refined(_conjugate_gradient, system, b, tolerance, max_iterations)


def minres(
    matvec: MatVec,
    b: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    preconditioner: MatVec | None = None,
    progress: Progress | None = None,
) -> Solution:
    """argmin ‖b − A x‖ over the Krylov spaces of a symmetric A of any signs, one product a step.

        A V_k = V_{k+1} T_k,   x_k = V_k y,   y = argmin ‖ ‖b‖ e₁ − T_k y ‖

    (Paige & Saunders 1975, "Solution of sparse indefinite systems of linear equations", by the Lanczos process). A
    singular A with b in its range gives the solution of least norm; with b outside it a solution of least residual,
    which is then above the tolerance. With a preconditioner the norm that is minimised is that of M; the tolerance is
    on the Euclidean one all the same. Rows start over as in `conjugate_gradient`. Condition
    numbers above 1e4 in float32 or 1e10 in float64 may end early, unconverged.

    Args:
        matvec: product with A.
        b: (Q, P), float32 or float64.
        tolerance: on ‖b − A x‖/‖b‖ of every row.
        max_iterations: steps that a row may take; with more to go it is returned with ``converged=False``.
        preconditioner: product with M, symmetric positive definite, near the inverse of |A|.
        progress: called after every step.

    Raises:
        CurvatureError: NaN or infinity from a product (names the iteration); a preconditioner that is not positive
            definite; a `b` of another shape or type.
    """
    return _refined(_minres, _System("MINRES", matvec, preconditioner, progress), b, tolerance, max_iterations)


def lissa(
    matvec: MatVec,
    b: Tensor,
    *,
    scale: float | None = None,
    depth: int = 1000,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> Solution:
    """A⁻¹ b for a symmetric positive definite A by its Neumann series, one product a step.

        x ← b + (I − A/scale) x,   started at b; the result is x / scale

    (Agarwal, Bullins & Hazan 2017, "Second-order stochastic optimization for machine learning in linear time"; Koh &
    Liang 2017, arXiv:1703.04730). It converges if and only if all eigenvalues of A are within (0, 2 scale), the error
    falling by 1 − λmin/scale a step; `conjugate_gradient` needs far fewer steps. A must be one and the same matrix at
    every step, not a new sample: the residual then never grows where the series converges, which is how divergence is
    told.

    Args:
        matvec: product with A.
        b: (Q, P), float32 or float64.
        scale: in units of A. None: 1.1 times `largest_eigenvalue`.
        depth: steps that a row may take; with more to go it is returned with ``converged=False``.
        tolerance: on ‖b − A x‖/‖b‖ of every row.
        progress: called after every step.

    Raises:
        CurvatureError: the series diverges; the scale is not positive, or A is zero; NaN or infinity from a product
            (names the iteration); a `b` of another shape or type.
    """
    check_rows(b)
    if scale is None:
        scale = SAFETY * largest_eigenvalue(matvec, b) if b.numel() else 1.0
    return _series(_System("LiSSA", matvec, None, progress), b, scale, depth, tolerance)


def largest_eigenvalue(
    matvec: MatVec, like: Tensor, *, iterations: int = 100, tolerance: float = 1e-6, seed: int = 0
) -> float:
    """|λ|max of a symmetric A, from below, by power iteration.

        v ← A v / ‖A v‖,   |λ|max ≈ ‖A v‖ = (vᵀA²v)^½

    The estimate is the Rayleigh quotient of A², not of A, so a pair ±λ does not make it swing; it never falls from one
    step to the next (Golub & Van Loan 2013, "Matrix computations", 8.2). The start is drawn on the CPU from `seed`: the
    same on every device, and no global generator moves.

    Args:
        matvec: product with A.
        like: (P,) or (Q, P); gives the size P, the device and the type, float32 or float64.
        iterations: products at most.
        tolerance: stop when a step adds less than this fraction.

    Raises:
        CurvatureError: NaN or infinity from a product (names the iteration).
    """
    system = _System("Power iteration", matvec)
    draw = torch.randn(1, like.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = torch.nn.functional.normalize(draw, dim=1).to(like.dtype).to(like.device)
    found = 0.0
    for _ in range(iterations):
        unit, norm = unit_rows(system.product(v))
        before, found = found, float(norm)
        if found - before <= tolerance * found:
            break
        v = unit
    return found


class _System:
    """The products of one solve: checked, counted and reported under the solver's name."""

    def __init__(
        self, solver: str, matvec: MatVec, preconditioner: MatVec | None = None, progress: Progress | None = None
    ) -> None:
        self.solver, self.products = solver, 0
        self._matvec, self._preconditioner, self._progress = matvec, preconditioner, progress

    def product(self, rows: Tensor) -> Tensor:
        """A times every row, (Q, P)."""
        self.products += 1
        return self._sound(self._matvec(rows), rows, "curvature")

    def preconditioned(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """z = M r (Q, P), and rᵀz (Q,)."""
        if self._preconditioner is None:
            return r, row_dots(r, r)
        z = self._sound(self._preconditioner(r), r, "preconditioner")
        inner = row_dots(r, z)
        if (inner < -rounding_of(r) * row_norms(r) * row_norms(z)).any():
            raise CurvatureError(
                f"{self.solver} met a preconditioner that is not positive definite, in iteration {self.products}.",
                expected="rᵀMr > 0 for every r",
                found=f"{inner.min().item():.3g}",
                hint="Damp the preconditioner more, or leave it out.",
            )
        return z, inner

    def report(self, residual: Tensor) -> None:
        """Tell the caller how far the rows at work are, (Q,)."""
        if self._progress is not None:
            self._progress(self.products, residual.max().item())

    def _sound(self, out: Tensor, rows: Tensor, what: str) -> Tensor:
        if out.shape != rows.shape or out.dtype != rows.dtype or out.device != rows.device:
            raise CurvatureError(
                f"{self.solver}: a product with the {what} has another shape, type or device than what it was given.",
                expected=f"{tuple(rows.shape)} {rows.dtype} on {rows.device}",
                found=f"{tuple(out.shape)} {out.dtype} on {out.device}",
                hint="The function must take (Q, P) to (Q, P) for every number of rows Q.",
            )
        return finite_product(out, f"{self.solver}: a product with the {what}", self.products)


# One pass from x = 0: system, r (Q, P), goals on ‖r‖, steps allowed, ‖A‖ so far -> x (Q, P), steps taken, ‖A‖; all (Q,)
_Pass: TypeAlias = Callable[[_System, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _refined(method: _Pass, system: _System, b: Tensor, tolerance: float, max_iterations: int) -> Solution:
    """Passes of `method`, each on the true residual that the last one left, while they help (iterative refinement).

    The budget is counted row by row, so that what a row gets does not depend on how long its neighbours take.
    """
    check_rows(b)
    unit, norms = unit_rows(b.detach())
    eps = torch.finfo(b.dtype).eps
    x, gap = torch.zeros_like(unit), unit.clone()  # gap: unit - A x
    residual = torch.where(norms > 0, torch.inf, 0.0).to(b.dtype)
    largest = torch.zeros_like(norms)
    steps = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    rows = norms.nonzero().squeeze(1)
    while rows.numel():
        goals = (eps * row_norms(gap[rows])).clamp_min(tolerance)
        step, taken, largest[rows] = method(system, gap[rows], goals, max_iterations - steps[rows], largest[rows])
        steps[rows] += taken
        candidate = x[rows] + step
        left = unit[rows] - system.product(candidate)
        now, before = row_norms(left), residual[rows]
        helped = now <= HELPS * before  # the first pass counts in any case: before is infinite
        chosen = rows[helped]
        x[chosen], gap[chosen], residual[chosen] = candidate[helped], left[helped], now[helped]
        rows = rows[helped & (now > tolerance) & (steps[rows] < max_iterations)]
    return _solution(x * norms[:, None], residual, steps, tolerance)


def _conjugate_gradient(
    system: _System, r: Tensor, goals: Tensor, budget: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found, taken, norm = torch.zeros_like(r), torch.zeros_like(budget), largest.clone()
    rounding, tiny = rounding_of(r), torch.finfo(r.dtype).tiny
    rows, step, x = torch.arange(len(r), device=r.device), 0, torch.zeros_like(r)
    p, rz = system.preconditioned(r)
    going = (row_norms(r) > goals) & (budget > 0)
    while True:
        if not going.all():
            found[rows], taken[rows], norm[rows] = x, step, largest
            rows, goals, budget, largest = (part[going] for part in (rows, goals, budget, largest))
            x, r, p, rz = (part[going] for part in (x, r, p, rz))
        if not rows.numel():
            return found, taken, norm
        product = system.product(p)
        step += 1
        curvature, length, image = row_dots(p, product), row_norms(p), row_norms(product)
        largest = torch.maximum(largest, image / length.clamp_min(tiny))
        # At a right angle or more to p: no positive definite matrix does that (cosine >= 2 √κ / (κ + 1)), but rounding
        # does where ‖Ap‖² <= ‖A‖ pᵀAp, which semidefinite ones obey, holds within its error.
        bent = curvature <= rounding * length * image
        noise = (curvature >= -rounding * largest * length**2) & (image <= rounding**0.5 * largest * length)
        flat = (image <= rounding * largest * length) | (bent & noise)
        negative = bent & ~flat
        if negative.any():
            lowest = (curvature / length.square())[negative].min().item()
            raise CurvatureError(
                f"{system.solver} met negative curvature in iteration {system.products}: the matrix is not positive "
                "definite.",
                expected="pᵀAp > 0 in every direction p",
                found=f"pᵀAp/pᵀp = {lowest:.3g}, where ‖Ap‖/‖p‖ reaches {largest.max().item():.3g}",
                hint="Use the GGN or Fisher curvature, which has no negative directions, or MINRES, or more damping.",
            )
        alpha = torch.where(flat, 0.0, rz / torch.where(flat, 1.0, curvature))[:, None]
        x, r = x + alpha * p, r - alpha * product
        z, rz_next = system.preconditioned(r)
        p = z + (rz_next / rz)[:, None] * p
        rz, size = rz_next, row_norms(r)
        system.report(size)
        going = (size > goals) & ~flat & (step < budget) & (rz > 0)


def _minres(system: _System, r: Tensor, goals: Tensor, budget: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In Paige & Saunders' letters: α, β of the Lanczos process; c, s, γ, δ, ε of its QR factors; φ of the residual."""
    found, taken = torch.zeros_like(r), torch.zeros_like(budget)
    exhausted = torch.finfo(r.dtype).eps ** 0.5  # a Lanczos process multiplies its rounding errors
    rows, step = torch.arange(len(r), device=r.device), 0
    y, square = system.preconditioned(r)
    beta = square.clamp_min(0).sqrt()
    going = (row_norms(r) > goals) & (budget > 0) & (beta > 0)
    unit = row_norms(r) / beta  # takes φ, which is in the norm of M, to the scale of the goals
    none, beta_old = torch.zeros_like(beta), torch.ones_like(beta)
    x, w, w_old, r_old = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    c, s, phi, largest, delta_bar, epsilon = none - 1, none, beta, none, none, none
    while True:
        if not going.all():
            found[rows], taken[rows] = x, step
            rows, goals, budget, unit, largest = (part[going] for part in (rows, goals, budget, unit, largest))
            x, w, w_old, y, r, r_old = (part[going] for part in (x, w, w_old, y, r, r_old))
            c, s, phi, delta_bar, epsilon = (part[going] for part in (c, s, phi, delta_bar, epsilon))
            beta, beta_old = beta[going], beta_old[going]
        if not rows.numel():
            return found, taken, known
        v = y / beta[:, None]
        product = system.product(v)
        step += 1
        product = product - (beta / beta_old)[:, None] * r_old
        alpha = row_dots(v, product)
        r, r_old = product - (alpha / beta)[:, None] * r, r
        y, square = system.preconditioned(r)
        beta, beta_old = square.clamp_min(0).sqrt(), beta
        largest = torch.maximum(largest, (alpha.square() + beta.square() + beta_old.square() * (step > 1)).sqrt())
        # The rotations so far take the new column of T to (ε, δ, γ̄); one more takes (γ̄, β) to (γ, 0).
        delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
        epsilon, epsilon_old, delta_bar = s * beta, epsilon, -c * beta
        gamma = torch.hypot(gamma_bar, beta)
        # ‖A r‖/‖r‖ of the x so far: where that is next to nothing, the residual is the least there is, and x stays.
        least = torch.hypot(gamma_bar, delta_bar) <= exhausted * largest
        gamma = torch.where(least, 1.0, gamma)
        c, s = gamma_bar / gamma, beta / gamma
        w, w_old = (v - epsilon_old[:, None] * w_old - delta[:, None] * w) / gamma[:, None], w
        x = x + torch.where(least, 0.0, c * phi)[:, None] * w
        phi = torch.where(least, phi, s * phi)
        system.report(phi * unit)
        going = (phi * unit > goals) & ~least & (beta > exhausted * largest) & (step < budget)


def _series(system: _System, b: Tensor, scale: float, depth: int, tolerance: float) -> Solution:
    """x ← b + x − A x / scale from x = b; the result is x / scale, whose true residual is the increment of x."""
    if not 0 < scale < float("inf"):
        raise CurvatureError(
            f"{system.solver} has no scale to divide by.",
            expected="a positive scale, and a curvature that is not zero",
            found=scale,
            hint="Add damping, or pass a scale above half the largest eigenvalue.",
        )
    unit, norms = unit_rows(b.detach())
    found, residual = torch.zeros_like(unit), torch.zeros_like(norms)
    steps = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    rows = norms.nonzero().squeeze(1)
    target = x = unit[rows]
    least = torch.ones_like(norms[rows])
    for step in range(depth + 1):
        if not rows.numel():
            break
        left = target - system.product(x) / scale
        now = row_norms(left)
        worse = now > GROWTH * least + rounding_of(x) * (1 + row_norms(x))
        if worse.any():
            raise CurvatureError(
                f"{system.solver} diverges at scale {scale:.6g}: its residual grows.",
                expected=f"all eigenvalues between 0 and {2 * scale:.6g}, twice the scale",
                found=f"‖b − Ax‖ = {now[worse].max().item():.3g} ‖b‖, was {least[worse].max().item():.3g} ‖b‖, "
                f"after {step} steps; the sum has norm {row_norms(x)[worse].max().item():.3g} ‖b‖",
                hint="Take a scale above half the largest eigenvalue (None measures it), or, where there are negative "
                "eigenvalues, the GGN or Fisher curvature, MINRES, or more damping.",
            )
        system.report(now)
        found[rows], residual[rows], steps[rows] = x, now, step
        going = now > tolerance
        rows, target, x, least = rows[going], target[going], (x + left)[going], torch.minimum(least, now)[going]
    return _solution(found / scale * norms[:, None], residual, steps, tolerance)


def _solution(x: Tensor, residual: Tensor, steps: Tensor, tolerance: float) -> Solution:
    iterations = int(steps.max()) if len(steps) else 0
    return Solution(x, residual, iterations, bool((residual <= tolerance).all()))
