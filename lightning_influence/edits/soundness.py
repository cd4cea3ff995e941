"""What must be true of a model before it is edited: one loss for one sample, and a weight decay that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from numbers import Real
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.callbacks.optimizer_record import OptimizerRecord, denominators, optimizers_in
from lightning_influence.curvature import is_decoupled, weight_decay
from lightning_influence.edits.task import Part, Task
from lightning_influence.errors import InfluenceError, LossError, QueryError
from lightning_influence.objective import PerSample, Reduction, training_objective
from lightning_influence.replay import TrainingData, isolated, to_device

_LOOKED_AT = 8


def checked_reduction(module: LightningModule, part: Part, per_sample_loss: PerSample | None) -> Reduction:
    """How the training loss reduces its batch; found by comparing a few samples together and alone.

    Raises:
        LossError: the loss of a sample changes from one evaluation to the next (dropout), or with its batch (batch
            normalisation in train mode).
        QueryError: a Trainer is asked for, and there is none.
    """
    ids = part.positions[: min(_LOOKED_AT, len(part))]
    tolerance = max(torch.finfo(p.dtype).eps ** 0.5 for p in module.parameters() if p.is_floating_point())
    _, together, alone = part.data.alone(ids, range(len(ids)))

    with trainer_at_hand(module), isolated(module) as manual_losses:

        def loss(batch: Any, count: int, reduction: Reduction) -> float:
            placed = to_device(batch, module, None)
            found = training_objective(
                module, placed, count, per_sample_loss=per_sample_loss, reduction=reduction, manual_losses=manual_losses
            )
            return float(found.summed().detach())

        first, again = (loss(together, len(ids), "mean") for _ in range(2))
        if not _close(first, again, tolerance):
            raise LossError(
                "the loss of the same samples is another one at every evaluation",
                expected="a model that is deterministic in eval mode",
                found=f"{first:.6g}, then {again:.6g}",
                hint="switch off dropout and other noise that `eval()` leaves on (F.dropout(..., training=True))",
            )
        total = sum(loss(batch, 1, "mean") for batch in alone.values())
        if _close(first, total, tolerance):
            return "mean"
        if _close(loss(together, len(ids), "sum"), total, tolerance):
            return "sum"
    raise LossError(
        "the loss of a sample depends on the other samples of its batch",
        expected=f"{total:.6g}, the sum over {len(ids)} samples, each evaluated alone",
        found=f"{first:.6g} for the same samples in one batch",
        hint="batch normalisation must use its running statistics in eval mode (track_running_stats=True, no train() "
        "inside training_step); or define `per_sample_loss(batch) -> (N,)` on the module",
    )


@contextmanager
def trainer_at_hand(module: LightningModule) -> Iterator[None]:
    """Say so where a loss needs the Trainer of a module that has none.

    Raises:
        QueryError: it does.
    """
    try:
        yield
    except RuntimeError as error:
        if module._trainer is not None or "not attached to a `Trainer`" not in str(error):
            raise
        raise QueryError(
            "the training loss asks for self.trainer, and this module has none",
            expected="a module that is attached to its Trainer, as it is after trainer.fit(module)",
            found=f"{type(module).__name__} without a Trainer, as it is after loading or copying",
            hint="set module.trainer = trainer, pass per_sample_loss=, or let training_step do without self.trainer",
        ) from error


def check_new_labels(module: LightningModule, task: Task, per_sample_loss: PerSample | None) -> None:
    """Evaluate the samples of a relabelling with their new labels, to name one that has no loss.

    Raises:
        QueryError: a sample whose loss fails with its new label, and with its old one does not.
    """
    if task.labels is None:
        return
    (_, old), (_, new) = task.leaving
    with trainer_at_hand(module), isolated(module) as manual_losses:

        def failure(batch: Any, count: int) -> Exception | None:
            placed = to_device(batch, module, None)
            try:
                training_objective(module, placed, count, per_sample_loss=per_sample_loss, manual_losses=manual_losses)
            except InfluenceError:
                raise
            except Exception as error:  # whatever a user's loss raises
                return error
            return None

        def alone(data: TrainingData, position: int) -> Exception | None:
            (batch,) = data.batches([(position,)])
            return failure(batch, 1)

        size = new.data.batch_size
        chunks = [new.positions[start : start + size] for start in range(0, len(new), size)]
        with closing(new.data.batches(chunks)) as batches:
            for ids, batch in zip(chunks, batches, strict=True):
                failed = failure(batch, len(ids))
                for i in ids if failed is not None else ():
                    mine = alone(new.data, i)
                    if mine is not None and alone(old.data, i) is None:
                        raise QueryError(
                            f"training sample {i} cannot have the label {task.labels[i]!r}",
                            expected="a label that the training loss knows, such as one of the classes of the model",
                            found=f"{type(mine).__name__}: {mine}",
                            hint="classes count from 0 to their number less one; look at the labels that you pass",
                        ) from mine
                if failed is not None:
                    raise failed


def check_one_batch(task: Task) -> None:
    """Refuse loaders whose samples cannot stand in one batch, which an H of all of them needs.

    Raises:
        QueryError: they are collated to another form, or not at all.
    """
    if task.kind != "samples":
        return
    both, forgotten = task.whole.data, task.leaving[0][1].data
    try:
        _, _, alone = both.alone((0, len(task.retained)), (0, 1))
        own = forgotten.alone((0,), (0,))[2][0]
    except InfluenceError:
        raise
    except Exception as error:  # whatever collating raises
        raise _apart(f"{type(error).__name__}: {error}") from error
    kept, gone = _form(alone[0]), _form(alone[1])
    if not kept == gone == _form(own):
        raise _apart(f"{kept} of retained_loader, {_form(own)} of forget_loader")


def _apart(found: str) -> QueryError:
    return QueryError(
        "the two loaders make batches of different forms, and H is taken over the samples of both at once",
        expected="datasets whose samples the collate function of retained_loader brings into one batch",
        found=found,
        hint="let both loaders give samples of one form, or take InfluenceFunction, whose H is that of retained_loader",
    )


def _form(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} of {batch.dim()} dimensions"
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{key!r}: {_form(batch[key])}' for key in sorted(batch, key=repr))}}}"
    if isinstance(batch, (tuple, list)):
        return f"({', '.join(map(_form, batch))})"
    return type(batch).__name__


def decay_of(
    module: LightningModule,
    given: float | Mapping[str, float] | None,
    names: tuple[str, ...],
    summed_over: int,
) -> dict[str, float]:
    """Weight decay in units of the mean loss, by parameter name: given, or read off the module's optimizers.

    Raises:
        QueryError: it cannot be read, or is decoupled (AdamW) and its optimizer's state is gone; what is given is no
            decay, or one of parameters that are not trained.
    """
    if given is not None:
        return _checked(given, names)
    trainer = module._trainer
    optimizers = [] if trainer is None else trainer.optimizers
    if not optimizers:
        try:
            with isolated(module):
                optimizers = optimizers_in(module.configure_optimizers())
        except Exception as error:  # whatever a user's function raises without a Trainer
            raise _unknown(f"configure_optimizers() fails outside a fit ({type(error).__name__}: {error})") from error
    groups, scales = OptimizerRecord().groups(optimizers, module), denominators(optimizers, module)
    for group in groups:
        if group.options.get("weight_decay") and is_decoupled(group) and not set(group.parameters) <= set(scales):
            raise _unknown(f"{group.optimizer} without its second moments")
    return weight_decay(groups, names, scales, summed_over=summed_over)


def _checked(given: float | Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    decay = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    for name, value in decay.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if name not in names or not number or not 0 <= float(value) < float("inf"):
            raise QueryError(
                "this is no weight decay of the parameters that are trained",
                expected=f"a number, 0 or more, or such numbers by name among {', '.join(names)}",
                found=repr(value) if name in names else repr(name),
                hint="pass weight_decay=, the factor of θ in the gradient of the mean loss, 0 for none",
            )
    return {name: float(value) for name, value in decay.items() if value}


def _unknown(found: str) -> QueryError:
    return QueryError(
        "the weight decay of the training is not known",
        expected="optimizers that tell it",
        found=found,
        hint="pass weight_decay=, the factor of θ in the gradient of the mean loss (0 for none), or one by parameter "
        "name; for AdamW it is wd (√v̂ + ε)",
    )


def _close(left: float, right: float, tolerance: float) -> bool:
    return abs(left - right) <= tolerance * abs(right) + 1e-6
