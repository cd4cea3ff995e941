"""Influence through a part K of the parameters: generalized, freezing and projected; and of groups, to second order."""

from __future__ import annotations

from lightning_influence.curvature import (
    CurvatureStatistics,
    Freezing,
    Generalized,
    MatrixFree,
    PartialInverse,
    Projected,
    SecondOrder,
    Solver,
)
from lightning_influence.curvature.partial_inverse import SolverName
from lightning_influence.errors import QueryError
from lightning_influence.estimators.influence_function import DampingArgument, InfluenceFunction
from lightning_influence.gradients import TargetParameters


class _Through(InfluenceFunction):
    """An influence function with another inverse; H is by default the exact Hessian, multiplied from the model."""

    def __init__(
        self, inverse: PartialInverse, curvature: str | CurvatureStatistics | None, damping: DampingArgument
    ) -> None:
        super().__init__(MatrixFree("hessian", "minres") if curvature is None else curvature, damping=damping)
        self.inverse = inverse


class GeneralizedInfluenceFunction(_Through):
    """Influence when only the target parameters K can change, and as little gradient as possible is to be left anywhere
    (Lyu, Jang, Ryu & Yang 2023, arXiv:2312.05586).

        score(q, z) = ⟨∇_K m(q), (H_{K,:} H_{:,K})⁻¹ H_{K,:} ∇ℓ(z)⟩

    The training gradients of *all* parameters take part: stored (`GradientSnapshot(parameters="all")`), or streaming
    by. With K = everything it is `InfluenceFunction`. H stands for H + λI, weight decay included.

    Args:
        target: K, from `choose_target` or `TargetParameters`.
        curvature: as in `InfluenceFunction`; `None` multiplies with the exact Hessian, for which the `InfluenceModule`
            needs `train_loader=`. `MatrixFree("ggn")` takes the Gauss–Newton matrix.
        damping: as in `InfluenceFunction`.
        solver: `"minres"`, `"cg"`, `"neumann"`, `"lstsq"`, or a `Solver` with tolerance and iterations. A step costs
            two products with H.

    Raises:
        QueryError: a store without the gradients of all parameters; a target of another model.
        CurvatureError: as the solver says.
    """

    def __init__(
        self,
        target: TargetParameters,
        curvature: str | CurvatureStatistics | None = None,
        *,
        damping: DampingArgument = None,
        solver: Solver | SolverName = "minres",
    ) -> None:
        super().__init__(Generalized(_checked(target), solver), curvature, damping)


class FreezingInfluenceFunction(_Through):
    """Influence when only the target parameters K can change, and gradients of the others do not count.

        score(q, z) = ∇_K m(q)ᵀ H_KK⁻¹ ∇_K ℓ(z)

    The training gradients of the parameters in K are enough. Arguments and errors are those of
    `GeneralizedInfluenceFunction`; a step of the solver costs one product with H (two for `"neumann"`).
    """

    def __init__(
        self,
        target: TargetParameters,
        curvature: str | CurvatureStatistics | None = None,
        *,
        damping: DampingArgument = None,
        solver: Solver | SolverName = "minres",
    ) -> None:
        super().__init__(Freezing(_checked(target), solver), curvature, damping)


class ProjectedInfluenceFunction(_Through):
    """The part of the ordinary influence that goes through K, although all parameters were free to change.

        score(q, z) = ∇_K m(q)ᵀ [H⁻¹ ∇ℓ(z)]_K

    The training gradients of all parameters take part. H is inverted by the curvature's own means: solver and tolerance
    are arguments of `MatrixFree`.
    """

    def __init__(
        self,
        target: TargetParameters,
        curvature: str | CurvatureStatistics | None = None,
        *,
        damping: DampingArgument = None,
    ) -> None:
        super().__init__(Projected(_checked(target)), curvature, damping)


class SecondOrderInfluenceFunction(_Through):
    """Influence of a group to second order in its weight (Basu, You & Feizi 2020, arXiv:1911.00418).

        δ = H⁻¹ g + H⁻¹ H_S H⁻¹ g        H of all samples, H_S and g the part of the group S

    A group is removed by `ModelEdit.from_removal`. Scores are those of single samples, for which the second term is a
    1/N-th of the first: they, and the sums of them that `predict_removal` takes, are those of `InfluenceFunction`.
    """

    def __init__(self, curvature: str | CurvatureStatistics | None = None, *, damping: DampingArgument = None) -> None:
        super().__init__(SecondOrder(), curvature, damping)


def _checked(target: object) -> TargetParameters:
    if not isinstance(target, TargetParameters):
        raise QueryError(
            "these are no target parameters",
            expected="TargetParameters, such as choose_target(module, loader, ratio=0.05)",
            found=type(target).__name__,
            hint="TargetParameters.of(module, masks) takes masks of your own, .everything(module) the whole model",
        )
    return target
