"""One model edited by every method: generalized, freezing, projected, whole and second-order influence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence import (
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    How,
    InfluenceFunction,
    MatrixFree,
    ModelEdit,
    ProjectedInfluenceFunction,
    SecondOrderInfluenceFunction,
    Solver,
    TargetParameters,
)
from recipes.truths.retraining import Samples

Make = Callable[[InfluenceFunction], ModelEdit]
Values = Mapping[str, float]


@dataclass(frozen=True)
class Solving:
    """How the methods solve, the same for all.

    Args:
        damping: λ, added to H.
        iterations: steps of MINRES (of LSMR for GIF, each of which costs two products with H).
        hessian_samples: training images that H is taken over; None is all that stay.
        steps: linear steps, each at the weights that the one before has led to; SIF takes one.
        batch_size: images a batch in products with H.
        tolerance: relative residual at which a solver stops earlier.
    """

    damping: float
    iterations: int
    hessian_samples: int | None
    steps: int = 1
    batch_size: int = 256
    tolerance: float = 1e-3

    def __str__(self) -> str:
        images = "all training images" if self.hessian_samples is None else f"{self.hessian_samples} training images"
        return (
            f"Exact Hessian over {images}, λ = {self.damping}, at most {self.iterations} steps of MINRES or LSMR "
            f"in each of {self.steps} linear steps (SIF takes one)"
        )

    def how(self, weight_decay: float, seed: int, method: InfluenceFunction | None = None) -> How:
        """The rest of an edit's settings."""
        return How(
            weight_decay=weight_decay,
            steps=1 if isinstance(method, SecondOrderInfluenceFunction) else self.steps,
            hessian_samples=self.hessian_samples,
            seed=seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Row:
    """What one model came out with.

    Args:
        method: its name.
        share: part of the parameters that it changes; None for models that were trained.
        seed: of the model.
        values: what was measured on the test images.
        step: what the line search on the validation images chose.
        seconds: of the solve.
        left: part of the gradient that the linear model leaves over, where there is one linear step and it is known.
    """

    method: str
    share: float | None
    seed: int
    values: Values
    step: float | None = None
    seconds: float | None = None
    left: float | None = None


def edited(
    targets: Mapping[float, TargetParameters],
    make: Make,
    solving: Solving,
    whole: bool = True,
) -> Iterator[tuple[str, float, ModelEdit, float]]:
    """(method, share of the parameters, edit, seconds of its solve) of all methods, each once it is there.

    Args:
        targets: K by share.
        make: the edit that a method gives.
        whole: also the two methods that change every parameter, and the one that cuts their change down to K.
    """
    matrix = MatrixFree("hessian", "minres", tolerance=solving.tolerance, max_iterations=solving.iterations)
    solver = Solver("minres", solving.tolerance, solving.iterations)
    for share, target in targets.items():
        generalized = GeneralizedInfluenceFunction(target, damping=solving.damping, solver=solver)
        yield "GIF", share, *timed(make, generalized)
        yield "FIF", share, *timed(make, FreezingInfluenceFunction(target, damping=solving.damping, solver=solver))
    if not whole:
        return
    first, seconds = timed(make, InfluenceFunction(matrix, damping=solving.damping))
    for share, target in targets.items():
        if solving.steps == 1:
            yield "PIF", share, first.within(target), seconds  # the same solve, cut
        else:  # each step begins where the one before has led K alone
            yield "PIF", share, *timed(make, ProjectedInfluenceFunction(target, matrix, damping=solving.damping))
    yield "IF", 1.0, first, seconds
    yield "SIF", 1.0, *timed(make, SecondOrderInfluenceFunction(matrix, damping=solving.damping))


def left_over(edit: ModelEdit) -> float | None:
    """What the one linear step of an edit leaves of the gradient; of several, each tells of its own share alone."""
    steps = edit.record["steps"]
    return None if len(steps) > 1 else steps[0]["left"]


def part(samples: Samples, chosen: Tensor) -> Samples:
    """Some of the samples, by a mask or by positions."""
    return Samples(samples.inputs[chosen], samples.labels[chosen])


def shown(row: Row) -> None:
    """Print a row as soon as it is there."""
    share = "" if row.share is None else f"{row.share:.0%}"
    extra = "" if row.step is None else f"  step {row.step:g}, {row.seconds or 0:.0f} s"
    values = "  ".join(f"{name} {value:.4f}" for name, value in row.values.items())
    print(f"seed {row.seed}  {row.method:10s} {share:>5s}  {values}{extra}", flush=True)


def timed(make: Make, method: InfluenceFunction) -> tuple[ModelEdit, float]:
    """The edit that a method gives, and the seconds it took."""
    began = time.perf_counter()
    edit = make(method)
    return edit, time.perf_counter() - began


def quiet() -> None:
    """One thread, and none of the warnings that a solver stopped early: here that is the setting."""
    import warnings

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(stopped before its tolerance|did not converge)")
