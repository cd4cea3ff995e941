"""f(A) b for a symmetric A known only by its products: Lanczos' process, and f of the small matrix that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.curvature.rows import check_rows, finite_product, row_norms, unit_rows
from lightning_influence.curvature.solvers import MatVec, Progress
from lightning_influence.errors import CurvatureError

Spectral: TypeAlias = Callable[[Tensor], Tensor]  # of eigenvalues, element by element

_MOST_BYTES = 1 << 29  # of Krylov vectors that are held at a time
_EVERY = 4  # steps between two looks at the change


def exponential(eigenvalues: Tensor) -> Tensor:
    """exp(−σ)."""
    return (-eigenvalues).exp()


def saturated(eigenvalues: Tensor) -> Tensor:
    """(1 − exp(−σ))/σ, 1 at σ = 0."""
    flat = eigenvalues.abs() < torch.finfo(eigenvalues.dtype).tiny
    safe = torch.where(flat, 1.0, eigenvalues)
    return torch.where(flat, 1.0, -torch.expm1(-safe) / safe)


def matrix_function(
    matvec: MatVec,
    b: Tensor,
    functions: tuple[Spectral, ...],
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 300,
    progress: Progress | None = None,
) -> tuple[tuple[Tensor, ...], bool]:
    """f(A) b of every row, for one function or several of the same products.

        A V = V T + …,   f(A) b ≈ ‖b‖ V f(T) e₁

    (Lanczos with every vector orthogonalised against all before; Saad 1992, "Analysis of some Krylov subspace
    approximations to the matrix exponential operator"). The change of the answer over a few steps says how near it is.

    Args:
        matvec: products with A, (Q, P) -> (Q, P), any Q.
        b: (Q, P), float32 or float64.
        functions: of eigenvalues.
        tolerance: on the change of f(A) b over ‖b‖, and on the relative change of (1 − exp(−A))/A b.
        max_iterations: products at most.
        progress: told of products and changes.

    Returns:
        f(A) b (Q, P) for every function, and whether all rows met the tolerance.

    Raises:
        CurvatureError: NaN or infinity from a product or a function.
    """
    check_rows(b)
    each = max(1, max_iterations * b.shape[1] * b.element_size())
    step = max(1, _MOST_BYTES // each)
    parts = [_lanczos(matvec, b[i : i + step], functions, tolerance, max_iterations, progress)
             for i in range(0, len(b), step)]  # fmt: skip
    if not parts:
        return tuple(torch.zeros_like(b) for _ in functions), True
    found = tuple(torch.cat([part[0][number] for part in parts]) for number in range(len(functions)))
    return found, all(part[1] for part in parts)


def _lanczos(
    matvec: MatVec,
    b: Tensor,
    functions: tuple[Spectral, ...],
    tolerance: float,
    max_iterations: int,
    progress: Progress | None,
) -> tuple[tuple[Tensor, ...], bool]:
    unit, norms = unit_rows(b)
    most = min(max_iterations, b.shape[1])
    basis = _longer(unit[:, None], most)  # (Q, k or more, P)
    diagonal, beside = list[Tensor](), list[Tensor]()
    before: list[Tensor] | None = None
    coefficients: list[Tensor] = []
    converged = False
    for step in range(1, most + 1):
        held = basis[:, :step]
        product = finite_product(matvec(held[:, -1]), "a product with A in Lanczos' process", step)
        diagonal.append((product * held[:, -1]).sum(1))
        for _ in range(2):
            inside = torch.bmm(held, product[:, :, None])  # (Q, k, 1)
            product = product - torch.bmm(inside.transpose(1, 2), held)[:, 0]
        length = row_norms(product)
        scale = torch.stack(diagonal, 1).abs().amax(1) + (torch.stack(beside, 1).amax(1) if beside else 0.0)
        done = length <= torch.finfo(b.dtype).eps * scale.clamp_min(torch.finfo(b.dtype).tiny) * step
        last = step == most or bool(done.all())
        if last or step % _EVERY == 0:
            coefficients = [_first_column(diagonal, beside, f) for f in (*functions, saturated)]
            changes = [_change(old, new) for old, new in zip(before or (), coefficients, strict=before is not None)]
            if changes:  # small eigenvalues show late, and exp(−σ) of large ones is nothing: `saturated` sees both
                changes[-1] = changes[-1] / coefficients[-1].norm(dim=1).clamp_min(torch.finfo(b.dtype).tiny)
            change = float(torch.stack(changes).max()) if changes else float("inf")
            if progress is not None:
                progress(step, change)
            converged = bool(done.all()) or step == b.shape[1] or change <= tolerance
            if last or converged:
                break
            before = coefficients
        beside.append(torch.where(done, 0.0, length))
        if step == basis.shape[1]:
            basis = _longer(basis, most)
        basis[:, step] = torch.where(done[:, None], 0.0, product / torch.where(done, 1.0, length)[:, None])
    held = basis[:, : len(diagonal)]
    return tuple(norms[:, None] * torch.bmm(c[:, None], held)[:, 0] for c in coefficients[:-1]), converged


def _longer(basis: Tensor, most: int) -> Tensor:
    """The same vectors (Q, k, P) with room for half as many again, 16 at least and `most` at most."""
    count = min(most, max(16, basis.shape[1] * 3 // 2))
    room = basis.new_empty(len(basis), count, basis.shape[2])
    room[:, : basis.shape[1]] = basis
    return room


def _first_column(diagonal: list[Tensor], beside: list[Tensor], function: Spectral) -> Tensor:
    """f(T) e₁ of every row, (Q, k)."""
    t = torch.diag_embed(torch.stack(diagonal, 1))
    if len(diagonal) > 1:
        off = torch.stack(beside[: len(diagonal) - 1], 1)
        t = t + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(t)
    found = torch.einsum("qij,qj,qj->qi", vectors, function(values), vectors[:, 0])
    if not bool(found.isfinite().all()):
        raise CurvatureError(
            "a function of the curvature is infinite",
            expected="eigenvalues for which it is finite",
            found=f"eigenvalues from {float(values.min()):.3g} to {float(values.max()):.3g}",
            hint='take a curvature without negative eigenvalues, such as matrix="ggn" or EKFAC()',
        )
    return found


def _change(before: Tensor, now: Tensor) -> Tensor:
    """(Q,)."""
    wider = torch.zeros_like(now)
    wider[:, : before.shape[1]] = before
    distance: Tensor = (now - wider).norm(dim=1)
    return distance
