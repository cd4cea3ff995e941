"""LossOperator: products of vectors with the exact Hessian or Gauss–Newton matrix of the mean loss, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, OneHotCategorical

from lightning_influence.curvature.double_backward import (
    not_twice,
    refuse_reentrant_checkpoints,
    second_derivatives,
    twice_differentiable,
)
from lightning_influence.errors import CurvatureError, LossError
from lightning_influence.objective import LossCall, Objective
from lightning_influence.replay import autocast

if TYPE_CHECKING:
    from lightning_influence.curvature.evidence import TrainingEvidence

Parts: TypeAlias = Sequence[Tensor]  # one vector, parameter by parameter
Product: TypeAlias = Callable[[Parts], Parts]


class LossOperator:
    """H without weight decay, over the parameters of the evidence laid end to end in the order of the selection.

    `"hessian"`: ∇² of (1/N) Σ ℓ_n; `"ggn"`: (1/N) Σ Jᵀ (∇²_z ℓ_n) J, z the predictions that the loss function is given
    (Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent"). A loss on
    probabilities or log-probabilities has no curvature in these, or one that depends on the label: there, and with a
    `predictive_distribution`, ∇²_z ℓ is the Fisher information in z, as it is for cross-entropy by itself.

    A parameter counts with all its uses, those of a tied output head too. Nothing is kept from one product to the next:
    each walks the training set once, at the weights that the module then has. The first
    batch is checked for functions that hide their second derivative.

    Args:
        evidence: the model and its training set.
        matrix: which.
    """

    def __init__(self, evidence: TrainingEvidence, matrix: Literal["hessian", "ggn"]) -> None:
        if matrix not in ("hessian", "ggn"):
            raise CurvatureError(
                "there are no products with this matrix",
                expected='"hessian" or "ggn"',
                found=repr(matrix),
                hint="choose one of the two; the Fisher information with exact labels is the GGN",
            )
        self._evidence, self.matrix = evidence, matrix
        self._checked = False

    def matvec(self, v: Tensor) -> Tensor:
        """H times every row of v, (Q, P), by one forward pass of each batch; in the type of v and on its device.

        Raises:
            LossError: the Gauss–Newton matrix of a loss that is not one call of a known function.
            CurvatureError: the model cannot be differentiated twice, or its second derivatives are NaN or infinite.
        """
        parameters = list(self._evidence.selection.parameters.values())
        sizes = [parameter.numel() for parameter in parameters]
        if v.ndim != 2 or v.shape[1] != sum(sizes):
            raise CurvatureError(
                "a vector does not fit the parameters",
                expected=f"shape (Q, {sum(sizes)})",
                found=f"shape {tuple(v.shape)}",
                hint="lay the selected parameters end to end, in the order of the selection",
            )
        if not len(v):
            return v.clone()
        with torch.inference_mode(False), torch.no_grad():
            rows = [
                [part.to(p, copy=True).view_as(p) for part, p in zip(row.split(sizes), parameters, strict=True)]
                for row in v.detach()
            ]
            total = torch.zeros(v.shape, dtype=torch.float64, device=parameters[0].device)

        def use(found: Objective, ids: Tensor, batch: Any) -> None:
            with second_derivatives():
                product = self._product(found, batch, parameters)
                for out, row in zip(total, rows, strict=True):
                    parts = product(row)
                    out += torch.cat([part.detach().reshape(-1).to(total) for part in parts])
            if not bool(torch.isfinite(total).all()):
                raise CurvatureError(
                    f"a product with the {self.matrix} is NaN or infinite, in samples {int(ids[0])} to {int(ids[-1])} "
                    "of the training set",
                    expected="finite second derivatives",
                    found="NaN or infinity",
                    hint="look for infinite losses, and functions without a second derivative where they are used "
                    "(a square root or a norm at 0); in half precision use a wider type",
                )

        with twice_differentiable(self._evidence.module, parameters):
            self._evidence.visit_objectives(use, f"products with the {self.matrix}")
        return (self._evidence.reduce(total) / self._evidence.num_samples).to(v)

    def _product(self, found: Objective, batch: Any, parameters: list[Any]) -> Product:
        """Product with the matrix of the summed losses of a batch."""
        predictive = getattr(self._evidence.module, "predictive_distribution", None)
        if self.matrix == "hessian":
            backward = _Backward(found.summed(), parameters, 1.0)
        elif callable(predictive):
            with autocast(self._evidence.trainer):
                z, curvature = _of_distribution(predictive(batch))
            backward = _Backward(z, parameters, 0.0)
        else:
            z, curvature = _of_call(found)
            backward = _Backward(z, parameters, 0.0)
        if not self._checked:
            trainer = self._evidence.trainer
            exact = trainer is None or trainer.precision in ("32-true", "64-true")
            backward.check(_rounding(parameters) if exact else 0.1)
            self._checked = True
        if self.matrix == "hessian":
            return backward.derivative
        return lambda row: backward.of(curvature(backward.pushed(row)))


class _Backward:
    """The map u -> Jᵀ u of an output, in a form that can be differentiated again.

    Args:
        output: of the model, with a graph.
        parameters: towards which.
        u: in all entries.
    """

    def __init__(self, output: Tensor, parameters: Parts, u: float) -> None:
        self._output, self._parameters = output, parameters
        self._u = torch.full_like(output, u, requires_grad=True)
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if output.requires_grad:
            found = torch.autograd.grad(output, parameters, self._u, create_graph=True, allow_unused=True)
        self._reached = [place for place, part in enumerate(found) if part is not None and part.requires_grad]
        self._pulled = [part for part in found if part is not None and part.requires_grad]  # Jᵀ u

    def of(self, u: Tensor) -> Parts:
        """Jᵀ u of another u."""
        if not self._pulled:
            return [torch.zeros_like(part) for part in self._parameters]
        u = u.to(self._output)
        return torch.autograd.grad(self._output, self._parameters, u, retain_graph=True, materialize_grads=True)

    def pushed(self, row: Parts) -> Tensor:
        """J row: the derivative of u -> ⟨Jᵀ u, row⟩, which is linear."""
        return self._along(row, [self._u])[0]

    def derivative(self, row: Parts) -> Parts:
        """The derivative of ⟨Jᵀ u, row⟩ towards the parameters."""
        return self._along(row, self._parameters)

    def _along(self, row: Parts, towards: Parts) -> Parts:
        if not self._pulled:
            return [torch.zeros_like(part) for part in towards]
        along = [row[place] for place in self._reached]
        return torch.autograd.grad(self._pulled, towards, along, retain_graph=True, materialize_grads=True)

    def check(self, tolerance: float) -> None:
        """⟨J Jᵀ r, r⟩ = ‖Jᵀ r‖² for a random r: it is less where the backward of a function hides how it came about
        (once_differentiable; kernels in other languages). torch would pass such a function by and say nothing.

        Raises:
            CurvatureError: it is something else.
        """
        refuse_reentrant_checkpoints(self._output)
        draw = torch.randn(self._output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        r = draw.to(self._output)
        back = [part.detach() for part in self.of(r)]
        square = sum(float(part.double().square().sum()) for part in back)
        other = float((self.pushed(back).double() * r.double()).sum())
        if abs(square - other) > tolerance * square:
            raise not_twice(
                f"a backward that hides how it came about: ⟨J Jᵀ r, r⟩ = {other:.3g} where ‖Jᵀ r‖² = {square:.3g}"
            )


def _rounding(parameters: Parts) -> float:
    """What an inner product of derivatives may be off by, relative; generous."""
    return 0.1 if any(torch.finfo(parameter.dtype).bits < 32 for parameter in parameters) else 0.01


def _of_call(found: Objective) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z of the one loss call, and the product with ∇²_z of the summed losses.

    Raises:
        LossError: there is no such call, it is not all of the loss, or its loss is flat in z.
    """
    call, n = found.call, len(found.scale)
    if call is None or not found.is_one_call:
        raise LossError(
            "the Gauss–Newton matrix needs a loss that is one call of a known function of the predictions",
            expected="cross_entropy, nll_loss, binary_cross_entropy, mse_loss or the like, and nothing besides",
            found="a loss of its own or several calls" if call is None else f"{call.name} with other terms or factors",
            hint='take matrix="hessian", or define `predictive_distribution(batch) -> '
            "torch.distributions.Distribution` on the module",
        )
    if call.name == "l1_loss":
        raise LossError(
            "l1_loss has no curvature in its input, so its Gauss–Newton matrix is 0",
            expected="a loss that is curved in the predictions",
            found="l1_loss",
            hint='take matrix="hessian", smooth_l1_loss, or define `predictive_distribution(batch)` on the module',
        )
    if call.name in ("nll_loss", "binary_cross_entropy"):
        weight = _fisher_information(call, n)
        return call.input, lambda u: weight * u
    with torch.enable_grad():
        z = call.input.detach().requires_grad_()
        slope = torch.autograd.grad(call.with_input(z).losses(n).sum(), z, create_graph=True)[0]
    return call.input, lambda u: torch.autograd.grad(slope, z, u, retain_graph=True)[0]


def _fisher_information(call: LossCall, n: int) -> Tensor:
    """The diagonal of the Fisher information in (log-)probabilities, shaped like z, each sample's over its mass."""
    z = call.input.detach().to(torch.promote_types(call.input.dtype, torch.float32))
    if call.name == "nll_loss":
        counts = call.with_input(-torch.ones_like(z)).elements()  # class weight, 0 for padding; (N', positions...)
        weight = z.exp() * counts.unsqueeze(1)
    else:
        weight = 1 / (z * (1 - z)).clamp_min(torch.finfo(z.dtype).tiny)
        given = call.arguments.get("weight")
        weight = weight if given is None else weight * given.to(z)
    if call.reduction == "sum":
        return weight
    mass = call.mass(n)
    per_sample = weight.reshape(n, -1) / torch.where(mass > 0, mass, torch.inf).to(z)[:, None]
    return per_sample.reshape(z.shape)


def _of_distribution(predictive: Distribution) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Parameters z of a predictive distribution, and the product with its Fisher information in z, which is diagonal.

    Raises:
        LossError: a distribution whose parameters are not known here.
    """
    while isinstance(predictive, Independent):
        predictive = predictive.base_dist
    if isinstance(predictive, (Categorical, OneHotCategorical)):
        z, weight = predictive.logits, predictive.probs  # these logits are log-probabilities
    elif isinstance(predictive, Bernoulli):
        z, weight = predictive.logits, predictive.probs * (1 - predictive.probs)
    elif isinstance(predictive, Normal):
        precision = predictive.scale.square().reciprocal()
        z, weight = torch.stack([predictive.loc, predictive.scale]), torch.stack([precision, 2 * precision])
    else:
        raise LossError(
            "the Gauss–Newton matrix of this predictive distribution is not known",
            expected="Categorical, OneHotCategorical, Bernoulli or Normal, or one of these as Independent",
            found=type(predictive).__name__,
            hint='take matrix="hessian", or curvature.Dense("fisher"), EKFAC() or another estimate by labels',
        )
    weight = weight.detach()
    return z, lambda u: weight * u
