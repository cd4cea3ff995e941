"""The training loss of a batch, ready to be differentiated per sample: the user's own, or that of `training_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_influence.errors import LossError
from lightning_influence.objective.loss_call import LossCall, LossWatch

Reduction: TypeAlias = Literal["mean", "sum"]
PerSample: TypeAlias = Callable[[LightningModule, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A scalar to differentiate and the factors that turn its per-sample gradients into those of one sample alone.

    Attributes:
        total: scalar; the gradient of sample i alone is scale[i] times sample i's share of its gradient.
        scale: (N,).
        call: the watched loss call, where there was exactly one.
        losses: per-sample losses (N,), where the user gave them.
        weighted: `scale` can differ among samples, in other batches if not in this one.
    """

    total: Tensor
    scale: Tensor
    call: LossCall | None = None
    losses: Tensor | None = None
    weighted: bool = False

    @property
    def is_one_call(self) -> bool:
        """Whether the losses of the samples are what the watched call says, and nothing besides (no penalty)."""
        call = self.call
        if call is None or not len(self.scale):
            return False
        if not bool((self.scale > 0).any()):
            return True  # a batch of padding: its loss is 0/0
        told = call.losses(len(self.scale)).detach()
        total = self.total.detach() if self.losses is None else self.losses.detach()
        if self.losses is None:
            told = torch.where(self.scale > 0, told / self.scale.to(told), 0.0).sum()
        eps = torch.finfo(call.output.dtype).eps
        return torch.allclose(told, total.to(told), rtol=eps**0.5, atol=eps, equal_nan=True)

    def each(self) -> Tensor:
        """The value of every sample alone, (N,); differentiable.

        Raises:
            LossError: they cannot be told apart.
        """
        if self.losses is not None:
            return self.losses
        if len(self.scale) == 1:
            return (self.total * self.scale[0]).reshape(1)
        if self.call is None or not self.is_one_call:
            raise LossError(
                "the losses of the samples of a batch cannot be told apart",
                expected="a loss that is one call of a function such as cross_entropy, and nothing besides",
                found="a loss of several parts, or none that is known",
                hint="define `per_sample_loss(batch) -> (N,)` on the module",
            )
        return self.call.losses(len(self.scale))

    def summed(self) -> Tensor:
        """Sum of the values of the samples, each alone; differentiable."""
        if self.losses is None and bool((self.scale == self.scale[:1]).all()):
            return self.total * self.scale[0]
        return self.each().sum()

    def dynamics(self) -> dict[str, Tensor]:
        """Training-dynamics record of the batch: `loss` (N,), and for classifiers `margin` and `probability` (N,).

        margin = z_y - max over j other than y of z_j (Pleiss et al. 2020, 2001.10528); probability = softmax(z)_y
        (Swayamdipta et al. 2020, 2009.10795), y the given label. NaN for a sample whose label is left out of the loss.
        """
        n, record = len(self.scale), {}
        if self.losses is not None:
            record["loss"] = self.losses.detach().float()
        if self.call is None:
            return record
        record.setdefault("loss", self.call.losses(n).detach().float())
        z, y = self.call.logits(n), self.call.labels(n)
        if z is not None and y is not None:
            z, known = z.detach().float(), y >= 0
            probability = z.softmax(1).gather(1, y.clamp(min=0)[:, None]).squeeze(1)
            record["margin"] = torch.where(known, margin(z, y), torch.nan)
            record["probability"] = torch.where(known, probability, torch.nan)
        return record


def training_objective(
    module: LightningModule,
    batch: Any,
    num_samples: int,
    *,
    per_sample_loss: PerSample | None = None,
    reduction: Reduction = "mean",
    manual_losses: list[Tensor] | None = None,
) -> Objective:
    """The training loss of a batch, ready to be differentiated per sample.

    l comes from `per_sample_loss` where it is given or defined on the module; otherwise from `training_step`, as in
    `step_objective`.

    Raises:
        LossError: no loss, several losses, or a loss that is no scalar.
    """
    given = _given_loss(module, per_sample_loss)
    if given is None:
        return step_objective(module, batch, num_samples, reduction=reduction, manual_losses=manual_losses)
    with LossWatch() as watch:
        losses = check_per_sample(given(batch), num_samples, "per_sample_loss")
    return Objective(losses.sum(), torch.ones_like(losses), watch.only, losses)


def step_objective(
    module: LightningModule,
    batch: Any,
    num_samples: int,
    *,
    reduction: Reduction = "mean",
    manual_losses: list[Tensor] | None = None,
    meant: Callable[[Tensor], bool] | None = None,
) -> Objective:
    """What `training_step` itself differentiates, taken to be a mean over samples (or over tokens, if the watched call
    says so) unless `reduction` is `"sum"`.

    Args:
        manual_losses: the list in which an isolated module collects the losses of `manual_backward`.
        meant: of several such losses, take the first for which this is true; without it several are refused.

    Raises:
        LossError: no loss, several losses, or a loss that is no scalar.
    """
    if manual_losses is not None:
        manual_losses.clear()
    with LossWatch() as watch:
        returned = run_training_step(module, batch)
    total = _scalar_loss(returned, manual_losses or [], meant)
    scale = batch_scale(watch.calls, num_samples, reduction).to(total.device)
    weighted = any(call.can_weigh(num_samples) for call in watch.calls)
    return Objective(total, scale, watch.only, weighted=weighted)


def batch_scale(calls: Sequence[LossCall], num_samples: int, reduction: Reduction = "mean") -> Tensor:
    """Factor (N,) from each sample's share of a batch loss to the loss of that sample alone, as the watched calls tell;
    a loss that is a `"sum"` is N times as large as they say.

    Raises:
        LossError: several calls with different weights.
    """
    scales = [call.scale(num_samples) for call in calls if call.reduction == "mean"]
    if any(not torch.allclose(scales[0].double(), other.double()) for other in scales[1:]):
        raise LossError(
            "training_step averages several losses over different numbers of tokens",
            expected="one loss call, or several with the same weight for every sample",
            found=", ".join(call.name for call in calls),
            hint="define `per_sample_loss(batch) -> (N,)` on the module",
        )
    scale = scales[0] if scales else torch.full((num_samples,), float(num_samples))
    return scale / num_samples if reduction == "sum" else scale


def run_training_step(module: LightningModule, batch: Any) -> Any:
    """`training_step` with the arguments that it takes."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, 0) if takes_index else module.training_step(batch)


def check_per_sample(values: object, num_samples: int, name: str) -> Tensor:
    """`values` if it is one number per sample, (N,); a LossError otherwise."""
    if not isinstance(values, Tensor) or values.shape != (num_samples,):
        raise LossError(
            f"{name} must return one value per sample",
            expected=f"a tensor of shape ({num_samples},)",
            found=f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__,
            hint="return the losses before their mean, one entry per sample of the batch",
        )
    return values


def margin(z: Tensor, y: Tensor) -> Tensor:
    """z_y minus the largest other class score, (N,), for z (N, C); y (N,), of which negative entries mean class 0."""
    chosen = y.clamp(min=0)[:, None]
    return z.gather(1, chosen).squeeze(1) - z.scatter(1, chosen, float("-inf")).amax(1)


def _given_loss(module: LightningModule, per_sample_loss: PerSample | None) -> Callable[[Any], Tensor] | None:
    if per_sample_loss is not None:
        return lambda batch: per_sample_loss(module, batch)
    own = getattr(module, "per_sample_loss", None)
    return own if callable(own) else None


def _scalar_loss(returned: Any, manual: list[Tensor], meant: Callable[[Tensor], bool] | None) -> Tensor:
    if manual:
        chosen = manual if len(manual) == 1 or meant is None else [loss for loss in manual if meant(loss)][:1]
        if len(chosen) != 1:
            raise LossError(
                "training_step calls manual_backward several times",
                expected="one loss" if meant is None else "one that reaches the selected parameters",
                found=f"{len(manual)} losses",
                hint="define `per_sample_loss(batch) -> (N,)` on the module to say which one is attributed",
            )
        returned = chosen[0]
    loss = returned.get("loss") if isinstance(returned, dict) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(
            "training_step returned no loss that can be differentiated",
            expected="a scalar tensor, or a dictionary with one under 'loss'",
            found="None, by which training skips a batch" if returned is None else found,
            hint="samples without a loss cannot be attributed to: leave them out of the training set, or define "
            "`per_sample_loss(batch) -> (N,)` on the module; "
            'ask about queries without labels with measurement="predicted_class"',
        )
    return loss.reshape(())
