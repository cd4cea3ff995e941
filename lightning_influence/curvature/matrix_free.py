"""MatrixFree: a curvature that is never written down; every product walks the training set, every inverse is solved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.curvature.curvature import Curvature, CurvatureStatistics, Evidence
from lightning_influence.curvature.damping import Absolute, Damping
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.curvature.solvers import (
    SAFETY,
    Progress,
    Solution,
    conjugate_gradient,
    largest_eigenvalue,
    lissa,
    minres,
)
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Gradients, accumulation_dtype

Inverter: TypeAlias = Literal["cg", "minres", "lissa"]

_KRYLOV = {"cg": conjugate_gradient, "minres": minres}
_PROBES = 8  # random vectors whose products tell the mean eigenvalue


class MatrixFree(CurvatureStatistics):
    """The exact Hessian or Gauss–Newton matrix of any number of parameters, by its products (Pearlmutter 1994, "Fast
    exact multiplication by the Hessian"). Nothing is estimated beforehand and nothing stored; a step of the solver
    costs a walk over the training set, for all queries of a batch together.

    Args:
        matrix: `"ggn"` or `"hessian"`, which may be indefinite.
        solver: `"cg"`, for positive definite matrices; `"minres"`, for any; `"lissa"`, the Neumann series of Koh &
            Liang (2017, 1703.04730), which needs far more steps than these.
        tolerance: on ‖v − (H + λI) x‖/‖v‖ of every vector.
        max_iterations: steps at most; what has not converged by then is returned with a warning.
    """

    name = "matrix_free"

    def __init__(
        self,
        matrix: Literal["ggn", "hessian"] = "ggn",
        solver: Inverter = "cg",
        *,
        tolerance: float = 1e-5,
        max_iterations: int = 1000,
    ) -> None:
        for what, value, known in (("matrix", matrix, ("ggn", "hessian")), ("solver", solver, (*_KRYLOV, "lissa"))):
            if value not in known:
                raise CurvatureError(
                    f"unknown {what}", expected=", ".join(map(repr, known)), found=repr(value), hint="choose one"
                )
        self.matrix, self.solver, self.tolerance, self.max_iterations = matrix, solver, tolerance, max_iterations

    @property
    def uses_labels(self) -> bool:
        """False."""
        return False

    @property
    def stands_for(self) -> Literal["hessian", "ggn"]:
        """The matrix that was asked for."""
        return self.matrix

    def collect(self, evidence: Evidence) -> MatrixFreeCurvature:
        """The curvature, which keeps hold of the evidence: its products are those of the weights at the time."""
        return MatrixFreeCurvature(self, _Matrix(evidence, self.matrix))


class _Matrix:
    """H without weight decay, and what is asked about it more than once."""

    def __init__(self, evidence: Evidence, matrix: Literal["ggn", "hessian"]) -> None:
        self.evidence = evidence
        parameters = evidence.selection.parameters
        self.space = ParameterSpace({name: tuple(p.shape) for name, p in parameters.items()})
        some = next(iter(parameters.values()))
        self.like = torch.empty(0, dtype=accumulation_dtype(*parameters.values()), device=some.device)
        self.matvec = evidence.operator(matrix).matvec

    @cached_property
    def mean_eigenvalue(self) -> float:
        """trace(H) / P by random signs z, E zᵀHz = trace(H) (Hutchinson 1989)."""
        signs = torch.randint(0, 2, (_PROBES, self.space.size), generator=torch.Generator().manual_seed(0))
        z = (2 * signs - 1).to(self.like)
        return float((z * self.matvec(z)).double().sum(1).mean()) / self.space.size

    @cached_property
    def largest_eigenvalue(self) -> float:
        """|λ|max, from below."""
        return largest_eigenvalue(self.matvec, self.like.new_empty(self.space.size))


class MatrixFreeCurvature(Curvature):
    """What `MatrixFree` collects: products run at the weights that the model has when they are asked for.

    Attributes:
        last_solution: what the last `solve` found, its residuals and iterations.
    """

    needs_model = True

    def __init__(self, settings: MatrixFree, matrix: _Matrix, decay: Mapping[str, float] | None = None) -> None:
        self._settings, self._matrix, self._space = settings, matrix, matrix.space
        self._decay = dict(decay or {})
        self.last_solution: Solution | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the evidence."""
        return self._space.names

    @property
    def evidence(self) -> Evidence:
        """The model and the training set."""
        return self._matrix.evidence

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the eigenvalues, weight decay apart, estimated once from a few random vectors: the scale of a
        relative damping."""
        return self._matrix.mean_eigenvalue

    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """H[rows, columns] v; every row knows every column."""
        chosen = self._chosen(v, columns)
        wanted = self._wanted(chosen, rows)
        flat = self._space.rows(chosen, self._matrix.like)
        product = self._matrix.matvec(flat) + self._space.diagonal(self._decay, flat) * flat
        return self._space.named(product, wanted, chosen)

    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """(H + λI)⁻¹ v; warns where the tolerance was not reached (see `last_solution`).

        Raises:
            CurvatureError: v lacks a parameter; conjugate gradients met negative curvature; LiSSA diverged.
        """
        chosen = self._chosen(v, None)
        self._space.check_complete(chosen)
        shift = self._shift(damping)
        # The type of the model: in a wider one its rounding errors would pass for curvature.
        b = self._space.rows(chosen, self._matrix.like).to(self._matrix.like)
        diagonal = self._space.diagonal(self._decay, b) + shift
        name = self._settings.solver
        with solving_bar(name, "step") as progress:
            solution = self._solved(b, diagonal, shift, progress)
        self.last_solution = solution
        if not solution.converged:
            rank_zero_warn(
                f"{name} did not converge: after {solution.iterations} iterations the relative residual is "
                f"{float(solution.residual.max()):.1e}, above the tolerance {self._settings.tolerance:.1e}. Damp more, "
                "pass MatrixFree a larger max_iterations or tolerance, or use a float64 model: with little damping, "
                "float32 rounding alone may leave as much."
            )
        return self._space.named(solution.x, tuple(chosen), chosen)

    def shifts(self, damping: Damping) -> dict[str, float]:
        """λ of every parameter, the same for all."""
        return dict.fromkeys(self.parameters, self._shift(damping))

    def _shift(self, damping: Damping) -> float:
        """λ, for which the mean eigenvalue is estimated if it matters."""
        return damping.of(0.0 if isinstance(damping, Absolute) else self.mean_eigenvalue)

    def _solved(self, b: Tensor, diagonal: Tensor, shift: float, progress: Progress) -> Solution:
        def damped(x: Tensor) -> Tensor:
            return self._matrix.matvec(x) + diagonal * x

        tolerance, steps = self._settings.tolerance, self._settings.max_iterations
        if self._settings.solver == "lissa":
            scale = SAFETY * (self._matrix.largest_eigenvalue + max(self._decay.values(), default=0.0) + shift)
            return lissa(damped, b, scale=scale, depth=steps, tolerance=tolerance, progress=progress)
        krylov = _KRYLOV[self._settings.solver]
        return krylov(damped, b, tolerance=tolerance, max_iterations=steps, progress=progress)

    def decayed(self, decay: Mapping[str, float]) -> MatrixFreeCurvature:
        """H with weight decay, by parameter name, on its diagonal."""
        total = {name: self._decay.get(name, 0.0) + decay.get(name, 0.0) for name in self.parameters}
        return MatrixFreeCurvature(self._settings, self._matrix, total)

    def state(self) -> NoReturn:
        """Refused: there is nothing that could be stored."""
        raise _never_stored()

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> NoReturn:
        """Refused: there is nothing that could have been stored."""
        raise _never_stored()


@contextmanager
def solving_bar(solver: str, unit: str) -> Iterator[Progress]:
    """A bar of rank zero that a solver tells of its products and residual, shown where it takes some seconds."""
    shown = getattr(rank_zero_only, "rank", 0) == 0
    with tqdm(desc=f"solving by {solver}", unit=unit, delay=2.0, leave=False, disable=not shown) as bar:

        def progress(products: int, residual: float) -> None:
            bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
            bar.update(products - bar.n)

        yield progress


def _never_stored() -> CurvatureError:
    return CurvatureError(
        "a matrix-free curvature is never stored",
        expected="a curvature with tensors, such as that of EKFAC(), LowRank() or curvature.Dense()",
        found="products that are computed from the model and its training set when they are asked for",
        hint="pass MatrixFree() to the estimator, InfluenceFunction(curvature=MatrixFree()), not to CurvatureSnapshot",
    )
