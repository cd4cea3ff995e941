"""Inverting a curvature for a part K of the parameters: generalized, freezing and projected influence, and the whole.

Each inverse is a linear map from gradients of training losses to the change δ of the parameters that answers them, zero
outside K. H stands for H + λI, weight decay included (Lyu, Jang, Ryu & Yang 2023, arXiv:2312.05586):

    Generalized   δ_K = argmin_δ ‖H_{:,K} δ − g‖² = H_{:,K}⁺ g      frozen rows count too
    Freezing      δ_K = H_KK⁻¹ g_K                                  as if the frozen parameters were no parameters
    Projected     δ_K = [H⁻¹ g]_K                                   the answer of all parameters, cut
    Whole         δ   = H⁻¹ g
    SecondOrder   δ   = H⁻¹ g + H⁻¹ H_S H⁻¹ g                       of a group S (Basu, You & Feizi 2020)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import Damping
from lightning_influence.curvature.least_squares import LeastSquares, cgls, dense_least_squares, lsmr, neumann
from lightning_influence.curvature.matrix_free import MatrixFreeCurvature, solving_bar
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.curvature.solvers import Progress, Solution, conjugate_gradient, minres
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Dense, Gradients, TargetParameters

SolverName: TypeAlias = Literal["minres", "cg", "neumann", "lstsq"]
Product: TypeAlias = Callable[[Gradients], Gradients]


@dataclass(frozen=True)
class Solver:
    """How an inverse on K is solved.

    Attributes:
        name: `"minres"` (LSMR where it is least squares) and `"cg"` (CGLS; without least squares, for positive definite
            H alone) need the fewest products; `"neumann"` is the normalised series of Lyu et al.; `"lstsq"` writes H
            out, for a few thousand parameters.
        tolerance: on the relative residual; of least squares, on that of the normal equations.
        max_iterations: steps at most. Stopping early regularises, as damping does.
        scale: constant c of the series; `None` measures it by power iteration.
    """

    name: SolverName = "minres"
    tolerance: float = 1e-5
    max_iterations: int = 200
    scale: float | None = None

    def __post_init__(self) -> None:
        steps = self.max_iterations
        known = self.name in get_args(SolverName) and _positive(self.tolerance)
        whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
        if not known or not whole or not (self.scale is None or _positive(self.scale)):
            raise CurvatureError(
                "this is no way to solve",
                expected=f"a name among {', '.join(get_args(SolverName))}, a positive tolerance, a whole number of "
                "iterations, 1 or more, and a positive scale or None",
                found=f"{self.name!r}, {self.tolerance!r}, {steps!r}, {self.scale!r}",
                hint="write Solver('minres', tolerance=1e-5, max_iterations=200)",
            )


@dataclass(frozen=True)
class Answer:
    """A change of the parameters, and how it was found.

    Attributes:
        change: δ of every vector, by parameter name; zero outside K.
        residual: largest relative residual of what was solved (of least squares: of the normal equations); `None` where
            a closed form was used.
        iterations, products: steps of the solver, and products with H, as far as they were counted.
        converged: whether the tolerance was met.
        diverged: whether a Neumann series diverged, so that its best iterate was kept.
    """

    change: Gradients
    residual: float | None
    iterations: int
    products: int
    converged: bool
    diverged: bool = False

    def report(self) -> dict[str, Any]:
        """All but the change, as plain JSON."""
        return {name: value for name, value in vars(self).items() if name != "change"}


class PartialInverse(ABC):
    """A linear map R from gradients to changes of the parameters, and its transpose."""

    #: K, where the change is confined to it.
    target: TargetParameters | None = None
    #: Whether H is to be that of all samples, those of the group included, instead of the retained ones'.
    about_all: bool = False

    @abstractmethod
    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """R g.

        Args:
            curvature: H.
            g: gradients (Q, *shape), of all parameters of the curvature.
            damping: λ.
            of_group: products with H_S, the part of H that comes from the group; second order alone asks for them.

        Raises:
            CurvatureError: a singular system, negative curvature under "cg", a diverging series.
        """

    @abstractmethod
    def transposed(self, curvature: Curvature, v: Gradients, damping: Damping) -> Gradients:
        """Rᵀ v: what the query side of a score passes through."""

    @property
    def required(self) -> tuple[str, ...] | None:
        """The parameters of which curvature and training gradients must be known; `None` is any."""
        return None

    def settings(self) -> dict[str, Any]:
        """What there is to say about it, as plain JSON."""
        return {}


class Whole(PartialInverse):
    """δ = H⁻¹ g: every parameter answers (Koh & Liang 2017, arXiv:1703.04730)."""

    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """H⁻¹ g, by the curvature's own means."""
        change = curvature.solve(g, damping)
        found = curvature.last_solution if isinstance(curvature, MatrixFreeCurvature) else None
        return Answer(change, None, 0, 0, True) if found is None else _solved(change, found)

    def transposed(self, curvature: Curvature, v: Gradients, damping: Damping) -> Gradients:
        """H⁻¹ v."""
        return curvature.solve(v, damping)


class SecondOrder(Whole):
    """δ = H⁻¹ g + H⁻¹ H_S H⁻¹ g: to second order in the weight of the group S that is removed, third derivatives of the
    loss left out; H is that of all samples (Basu, You & Feizi 2020, arXiv:1911.00418).

    Their paper divides by the number of samples that remain, which changes the path and not its end; here 1/N is kept.
    For one sample the second term vanishes with 1/N, so scores of single samples are those of `Whole`.
    """

    about_all = True

    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """Two solves, and a product with H_S between them."""
        first = super().change(curvature, g, damping)
        if of_group is None:
            return first
        second = super().change(curvature, of_group(first.change), damping)
        return Answer(
            {name: Dense(block.dense() + second.change[name].dense()) for name, block in first.change.items()},
            None if first.residual is None or second.residual is None else max(first.residual, second.residual),
            first.iterations + second.iterations,
            first.products + second.products,
            first.converged and second.converged,
        )


class Projected(Whole):
    """δ_K = [H⁻¹ g]_K: the change of K if all parameters could change, which they cannot."""

    target: TargetParameters

    def __init__(self, target: TargetParameters) -> None:
        self.target = target

    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """H⁻¹ g, cut."""
        found = super().change(curvature, g, damping)
        return replace(found, change=self.target.restricted(found.change))

    def transposed(self, curvature: Curvature, v: Gradients, damping: Damping) -> Gradients:
        """H⁻¹ v_K."""
        cut = self.target.restricted(v)
        zeros = {name: block.scaled(torch.zeros(block.num_samples)) for name, block in v.items() if name not in cut}
        return super().transposed(curvature, {name: {**cut, **zeros}[name] for name in v}, damping)

    @property
    def required(self) -> tuple[str, ...]:
        """All that are trained."""
        return tuple(self.target.shapes)


class _OnTarget(PartialInverse):
    """What is solved on K by products with H."""

    target: TargetParameters

    def __init__(self, target: TargetParameters, solver: Solver | SolverName = "minres") -> None:
        self.target, self.solver = target, solver if isinstance(solver, Solver) else Solver(solver)

    def settings(self) -> dict[str, Any]:
        """The solver's."""
        return {"solver": asdict(self.solver)}


class Freezing(_OnTarget):
    """δ_K = H_KK⁻¹ g_K: all that is not in K is held where it is, and what its gradients then are does not count."""

    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """H_KK⁻¹ g_K."""
        columns = _Columns(curvature, self.target, damping, self.target.names)
        with solving_bar(self.solver.name, "product") as progress:
            x, told = _symmetric(self.solver, columns.inside, columns.cut(g), progress)
        _warn("FIF", self.solver, told)
        return replace(told, change=columns.embedded(x, g))

    def transposed(self, curvature: Curvature, v: Gradients, damping: Damping) -> Gradients:
        """H_KK⁻¹ v_K."""
        return self.change(curvature, v, damping).change

    @property
    def required(self) -> tuple[str, ...]:
        """Those with entries in K."""
        return self.target.names


class Generalized(_OnTarget):
    """δ_K = argmin_δ ‖H_{:,K} δ − g‖²: K alone changes, so that as little gradient as possible is left anywhere.

    K = everything is `Whole`.
    """

    def change(self, curvature: Curvature, g: Gradients, damping: Damping, of_group: Product | None = None) -> Answer:
        """H_{:,K}⁺ g."""
        columns = _Columns(curvature, self.target, damping, curvature.connected(self.target.names))
        with solving_bar(self.solver.name, "product") as progress:
            found = _least_squares(
                self.solver, columns.apply, columns.adjoint, columns.rows(g), columns.count, progress
            )
        told = _told(found, found.normal_residual)
        _warn("GIF", self.solver, told)
        return replace(told, change=columns.embedded(found.x, g))

    def transposed(self, curvature: Curvature, v: Gradients, damping: Damping) -> Gradients:
        """H_{:,K} (H_{K,:} H_{:,K})⁻¹ v_K: of the u with H_{K,:} u = v_K, the shortest."""
        columns = _Columns(curvature, self.target, damping, curvature.connected(self.target.names))
        with solving_bar(self.solver.name, "product") as progress:
            found = _least_squares(
                self.solver, columns.adjoint, columns.apply, columns.cut(v), columns.space.size, progress
            )
        _warn("GIF", self.solver, _told(found, torch.minimum(found.residual, found.normal_residual)))
        return columns.space.named(found.x, columns.space.names, v)

    @property
    def required(self) -> tuple[str, ...]:
        """All that are trained: the rows of H."""
        return tuple(self.target.shapes)


class _Columns:
    """The columns K of H + λI, all rows `rows` of them, as products with flat vectors."""

    def __init__(self, curvature: Curvature, target: TargetParameters, damping: Damping, rows: tuple[str, ...]) -> None:
        if missing := [name for name in target.names if name not in curvature.parameters]:
            raise CurvatureError(
                f"the curvature holds nothing for {', '.join(missing)}, of which there are target parameters",
                expected=f"a curvature of {', '.join(target.names)}",
                found=f"one of {', '.join(curvature.parameters)}",
                hint="select these parameters in CurvatureSnapshot(parameters=...), or other target parameters",
            )
        self._curvature = curvature
        # Of parameters that were never trained no gradient counts, though a curvature may know them.
        self.space = ParameterSpace({name: target.shapes[name] for name in rows if name in target.shapes})
        self._own = ParameterSpace({name: target.shapes[name] for name in target.names})
        self._inside, self._places = target.flat(self._own.shapes), target.flat(self.space.shapes)
        shifts = curvature.shifts(damping)
        self._shift = self._own.diagonal(shifts, torch.empty(0, dtype=torch.float64))[self._inside]  # (|K|,)

    @property
    def count(self) -> int:
        """|K|."""
        return len(self._shift)

    def apply(self, x: Tensor) -> Tensor:
        """H_{:,K} x, (Q, |K|) -> (Q, rows)."""
        product = self._product(x, self.space.names)
        product[:, self._places.to(x.device)] += self._shift.to(x) * x
        return product

    def inside(self, x: Tensor) -> Tensor:
        """H_KK x, (Q, |K|) -> (Q, |K|)."""
        return self._product(x, self._own.names)[:, self._inside.to(x.device)] + self._shift.to(x) * x

    def adjoint(self, u: Tensor) -> Tensor:
        """H_{K,:} u, (Q, rows) -> (Q, |K|)."""
        product = self._curvature.matvec(self.space.named(u, self.space.names, {}), rows=self._own.names)
        cut = self._own.rows(product, u)[:, self._inside.to(u.device)].to(u)
        return cut + self._shift.to(u) * u[:, self._places.to(u.device)]

    def rows(self, g: Gradients) -> Tensor:
        """All rows of vectors, flat (Q, rows), in a type that can be solved in."""
        return self.space.rows({name: g[name] for name in self.space.names if name in g}, _like(g))

    def cut(self, v: Gradients) -> Tensor:
        """v_K, flat (Q, |K|)."""
        flat = self._own.rows({name: v[name] for name in self._own.names if name in v}, _like(v))
        return flat[:, self._inside.to(flat.device)]

    def embedded(self, x: Tensor, like: Gradients) -> Gradients:
        """x as gradients of the parameters with entries in K, zero outside it."""
        return self._own.named(self._full(x), self._own.names, like)

    def _product(self, x: Tensor, rows: tuple[str, ...]) -> Tensor:
        space = self.space if rows == self.space.names else self._own
        product = self._curvature.matvec(self._own.named(self._full(x), self._own.names, {}), rows=rows)
        return space.rows(product, x).to(x)

    def _full(self, x: Tensor) -> Tensor:
        full = x.new_zeros(len(x), self._own.size)
        full[:, self._inside.to(x.device)] = x
        return full


def _least_squares(
    solver: Solver,
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    b: Tensor,
    columns: int,
    progress: Progress,
) -> LeastSquares:
    if solver.name == "lstsq":
        return dense_least_squares(apply, columns, b)
    if solver.name == "neumann":
        return neumann(
            apply, adjoint, b, scale=solver.scale, tolerance=solver.tolerance,
            max_iterations=solver.max_iterations, progress=progress,
        )  # fmt: skip
    solve = lsmr if solver.name == "minres" else cgls
    return solve(apply, adjoint, b, tolerance=solver.tolerance, max_iterations=solver.max_iterations, progress=progress)


def _symmetric(
    solver: Solver, matvec: Callable[[Tensor], Tensor], b: Tensor, progress: Progress
) -> tuple[Tensor, Answer]:
    """A⁻¹ b of a square symmetric A, and how it was found."""
    if solver.name in ("lstsq", "neumann"):
        squares = _least_squares(solver, matvec, matvec, b, b.shape[1], progress)
        return squares.x, _told(squares, squares.residual)
    solve = minres if solver.name == "minres" else conjugate_gradient
    found: Solution = solve(
        matvec, b, tolerance=solver.tolerance, max_iterations=solver.max_iterations, progress=progress
    )
    return found.x, _solved({}, found)


def _solved(change: Gradients, found: Solution) -> Answer:
    """An answer by a solver whose step costs one product, and one more the check of the residual."""
    return Answer(change, _largest(found.residual), found.iterations, found.iterations + 1, found.converged)


def _told(found: LeastSquares, residual: Tensor) -> Answer:
    """How least squares were found; the change is to be filled in."""
    return Answer({}, _largest(residual), found.iterations, found.products, found.converged, found.diverged)


def _warn(method: str, solver: Solver, told: Answer) -> None:
    if told.diverged:
        rank_zero_warn(
            f"{method} by neumann diverged in {told.iterations} iterations; the best iterate, with a relative residual "
            f"of {told.residual:.1e}, was kept. HINT: pass Solver('neumann', scale=...) above 1/√2 of the largest "
            "singular value of what is solved (None measures it), or take 'minres', which needs no scale."
        )
    elif not told.converged:
        rank_zero_warn(
            f"{method} by {solver.name} stopped before its tolerance: after {told.iterations} iterations the "
            f"relative residual is {told.residual:.1e}, above {solver.tolerance:.1e}. HINT: this may be wanted, "
            "as stopping early regularises; else pass Solver(max_iterations=...), or damp more."
        )


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _like(v: Gradients) -> Tensor:
    some = next(iter(v.values()))
    return torch.empty(0, dtype=torch.promote_types(some.dtype, torch.float32), device=some.device)


def _largest(residual: Tensor) -> float:
    return float(residual.max()) if len(residual) else 0.0
