"""ModelEdit: a change of trained weights, as if some training samples had been absent or labelled otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.edits.edit_file import read_edit, write_edit
from lightning_influence.edits.how import How
from lightning_influence.edits.line_search import (
    STEPS,
    Criterion,
    LineSearch,
    keeping,
    keeping_and_forgetting,
    refuse_training_set,
    search,
)
from lightning_influence.edits.linearised import Linearised, linearised
from lightning_influence.edits.module_state import Module, check_digests, copied, digests, moved
from lightning_influence.edits.path import followed
from lightning_influence.edits.task import Task, relabelling, removal, samples
from lightning_influence.errors import QueryError, StoreError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.gradients import Dense, GradientBlock, TargetParameters
from lightning_influence.objective import PerSample


@dataclass(frozen=True, eq=False)
class ModelEdit:
    """A path from a model's weights to those that it would have had (Lyu, Jang, Ryu & Yang 2023, arXiv:2312.05586).

        δ answers g:   H δ ≈ g,   H = (1/N) Σ_retained ∇²ℓ + decay,   g = (1/N) Σ_removed ∇ℓ

    or, for labels that change, H of the relabelled data and g = (1/N) Σ (∇ℓ(old label) − ∇ℓ(new label)). N stays that
    of the training set. On a quadratic loss θ + δ with all parameters is what training again would have given.

        target = choose_target(module, forget_loader, ratio=0.05)
        edit = ModelEdit.from_removal(module, train_loader, ids, GeneralizedInfluenceFunction(target))
        step = edit.line_search(module, validation_loader, held_out_forget_loader).step
        edited = edit.apply(module, step=step)        # a copy, an ordinary LightningModule

    Attributes:
        path: by parameter name the changes (steps, *shape) reached after each linear step, zero outside K.
        before: by parameter name the weights before the edit, of those that change.
        record: what was edited and how, as plain JSON: the task, method, damping, K, and of every step λ, the residual
            of the solve, its iterations and products, and what is left of the gradient of all trained parameters; H is
            that of `InfluenceFunction(parameters=...)` alone, so that the gradient of the others is left whole.
        per_sample_loss: the loss that `How` was given, for a line search; it is not saved.
    """

    path: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    record: Mapping[str, Any]
    per_sample_loss: PerSample | None = field(default=None, repr=False)

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_removal(
        cls,
        module: LightningModule,
        train_loader: Any,
        sample_ids: Tensor | Sequence[int],
        method: InfluenceFunction,
        how: How | None = None,
    ) -> ModelEdit:
        """As if the samples had not been trained on.

        Args:
            module: the trained model, whose weights are not touched.
            train_loader: the training data, a `DataLoader` over a map-style dataset.
            sample_ids: positions in the training set.
            method: `GeneralizedInfluenceFunction`, `FreezingInfluenceFunction`, `ProjectedInfluenceFunction`,
                `SecondOrderInfluenceFunction` or `InfluenceFunction`.
            how: weight decay, steps, sampling; defaults otherwise.

        Raises:
            QueryError: ids that are empty, all, double, or none; a method without a curvature that can be estimated
                here; an unknown weight decay.
            LossError: a model that is not deterministic, or couples the samples of a batch.
            CaptureError: target parameters of another model, or of one in which other parameters were trained.
            CurvatureError: the solver diverges, meets negative curvature, or H cannot be multiplied with.
        """
        return cls._made(module, removal(train_loader, sample_ids), method, how or How())

    @classmethod
    def from_relabelling(
        cls,
        module: LightningModule,
        train_loader: Any,
        labels: Mapping[int, Any],
        method: InfluenceFunction,
        how: How | None = None,
        *,
        relabel: Callable[[Any, Any], Any] | None = None,
    ) -> ModelEdit:
        """As if samples had been trained on with other labels. Arguments and errors are those of `from_removal`, and:

        Args:
            labels: new label by position in the training set.
            relabel: (sample, new label) -> sample; the default knows (..., label) and {"label": ...}.

        Raises:
            QueryError: a label for which there is no loss, such as that of a class too many.
        """
        return cls._made(module, relabelling(train_loader, labels, relabel), method, how or How())

    @classmethod
    def from_samples(
        cls,
        module: LightningModule,
        forget_loader: Any,
        retained_loader: Any,
        method: InfluenceFunction,
        how: How | None = None,
    ) -> ModelEdit:
        """As if the samples of the first loader had not been trained on beside those of the second. Errors are those of
        `from_removal`, and:

        Raises:
            QueryError: to second order, loaders whose samples cannot stand in one batch.
        """
        return cls._made(module, samples(forget_loader, retained_loader), method, how or How())

    @classmethod
    def _made(cls, module: LightningModule, task: Task, method: InfluenceFunction, how: How) -> ModelEdit:
        with torch.inference_mode(False):
            problem = linearised(module, task, method, how)
            path = followed(module, problem)
            record = {
                **task.record(),
                "fingerprints": task.fingerprints(),
                "method": type(method).__name__,
                **_settings(problem, module),
                "module": type(module).__name__,
                "weights": digests(module),
                "steps": path.steps,
                **path.left,
            }
        return cls(path.reached, path.before, record, how.per_sample_loss)

    # -- using it ---------------------------------------------------------------------------------------------------

    def change(self, step: float = 1.0) -> dict[str, Tensor]:
        """The change of the weights that `apply` makes, by parameter name. Between the knots of a path, and beyond its
        ends, it is linear.

        Raises:
            QueryError: a step that is no finite number.
        """
        if isinstance(step, bool) or not isinstance(step, Real) or not math.isfinite(step):
            raise QueryError(
                "an edit cannot be followed so far",
                expected="a finite number, 1 for the whole edit",
                found=repr(step),
                hint="pass step=1.0, or the step that line_search found",
            )
        knots = len(next(iter(self.path.values())))
        number = min(max(int(step * knots), 0), knots - 1)
        inside = step * knots - number
        found = {}
        for name, changes in self.path.items():
            start = changes[number - 1] if number else torch.zeros_like(changes[0])
            found[name] = torch.lerp(start, changes[number], inside)  # exact at both ends
        return found

    def apply(self, module: Module, step: float = 1.0) -> Module:
        """A copy of the module with the edit, `step` times as far; the module itself is not touched.

        Raises:
            StoreError: the module is not the one that the edit was made for, or has other weights or persistent
                buffers, frozen ones too.
        """
        self._check_before(module)
        return self._edited(module, step)

    def _edited(self, module: Module, step: float) -> Module:
        """What `apply` gives, of a module that was checked."""
        with torch.inference_mode(False), torch.no_grad():
            edited = copied(module)
            parameters = dict(edited.named_parameters())
            for name, change in self.change(step).items():
                weight = parameters[name]
                weight.copy_(moved(weight, change.to(weight.device)))
        return edited

    def undo(self, module: Module) -> Module:
        """A copy of an edited module with the weights from before, bit by bit.

        Raises:
            StoreError: another module, or one whose other weights or persistent buffers have changed since, as by
                training on.
        """
        self._check(module, exactly=False)
        with torch.inference_mode(False), torch.no_grad():
            restored = copied(module)
            parameters = dict(restored.named_parameters())
            for name, weight in self.before.items():
                parameters[name].copy_(weight)
        check_digests(restored, self.record["weights"])
        return restored

    def within(self, target: TargetParameters) -> ModelEdit:
        """The part of this edit that lies in the target parameters: of an edit of one step by `InfluenceFunction` that
        by `ProjectedInfluenceFunction`, without another solve.

        Raises:
            QueryError: an edit of several steps, each of which would begin elsewhere if K alone had moved.
            CaptureError: target parameters of another model, or of parameters that the edit does not change.
        """
        if len(self.record["steps"]) > 1:
            raise QueryError(
                "an edit of several steps cannot be cut down to some parameters",
                expected="an edit of one linear step",
                found=f"{len(self.record['steps'])} steps, taken with all of its parameters moved",
                hint="make the edit with ProjectedInfluenceFunction(target)",
            )
        target.check({**target.shapes, **{name: tuple(weight.shape) for name, weight in self.before.items()}})
        path = {name: block.dense() for name, block in target.restricted(_rows(self.path)).items()}
        record = {**self.record, "within": _target_record(target), "steps": [dict(s) for s in self.record["steps"]]}
        for told in (record, *record["steps"]):
            told["left"] = told["left_frozen"] = None  # of the whole edit, no longer of this one
        return replace(self, path=path, before={name: self.before[name] for name in path}, record=record)

    def line_search(
        self,
        module: LightningModule,
        validation_loader: Any = None,
        forget_loader: Any = None,
        *,
        criterion: Criterion | None = None,
        steps: Sequence[float] = STEPS,
        per_sample_loss: PerSample | None = None,
    ) -> LineSearch:
        """The step that does best on held-out samples, which must not be those that a result is reported on.

        Args:
            module: the module before the edit.
            validation_loader: held-out samples that are to be answered well (after a relabelling: with the labels that
                are now meant).
            forget_loader: held-out samples of the kind that is to be forgotten. With it the criterion is the F1 of
                `keeping_and_forgetting`, without it the negative mean loss on the validation samples.
            criterion: a function module -> float in place of these, higher is better.
            steps: to try.
            per_sample_loss: `None` takes the one that the edit was made with.

        Raises:
            QueryError: the training set itself, or a part of it; neither loader nor criterion; a loss without accuracy;
                an edit from disk that was made with a `per_sample_loss`, which has to be given again.
        """
        if criterion is None and validation_loader is None:
            raise QueryError(
                "a line search needs something to judge by",
                expected="a validation loader, or criterion=",
                found="neither",
                hint="pass held-out samples",
            )
        reduction: Any = self.record["reduction"]
        for loader in (validation_loader, forget_loader):
            if loader is not None:
                refuse_training_set(loader, self.record["fingerprints"])
        if criterion is None:
            loss = self._loss(per_sample_loss)
            criterion = (
                keeping(validation_loader, loss, reduction)
                if forget_loader is None
                else keeping_and_forgetting(validation_loader, forget_loader, loss, reduction)
            )
        self._check_before(module)
        return search(lambda step: self._edited(module, step), criterion, steps)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `edit.safetensors` and `edit.json` into a new or empty folder.

        Raises:
            StoreError: a folder with an edit in it, or a disk that refuses.
        """
        return write_edit(Path(folder), self.path, self.before, self.record)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ModelEdit:
        """The edit that `save` wrote; nothing is executed.

        Raises:
            StoreError: no edit, or one whose files are damaged.
        """
        return cls(*read_edit(Path(folder)))

    def __repr__(self) -> str:
        last = self.record["steps"][-1]
        told = self.record.get("within") or self.record
        size, total = told["size"], told["total"]
        share = "all parameters" if size == total else f"{size:,} of {total:,} parameters"
        residual = "closed form" if last["residual"] is None else f"residual {last['residual']:.1e}"
        left = "" if self.record["left"] is None else f", gradient left {self.record['left']:.3f}"
        return (
            f"ModelEdit({self.record['kind']} of {self.record['num_leaving']} from {self.record['num_samples']} "
            f"samples by {self.record['method']}, {share}, {residual}{left})"
        )

    def _loss(self, given: PerSample | None) -> PerSample | None:
        """The loss of one sample that a line search takes."""
        loss = given or self.per_sample_loss
        if loss is None and self.record["per_sample_loss"]:
            raise QueryError(
                "this edit was made with a per_sample_loss, which is not saved",
                expected="the same function again",
                found="per_sample_loss=None",
                hint="pass line_search(..., per_sample_loss=...), or criterion=",
            )
        return loss

    def _check_before(self, module: LightningModule) -> None:
        """Refuse a module that is not the one that the edit was made for, as it was then."""
        self._check(module, exactly=True)
        check_digests(module, self.record["weights"])

    def _check(self, module: LightningModule, exactly: bool) -> None:
        parameters = dict(module.named_parameters())
        for name, before in self.before.items():
            found = parameters.get(name)
            if found is None or found.shape != before.shape or found.dtype != before.dtype:
                raise StoreError(
                    f"this edit belongs to another model: parameter {name!r} differs",
                    expected=f"{tuple(before.shape)} {before.dtype}, in {self.record['module']}",
                    found="no such parameter" if found is None else f"{tuple(found.shape)} {found.dtype}",
                    hint="pass the module that the edit was made for",
                )
            same = found.detach().cpu() == before
            if not exactly:
                same = same | (self.path[name] != 0).any(0)
            if not bool(same.all()):
                raise StoreError(
                    f"the weights of {name!r} are not those that the edit was made {'at' if exactly else 'on'}",
                    expected="the weights before the edit" if exactly else "weights that only the edit has changed",
                    found=f"{int((~same).sum())} other values",
                    hint="an edit is applied to the module it was made from, once; "
                    "make a new one for weights that were trained on",
                )


def _settings(problem: Linearised, module: LightningModule) -> dict[str, Any]:
    target, how = problem.inverse.target, problem.how
    statistics = {"class": type(problem.statistics).__name__, **problem.statistics.settings()}
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    return {
        **problem.inverse.settings(),
        "curvature": {name: value for name, value in statistics.items() if isinstance(value, (str, int, float))},
        "damping": problem.damping.record(),
        "decay": dict(problem.decay),
        "reduction": problem.reduction,
        "seed": how.seed,
        "batch_size": how.batch_size or problem.task.retained.data.batch_size,
        "per_sample_loss": how.per_sample_loss is not None,
        "target": None if target is None else _target_record(target),
        "size": sum(sizes[name] for name in problem.parameters) if target is None else target.size,
        "total": sum(sizes.values()),
    }


def _target_record(target: TargetParameters) -> dict[str, Any]:
    return {"size": target.size, "total": target.total, "origin": dict(target.origin)}


def _rows(path: Mapping[str, Tensor]) -> dict[str, GradientBlock]:
    return {name: Dense(changes) for name, changes in path.items()}
