"""One linear step of an edit: H of what stays, g of what leaves, and how the parameters answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.curvature import (
    Absolute,
    Answer,
    Curvature,
    CurvatureStatistics,
    Damping,
    LossOperator,
    MatrixFree,
    PartialInverse,
    TrainingEvidence,
    statistics_of,
)
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.edits.how import How
from lightning_influence.edits.soundness import check_new_labels, check_one_batch, checked_reduction, decay_of
from lightning_influence.edits.task import Part, Task
from lightning_influence.errors import CurvatureError, QueryError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.gradients import Dense, Gradients, accumulation_dtype, select
from lightning_influence.objective import Labels, Reduction


@dataclass(frozen=True)
class Linearised:
    """How a module is differentiated and its answer solved for.

    Attributes:
        task: what is to be brought about.
        inverse, statistics, damping: how H is taken and inverted.
        decay: weight decay by parameter name.
        parameters: those that H is about, and that change.
        labels: over which labels H is taken; `None` lets the loss choose.
        reduction: of the training loss.
        how: over which samples H is taken, in which batches, and the loss of one sample where it was given.
    """

    task: Task
    inverse: PartialInverse
    statistics: CurvatureStatistics
    damping: Damping
    decay: Mapping[str, float]
    parameters: tuple[str, ...]
    labels: Labels | None
    reduction: Reduction
    how: How

    def gradient(self, module: LightningModule) -> dict[str, Tensor]:
        """g = (1/N) Σ_leaving ± ∇ℓ at the weights of the module."""
        total: dict[str, Tensor] = {}
        for sign, part in self.task.leaving:
            for name, gradient in self._summed(module, part).items():
                add = gradient * (sign / self.task.num_samples)
                total[name] = total[name] + add if name in total else add
        if not any(bool(gradient.any()) for gradient in total.values()):
            raise QueryError(
                "there is nothing to edit: what leaves has no gradient",
                expected="samples whose loss depends on the parameters",
                found="a gradient of 0",
                hint="labels that are given again as they were change nothing",
            )
        return total

    def slope(self, module: LightningModule) -> dict[str, Tensor]:
        """∇J_new = (1/N) Σ_retained ∇ℓ + decay · θ at the weights of the module."""
        parameters = dict(module.named_parameters())
        return {
            name: gradient / self.task.num_samples + self.decay.get(name, 0.0) * parameters[name].detach().to(gradient)
            for name, gradient in self._summed(module, self.task.retained).items()
        }

    def answer(self, module: LightningModule, g: Mapping[str, Tensor]) -> tuple[Answer, dict[str, Any]]:
        """The change δ (1, *shape) for a gradient that leaves, and what there is to say of it: λ, in units of H as the
        edit has it, and what is left, ‖g − (H + λI) δ‖/‖g‖ (see `left`); the latter not to second order, whose H is not
        that of what stays."""
        part = self.task.whole if self.inverse.about_all else self.task.retained
        share = len(part) / self.task.num_samples  # H of the mean over `part`, times this, has 1/N
        evidence = self._evidence(module, part, self.how.hessian_samples, list(self.parameters))
        collected = self.statistics.collect(evidence)
        curvature = collected.decayed({name: value / share for name, value in self.decay.items()})
        damping = self.damping.times(1 / share) if isinstance(self.damping, Absolute) else self.damping
        kind = accumulation_dtype(*module.parameters())
        rows: Gradients = {
            name: Dense((g[name] / share).to(kind).unsqueeze(0)) for name in curvature.parameters if name in g
        }
        answer = self.inverse.change(
            curvature, rows, damping, (lambda v: self._of_group(module, v)) if self.inverse.about_all else None
        )
        left: dict[str, float | None] = {"left": None, "left_frozen": None}
        if not self.inverse.about_all:
            product = _product(curvature, answer.change, damping)
            left = self.left(
                {name: v - share * product[name].to(v) if name in product else v for name, v in g.items()}, g
            )
        told = {
            "hessian_samples": evidence.num_samples,
            "hessian_sampled": evidence.num_samples < len(part),
            "labels": evidence.labels,
            "damping": self._numbers(curvature, share),
            **answer.report(),
            **left,
        }
        return answer, told

    def left(self, rest: Mapping[str, Tensor], g: Mapping[str, Tensor]) -> dict[str, float | None]:
        """‖rest‖/‖g‖, of all trained parameters (`left`) and of what cannot change (`left_frozen`; `None` where all
        can)."""
        target, size, left, frozen = self.inverse.target, 0.0, 0.0, 0.0
        for name, gradient in g.items():
            squares = rest[name].square()
            size, left = size + float(gradient.square().sum()), left + float(squares.sum())
            if target is None:
                frozen += 0.0 if name in self.parameters else float(squares.sum())
            else:
                mask = target.masks.get(name)
                frozen += float((squares if mask is None else squares * ~mask.to(squares.device)).sum())
        norm, all_can = max(size, 1e-300) ** 0.5, target is None and set(g) <= set(self.parameters)
        return {"left": left**0.5 / norm, "left_frozen": None if all_can else frozen**0.5 / norm}

    def _numbers(self, curvature: Curvature, share: float) -> float | dict[str, float]:
        """λ beside H with 1/N: one number, or one by parameter name."""
        if isinstance(self.damping, Absolute):
            return self.damping.value
        shifts = {name: value * share for name, value in curvature.shifts(self.damping).items()}
        return shifts if len(set(shifts.values())) > 1 else next(iter(shifts.values()))

    def _of_group(self, module: LightningModule, v: Gradients) -> Gradients:
        """H_S v: the part of H that comes from what leaves."""
        selection = select(module, list(v))
        space = ParameterSpace({name: tuple(p.shape) for name, p in selection.parameters.items()})
        flat = space.rows(v, next(iter(v.values())).dense())
        total = torch.zeros_like(flat)
        for sign, part in self.task.leaving:
            operator = LossOperator(self._evidence(module, part, None, list(v)), self.statistics.stands_for)
            total += operator.matvec(flat) * (sign * len(part) / self.task.num_samples)
        return space.named(total, tuple(v), v)

    def _summed(self, module: LightningModule, part: Part) -> dict[str, Tensor]:
        """Σ ∇ℓ of every trained parameter, in float64."""
        return self._evidence(module, part, None).summed_gradients("gradients")

    def _evidence(
        self, module: LightningModule, part: Part, at_most: int | None, names: list[str] | None = None
    ) -> TrainingEvidence:
        return TrainingEvidence(
            module,
            select(module, "all" if names is None else names),
            part.data,
            labels=self.labels,
            seed=self.how.seed,
            at_most=at_most,
            positions=part.positions,
            batch_size=self.how.batch_size,
            per_sample_loss=self.how.per_sample_loss,
            reduction=self.reduction,
        )


def linearised(module: LightningModule, task: Task, method: InfluenceFunction, how: How) -> Linearised:
    """The problem, after all that can be refused early.

    Raises:
        QueryError: a method that is none, or whose damping is not known here; an unknown weight decay; a new label that
            has no loss; loaders that cannot share a batch where they must; a Trainer that is asked for and gone.
        LossError: a model that is not deterministic, or couples the samples of a batch.
        CaptureError: target parameters of another model, or of one in which other parameters were trained.
        CurvatureError: unknown statistics, labels that they have no use for, or an inverse that is not that of H + λI.
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
    names = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    if method.inverse.target is not None:
        method.inverse.target.check({name: tuple(p.shape) for name, p in module.named_parameters()})
        method.inverse.target.check_trained(names)
    statistics = _statistics(method)
    labels, chosen = method.labels_for(statistics), method.chosen(names)
    if method.inverse.about_all:
        check_one_batch(task)
    check_new_labels(module, task, how.per_sample_loss)
    reduction = checked_reduction(module, task.retained, how.per_sample_loss)
    summed = task.whole.data.batch_size if reduction == "sum" else 1
    decay = decay_of(module, how.weight_decay, names, summed)
    return Linearised(task, method.inverse, statistics, method.damping, decay, chosen, labels, reduction, how)


def _statistics(method: InfluenceFunction) -> CurvatureStatistics:
    """The curvature of a method, estimated here; what `None` means in a store is the exact Hessian here.

    Raises:
        CurvatureError: one whose inverse is not that of H + λI.
    """
    if method.source is None:
        return MatrixFree("hessian", "minres")
    statistics = statistics_of(method.source)
    if not statistics.has_shifts:
        raise CurvatureError(
            f"no edit can be made with {type(statistics).__name__}: its inverse is not that of a matrix H + λI",
            expected="MatrixFree(), curvature.Dense(), LowRank(), EKFAC(), KFAC() or Diagonal()",
            found=repr(statistics),
            hint="pass another curvature to the method; this one serves scores",
        )
    return statistics


def _product(curvature: Curvature, change: Gradients, damping: Damping) -> dict[str, Tensor]:
    """(H + λI) δ, (*shape) in float64, of the parameters where it can be anything but 0."""
    shifts, product = curvature.shifts(damping), curvature.matvec(change, rows=curvature.connected(tuple(change)))
    found = {name: block.dense()[0].double() for name, block in product.items()}
    for name, block in change.items():
        found[name] = found[name] + shifts[name] * block.dense()[0].to(found[name])
    return found
