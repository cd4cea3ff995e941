"""The check on the first batch of every run: are the captured rows really the gradients of single samples?

Two questions, since either alone can be answered yes by wrong rows: (a) do the rows sum to autograd's own gradient of
every selected parameter (it catches uses of a weight that no hook sees), and (b) does each row equal the gradient of
its sample collated alone (it catches coupled, summed, token-averaged and time-first losses).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_influence.errors import CaptureError, LossError
from lightning_influence.gradients import GradientBlock, GradientCapture, Gradients, Selection
from lightning_influence.objective import Objective, PerSample, Reduction, step_objective, training_objective
from lightning_influence.replay import TrainingData, autocast, isolated, loss_scale, sample_gradients, to_device

_SINGLES = 6
_BATCH = 16


@dataclass(frozen=True)
class SelfCheck:
    """What the first batch showed.

    Attributes:
        reduction: how the loss reduces its batch, as found by comparison with single samples.
        weighted: the loss call can give samples different weights (a mean over tokens, class weights), in other
            batches if not in this one.
        functional: uses of selected parameters outside their layers' own calls are captured.
        left_out: parameter name to its uses that are seen and not captured (the tied head of word embeddings).
        gradients: the checked per-sample gradients, for an estimate of what they need on disk.
        worst_sum: largest relative error of question (a) over the parameters.
        worst_single: largest relative error of question (b) over the samples that were collated alone.
    """

    reduction: Reduction
    weighted: bool
    functional: bool
    left_out: Mapping[str, frozenset[str]]
    gradients: Gradients
    worst_sum: float
    worst_single: float

    @property
    def num_samples(self) -> int:
        """Samples of the checked batch."""
        return next(iter(self.gradients.values())).num_samples


def self_check(
    module: LightningModule,
    selection: Selection,
    data: TrainingData,
    trainer: Trainer | None = None,
    per_sample_loss: PerSample | None = None,
    *,
    in_flight: bool = False,
) -> SelfCheck:
    """Compare captured rows of samples spread over the training set with autograd and with single samples, isolated
    from the run.

    Up to 16 samples are collated, whatever the loader's batch size; where that fails (a collate function or a model
    that takes one sample only), as many as the loader's batches have, and a warning says so.

    Args:
        in_flight: check what `training_step` itself differentiates, whatever `per_sample_loss` says; of several losses
            the first that reaches the selected parameters; and do without the functional capture if that is enough.

    Raises:
        CaptureError: the rows do not sum to autograd's gradient of a parameter, which is named.
        LossError: the loss couples samples, or weights them in a way that cannot be undone.
    """
    tolerance = 1e-3 if full_precision(trainer) else 0.1

    def fetched(size: int) -> tuple[int, object, Mapping[int, object]]:
        positions = _spread(size, size if data.length is None else data.length)
        with isolated(module, trainer):
            return data.alone(positions, range(size))

    def objective(batch: object, count: int, manual_losses: list[Tensor], capture: GradientCapture) -> Objective:
        placed = to_device(batch, module, trainer)
        if in_flight:
            meant = reaches_selection(selection, capture)
            return step_objective(module, placed, count, manual_losses=manual_losses, meant=meant)
        return training_objective(module, placed, count, per_sample_loss=per_sample_loss, manual_losses=manual_losses)

    def rows(batch: object, count: int, functional: bool) -> tuple[Gradients, Objective, Mapping[str, set[str]]]:
        capture = GradientCapture(selection, functional=functional)
        with isolated(module, trainer) as losses:  # anew for each: all start from the same counters and random state
            gradients, found = sample_gradients(
                module, capture, count, lambda: objective(batch, count, losses, capture), trainer
            )
        return gradients, found, capture.left_out

    fewer: list[str] = []  # why

    def chosen() -> tuple[int, object, Mapping[int, object]]:
        most = _BATCH if data.length is None else max(1, min(_BATCH, data.length))
        if data.batch_size >= most:
            return fetched(most)
        try:
            several = fetched(most)
            rows(several[1], several[0], functional=True)
            return several
        except Exception as error:  # whatever a user's collate function and model raise for more than they can take
            if isinstance(error, CaptureError) and "NaN" in error.what:
                raise
            reason = str(error).partition("\n")[0]
            fewer.append(
                f"The self-check could look at {data.batch_size} of {most} samples together, since the others did not "
                f"fit into the batch ({type(error).__name__}: {reason}): it says less about the loss of larger "
                "batches. HINT: let the collate function and training_step take batches of any size, or define "
                "`per_sample_loss(batch) -> (N,)` on the module."
            )
        return fetched(data.batch_size)

    size, together, alone = chosen()

    def compared(functional: bool) -> SelfCheck:
        gradients, found, left_out = rows(together, size, functional)
        with isolated(module, trainer) as losses:
            with autocast(trainer):
                total = objective(together, size, losses, GradientCapture(selection)).total
            reference = _autograd(selection, total, left_out, loss_scale(trainer))
            worst_sum = _check_sum(gradients, found.scale, reference, tolerance)
        own = {index: rows(alone[index], 1, functional)[0] for index in _singles(found)}
        reduction, worst_single = _check_singles(gradients, own, found, tolerance)
        weighted = found.weighted or not torch.allclose(found.scale, found.scale[:1].expand_as(found.scale))
        uses = {name: frozenset(kept) for name, kept in left_out.items()}
        return SelfCheck(reduction, weighted, functional, uses, gradients, worst_sum, worst_single)

    if not in_flight:
        check = compared(functional=True)
    else:
        try:
            check = compared(functional=False)
        except CaptureError:
            check = compared(functional=True)
    for reason in fewer:
        rank_zero_warn(reason)
    if check.reduction == "sum":
        smaller = {name: block.scaled(torch.full((size,), 1 / size)) for name, block in check.gradients.items()}
        return replace(check, gradients=smaller)
    return check


def _spread(count: int, length: int) -> list[int]:
    """`count` positions from the first to the last of `length`."""
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]


def _singles(found: Objective) -> list[int]:
    """Indices of the samples that are looked at alone: of different labels where the loss call tells them, and spread
    over the batch."""
    size = len(found.scale)
    labels = None if found.call is None else found.call.labels(size)
    first = {} if labels is None else {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    wanted = dict.fromkeys([*sorted(first.values()), *_spread(min(_SINGLES, size), size), *range(size)])
    return sorted(list(wanted)[:_SINGLES])


def full_precision(trainer: Trainer | None) -> bool:
    """Whether the Trainer computes in float32 or more throughout."""
    return trainer is None or str(trainer.precision) in ("32-true", "64-true", "32", "64")


def reaches_selection(selection: Selection, capture: GradientCapture) -> Callable[[Tensor], bool]:
    """Whether a loss has a gradient with respect to a selected parameter; frozen ones cannot tell.

    What the capture sees while this is found out is dropped.
    """
    trained = [p for p in selection.parameters.values() if p.requires_grad]

    def reaches(loss: Tensor) -> bool:
        if not trained or not loss.requires_grad:
            return loss.requires_grad
        found = _gradients(loss, trained, selection)
        capture.discard()
        return any(gradient is not None for gradient in found)

    return reaches


def _autograd(selection: Selection, total: Tensor, left_out: Collection[str], scale: float) -> Mapping[str, Tensor]:
    """autograd's own gradient of every selected parameter of which all uses were captured, by a scaled backward."""
    wanted = {
        name: parameter
        for name, parameter in selection.parameters.items()
        if parameter.requires_grad and not (name in left_out and name in selection.input_only)
    }
    if not wanted:
        return {}
    parameters = list(wanted.values())
    while True:
        found = _gradients(total * scale, parameters, selection)
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in zip(wanted, found, strict=True) if g is not None}
        if scale == 1 or all(bool(g.isfinite().all()) for g in dense.values()):
            return {name: gradient / scale for name, gradient in dense.items()}
        scale = max(1.0, scale / 16)


def _gradients(total: Tensor, parameters: Sequence[Tensor], selection: Selection) -> Sequence[Tensor | None]:
    """d(total)/d(parameter), None where it does not depend on one; every `.grad` stays as it is."""
    try:
        return torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    kept = [(parameter, parameter.grad) for parameter in selection.module.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:  # reentrant activation checkpointing allows a whole backward pass only
        torch.autograd.backward(total, retain_graph=True)
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _check_sum(gradients: Gradients, scale: Tensor, reference: Mapping[str, Tensor], tolerance: float) -> float:
    worst = 0.0
    largest = max((float(expected.double().norm()) for expected in reference.values()), default=0.0)
    for name, expected in reference.items():
        # A gradient that is zero but for rounding (the bias of attention's keys) is compared with the others' rounding.
        rounding = 1e3 * torch.finfo(expected.dtype).eps * largest
        block = gradients[name]
        share = torch.where(scale > 0, 1 / scale.double(), 0.0)
        size = float((block.norm().double() * share.to(block.device)).sum())
        error = float((block.scaled(share).sum().double() - expected.double()).norm())
        relative = error / max(float(expected.double().norm()), 1e-2 * size, rounding, 1e-30)
        worst = max(worst, relative)
        if relative > tolerance:
            raise CaptureError(
                f"the captured gradients of '{name}' do not sum to autograd's",
                expected=f"norm {float(expected.norm()):.4g} (relative error at most {tolerance:g})",
                found=f"relative error {relative:.3g}",
                hint=f"'{name}' is used outside its layer's own call, or a penalty on it is part of the loss: "
                "select other parameters, or define `per_sample_loss(batch) -> (N,)` without the penalty",
            )
    return worst


def _check_singles(
    gradients: Gradients, alone: Mapping[int, Gradients], found: Objective, tolerance: float
) -> tuple[Reduction, float]:
    size, ratios, worst = len(found.scale), [], 0.0
    for index, own in alone.items():
        row = {name: block.select(torch.tensor([index])) for name, block in gradients.items()}
        together, single, product = _dot(row, row), _dot(own, own), _dot(row, own)
        if single == 0.0 and together == 0.0:
            continue
        cosine = product / max((together * single) ** 0.5, 1e-300)
        if cosine < 1 - tolerance**0.5 / 3:
            raise LossError(
                "the loss couples the samples of a batch",
                expected="sample by sample the same gradient, whether it is in a batch or alone (cosine 1)",
                found=f"cosine {cosine:.3f} for sample {index} of the checked batch",
                hint="batch-first outputs and a loss that is a mean over samples are needed; an in-batch contrastive "
                "loss has no gradient of one sample: define `per_sample_loss(batch) -> (N,)` if you can say what it is",
            )
        ratios.append(product / single)
        worst = max(worst, _relative_error(together, single, product))
    if not ratios or size == 1:
        return _reduction_of_call(found), worst
    if all(abs(r - 1) <= tolerance**0.5 / 3 for r in ratios):
        return "mean", worst
    if all(abs(r / size - 1) <= tolerance**0.5 / 3 for r in ratios):
        return "sum", worst
    raise LossError(
        "training_step weights the samples of a batch in a way that cannot be read off its loss call",
        expected="a mean or a sum over samples, or one mean over tokens by cross_entropy with ignore_index",
        found="ratios to the loss of the sample alone: " + ", ".join(f"{r:.3g}" for r in ratios),
        hint="define `per_sample_loss(batch) -> (N,)` on the module",
    )


def _reduction_of_call(found: Objective) -> Reduction:
    """Where gradients cannot tell (one sample, or all of them zero): the loss is its one call's sum, or else a mean."""
    call = found.call
    is_sum = found.losses is None and call is not None and call.reduction == "sum"
    return "sum" if is_sum and call is not None and torch.equal(found.total, call.output.reshape(())) else "mean"


def _dot(a: Gradients, b: Gradients) -> float:
    """Inner product of one sample's gradients over all parameters."""

    def one(x: GradientBlock, y: GradientBlock) -> float:
        return float(x.pairwise(y).double().sum())

    return sum(one(a[name], b[name]) for name in a)


def _relative_error(together: float, single: float, product: float) -> float:
    """Distance of the row from a multiple of the single sample's gradient, relative to its length."""
    return float(max(0.0, 1 - product**2 / max(together * single, 1e-300)) ** 0.5)
