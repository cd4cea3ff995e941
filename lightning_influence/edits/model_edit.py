"""ModelEdit: a change of trained weights, as if some training samples had been absent or labelled otherwise."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

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
from lightning_influence.edits.task import Task, relabelling, removal, samples
from lightning_influence.errors import QueryError, StoreError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.gradients import Dense, GradientBlock, TargetParameters
from lightning_influence.objective import PerSample

Module = TypeVar("Module", bound=LightningModule)


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
        record: what was edited and how, as plain JSON: the task, method, damping, K, and of every step the residual of
            the solve, its iterations and products, and what is left of the gradient.
    """

    path: Mapping[str, Tensor]
    before: Mapping[str, Tensor]
    record: Mapping[str, Any]

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
            CaptureError: target parameters of another model.
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
        `from_removal`."""
        return cls._made(module, samples(forget_loader, retained_loader), method, how or How())

    @classmethod
    def _made(cls, module: LightningModule, task: Task, method: InfluenceFunction, how: How) -> ModelEdit:
        with torch.inference_mode(False):
            problem = linearised(module, task, method, how)
            work = copy.deepcopy(module)
            parameters = {name: p for name, p in work.named_parameters() if p.requires_grad}
            start = {name: p.detach().clone() for name, p in parameters.items()}
            g = problem.gradient(work)
            unrest = None if how.steps == 1 else _plus(problem.slope(work), g, 1.0)  # what training had left
            reached: dict[str, list[Tensor]] = {}
            told: list[dict[str, Any]] = []
            for number in range(how.steps):
                if unrest is not None and number:
                    g = _plus(unrest, problem.slope(work), -1.0)  # what still has to leave
                part = {name: value / (how.steps - number) for name, value in g.items()}
                answer, facts = problem.answer(work, part)
                told.append(facts)
                for name, block in answer.change.items():
                    with torch.no_grad():
                        change = block.dense()[0].to(parameters[name])
                        parameters[name].add_(change)
                    so_far = reached.setdefault(name, [])
                    so_far.append(so_far[-1] + change if so_far else change)
        path = {name: torch.stack(changes).cpu() for name, changes in reached.items()}
        _refuse_not_finite(path)
        record = {
            **task.record(),
            "fingerprints": task.fingerprints(),
            "method": type(method).__name__,
            **_settings(problem),
            "module": type(module).__name__,
            "weights_sha256": _digest(start),
            "weights": list(start),
            "steps": told,
        }
        return cls(path, {name: start[name].cpu() for name in path}, record)

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
            found[name] = start + inside * (changes[number] - start)
        return found

    def apply(self, module: Module, step: float = 1.0) -> Module:
        """A copy of the module with the edit, `step` times as far; the module itself is not touched.

        Raises:
            StoreError: the module is not the one that the edit was made for, or has other weights.
        """
        self._check_before(module)
        return self._edited(module, step)

    def _edited(self, module: Module, step: float) -> Module:
        """What `apply` gives, of a module that was checked."""
        with torch.inference_mode(False), torch.no_grad():
            edited = copy.deepcopy(module)
            parameters = dict(edited.named_parameters())
            for name, change in self.change(step).items():
                weight = parameters[name]
                change = change.to(weight)
                weight.copy_(torch.where(change == 0, weight, weight + change))
        return edited

    def undo(self, module: Module) -> Module:
        """A copy of an edited module with the weights from before, bit by bit.

        Raises:
            StoreError: another module, or one whose other weights have changed since, as by training on.
        """
        self._check(module, exactly=False)
        with torch.inference_mode(False), torch.no_grad():
            restored = copy.deepcopy(module)
            parameters = dict(restored.named_parameters())
            for name, weight in self.before.items():
                parameters[name].copy_(weight)
        self._check_all(restored)
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
        for told in record["steps"]:
            told["left"] = told["left_frozen"] = None  # of the whole edit, no longer of this one
        return ModelEdit(path, {name: self.before[name] for name in path}, record)

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

        Raises:
            QueryError: the training set itself; neither loader nor criterion; a loss without accuracy.
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
            criterion = (
                keeping(validation_loader, per_sample_loss, reduction)
                if forget_loader is None
                else keeping_and_forgetting(validation_loader, forget_loader, per_sample_loss, reduction)
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
        target = self.record.get("within") or self.record.get("target")
        share = "all parameters" if target is None else f"{target['size']:,} of {target['total']:,} parameters"
        residual = "closed form" if last["residual"] is None else f"residual {last['residual']:.1e}"
        several = len(self.record["steps"]) > 1  # each of which tells of its own share of the gradient
        left = "" if several or last["left"] is None else f", gradient left {last['left']:.3f}"
        return (
            f"ModelEdit({self.record['kind']} of {self.record['num_leaving']} from {self.record['num_samples']} "
            f"samples by {self.record['method']}, {share}, {residual}{left})"
        )

    def _check_before(self, module: LightningModule) -> None:
        """Refuse a module that is not the one that the edit was made for, as it was then."""
        self._check(module, exactly=True)
        self._check_all(module)

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

    def _check_all(self, module: LightningModule) -> None:
        """Refuse a module whose weights before the edit are others than those of the edit's, outside K too."""
        parameters = dict(module.named_parameters())
        held = {name: parameters[name].detach() for name in self.record["weights"] if name in parameters}
        if len(held) < len(self.record["weights"]) or _digest(held) != self.record["weights_sha256"]:
            raise StoreError(
                "weights that the edit does not change are not those that it was made beside",
                expected=f"all {len(self.record['weights'])} trained parameters as they were",
                found="changed weights, as by training on",
                hint="make a new edit for weights that were trained on",
            )


def _settings(problem: Linearised) -> dict[str, Any]:
    target = problem.inverse.target
    statistics = {"class": type(problem.statistics).__name__, **problem.statistics.settings()}
    return {
        **problem.inverse.settings(),
        "curvature": {name: value for name, value in statistics.items() if isinstance(value, (str, int, float))},
        "damping": problem.damping.record(),
        "decay": dict(problem.decay),
        "reduction": problem.reduction,
        "target": None if target is None else _target_record(target),
    }


def _target_record(target: TargetParameters) -> dict[str, Any]:
    return {"size": target.size, "total": target.total, "origin": dict(target.origin)}


def _rows(path: Mapping[str, Tensor]) -> dict[str, GradientBlock]:
    return {name: Dense(changes) for name, changes in path.items()}


def _plus(left: Mapping[str, Tensor], right: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: left[name] + factor * value for name, value in right.items()}


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights.items():
        flat = weight.cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_not_finite(path: Mapping[str, Tensor]) -> None:
    bad = [name for name, changes in path.items() if not bool(changes.isfinite().all())]
    if bad:
        raise QueryError(
            f"the change of {bad[0]!r} is NaN or infinite",
            expected="finite changes",
            found="NaN or infinity",
            hint="damp more, take fewer iterations, or another solver",
        )
