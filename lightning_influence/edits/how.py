"""How an edit is computed, and the linear problem that this makes of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import LightningModule

from lightning_influence.curvature import CurvatureStatistics, Damping, MatrixFree, statistics_of
from lightning_influence.edits.linearised import Linearised
from lightning_influence.edits.soundness import checked_reduction, decay_of
from lightning_influence.edits.task import Task
from lightning_influence.errors import QueryError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.objective import PerSample


@dataclass(frozen=True)
class How:
    """How an edit is computed.

    Attributes:
        weight_decay: of the training: the factor of θ in the gradient of the mean loss, for all parameters or by name;
            `None` reads it off the module's optimizers.
        steps: linear steps. With several, each solves anew at the weights that the one before has led to
            (re-linearised); repeating one and the same linear step is `apply(step=...)`.
        hessian_samples: take H over a random part of so many samples (recorded); `None` is all.
        seed: of that part.
        batch_size: samples a batch in products with H; `None` is that of the loader.
        per_sample_loss: (module, batch) -> (N,), where `training_step` does not tell it.
    """

    weight_decay: float | Mapping[str, float] | None = None
    steps: int = 1
    hessian_samples: int | None = None
    seed: int = 0
    batch_size: int | None = None
    per_sample_loss: PerSample | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "hessian_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise QueryError(
                    f"{name} must be a whole number",
                    expected="1 or more",
                    found=repr(value),
                    hint=f"leave {name} out for the default",
                )


def linearised(module: LightningModule, task: Task, method: InfluenceFunction, how: How) -> Linearised:
    """The problem, after all that can be refused early.

    Raises:
        QueryError: a method that is none, or whose damping is not known here; an unknown weight decay.
        LossError: a model that is not deterministic, or couples the samples of a batch.
        CaptureError: target parameters of another model.
        CurvatureError: unknown statistics, or labels that they have no use for.
    """
    if not isinstance(method, InfluenceFunction):
        raise QueryError(
            "this method says no change of the weights",
            expected="an InfluenceFunction, or one of its relatives such as GeneralizedInfluenceFunction(target)",
            found=repr(method),
            hint="TracIn and the baselines rank samples; they are no counterfactuals",
        )
    if not isinstance(method.damping, Damping):
        raise QueryError(
            "an edit has no store in which a damping was chosen",
            expected="a number, Relative(...) or None",
            found='damping="auto"',
            hint="pass the damping itself: influence.choose_damping(...).damping",
        )
    if method.inverse.about_all and how.steps > 1:
        raise QueryError(
            f"{type(method).__name__} already goes beyond the linear step",
            expected="steps=1",
            found=f"steps={how.steps}",
            hint="take InfluenceFunction for several linear steps",
        )
    target = getattr(method.inverse, "target", None)
    if target is not None:
        target.check({name: tuple(p.shape) for name, p in module.named_parameters()})
    reduction = checked_reduction(module, task.retained, how.per_sample_loss)
    names = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    statistics = _statistics(method)
    summed = task.whole.data.batch_size if reduction == "sum" else 1
    return Linearised(
        task,
        method.inverse,
        statistics,
        method.damping,
        decay_of(module, how.weight_decay, names, summed),
        method.chosen(names),
        method.labels_for(statistics),
        how.hessian_samples,
        how.seed,
        how.batch_size,
        how.per_sample_loss,
        reduction,
    )


def _statistics(method: InfluenceFunction) -> CurvatureStatistics:
    """The curvature of a method, estimated here; what `None` means in a store is the exact Hessian here."""
    return MatrixFree("hessian", "minres") if method.source is None else statistics_of(method.source)
