"""LossWatch: keeps the calls of a loss function that a training step makes; per-sample values follow from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_influence.errors import LossError
from lightning_influence.gradients.listening import depth

_WATCHED: dict[Callable[..., Tensor], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll_loss",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.binary_cross_entropy: "binary_cross_entropy",
    F.mse_loss: "mse_loss",
    F.l1_loss: "l1_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.huber_loss: "huber_loss",
}
_FUNCTIONS = {name: function for function, name in _WATCHED.items()}
_CLASSIFICATION = {"cross_entropy", "nll_loss"}
_BINARY = {"binary_cross_entropy_with_logits", "binary_cross_entropy"}
_NOTHING_IGNORED = -100  # the default `ignore_index`: labels of whole samples do not have it


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function, as `training_step` made it. What is derived from it is float32 or more.

    Attributes:
        name: the function of `torch.nn.functional`.
        arguments: every argument by name, defaults filled in (`input`, `target`, `reduction`, `weight`, ...).
        output: what the call returned.
    """

    name: str
    arguments: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """Predictions as given to the loss: logits, log-probabilities or values."""
        value: Tensor = self.arguments["input"]
        return value

    @property
    def target(self) -> Tensor:
        """Targets as given to the loss."""
        value: Tensor = self.arguments["target"]
        return value

    @property
    def reduction(self) -> str:
        """`"mean"`, `"sum"` or `"none"`."""
        return str(self.arguments["reduction"])

    @property
    def _hard(self) -> bool:
        return self.name in _CLASSIFICATION and not self.target.is_floating_point()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.input.dtype, torch.float32)

    def elements(self) -> Tensor:
        """The loss before its reduction, one entry per target entry; differentiable."""
        wide = {k: _widened(v, self._dtype) for k, v in self.arguments.items()}
        return _FUNCTIONS[self.name](**{**wide, "reduction": "none"})

    def with_input(self, z: Tensor) -> LossCall:
        """The same call with other predictions."""
        return replace(self, arguments={**self.arguments, "input": z})

    def mass(self, num_samples: int) -> Tensor:
        """Share of every sample in the denominator of the mean, (N,): its entries without padding, weights in."""
        target, weight = self.target, self.arguments.get("weight")
        if self._hard:
            valid = target != self.arguments["ignore_index"]
            counted = valid.to(self._dtype)
            if weight is not None:
                counted = counted * weight.to(self._dtype)[torch.where(valid, target, 0)]
        elif self.name in _CLASSIFICATION:  # class probabilities: classes lie in dimension 1, and weights do not count
            counted = self.input.new_ones(self.input.shape[:1] + self.input.shape[2:], dtype=self._dtype)
        else:
            shape = (self.input.detach() + target).shape
            counted = self.input.new_ones(shape, dtype=self._dtype)
            if weight is not None and self.name not in _BINARY:  # those divide by the number of entries all the same
                counted = counted * weight
        return per_sample(counted, num_samples, self.name).sum(1)  # (N,)

    def can_weigh(self, num_samples: int) -> bool:
        """Whether a mean like this one can give samples different weights, whatever weights this batch happens to have:
        by `weight=`, or because it leaves out entries and there are several a sample, or an `ignore_index` was chosen.
        """
        if self.reduction != "mean":
            return False
        weighted = self.arguments.get("weight") is not None
        if self._hard:
            several = self.target.ndim != 1 or self.target.numel() > num_samples
            return weighted or several or self.arguments["ignore_index"] != _NOTHING_IGNORED
        return weighted and self.name not in _CLASSIFICATION and self.name not in _BINARY

    def scale(self, num_samples: int) -> Tensor:
        """Factor (N,) from a sample's share of the batch loss to the loss of that sample alone.

        A mean over tokens divides the batch by all its tokens, and the lone sample by its own: the factor is their
        ratio. A sample without any token has no loss, and the factor 0.
        """
        if self.reduction == "sum":
            return self.input.new_ones(num_samples, dtype=self._dtype)
        mass = self.mass(num_samples)
        return torch.where(mass > 0, mass.sum() / mass, torch.zeros_like(mass))

    def losses(self, num_samples: int) -> Tensor:
        """Loss of every sample alone, (N,); differentiable."""
        total = per_sample(self.elements(), num_samples, self.name).sum(1)
        if self.reduction == "sum":
            return total
        mass = self.mass(num_samples)
        return torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), torch.zeros_like(total))

    def logits(self, num_samples: int) -> Tensor | None:
        """Class scores (N, C), C > 1, whose soft-max is the model's distribution; None for every other kind of loss."""
        z = self.input.to(self._dtype)
        if self.name in _CLASSIFICATION and z.ndim == 2 and len(z) == num_samples and z.shape[1] > 1:
            return z
        if self.name == "binary_cross_entropy_with_logits" and z.numel() == num_samples:
            return torch.stack([torch.zeros_like(z.flatten()), z.flatten()], dim=1)
        return None

    def labels(self, num_samples: int) -> Tensor | None:
        """Class indices (N,), -1 for a sample that `ignore_index` leaves out; None where targets are no hard labels."""
        z, target = self.logits(num_samples), self.target
        if z is None:
            return None
        if self._hard and target.ndim == 1:
            known = (target != self.arguments["ignore_index"]) & (target >= 0) & (target < z.shape[1])
            return torch.where(known, target, -1)
        if self.name in _BINARY and bool(((target == 0) | (target == 1)).all()):
            return target.flatten().long()
        return None


@dataclass
class Predictions:
    """The classes that a model predicts for one batch: those of the weights that were asked first, for all that follow.

    A query has one predicted class. At the weights of an earlier checkpoint the model may have said another; its
    gradient there is still that of the class in question.
    """

    classes: dict[str, Tensor] = field(default_factory=dict)

    def pinned(self, where: str, found: Tensor) -> Tensor:
        """What was predicted first.

        Args:
            where: what predicts; a batch may be classified more than once.
            found: what is predicted now.
        """
        return self.classes.setdefault(where, found).to(found.device)


class LossWatch(TorchFunctionMode):
    """Keeps every watched loss call that something can be learnt from; inside a call nothing nested is seen.

    Calls that carry no gradient (a metric on detached values) are passed over.

    Args:
        predictions: replace hard targets by these before the loss is computed, so that the loss measured is that of the
            predicted class whatever the label says.
    """

    def __init__(self, predictions: Predictions | None = None) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._predictions, self._depth = predictions, depth()

    @property
    def only(self) -> LossCall | None:
        """The call, if there was exactly one."""
        return self.calls[0] if len(self.calls) == 1 else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _WATCHED.get(func)
        if name is None or depth() != self._depth:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        arguments = {**bound.arguments, "reduction": _reduction(bound.arguments)}
        arguments.pop("size_average", None), arguments.pop("reduce", None)
        if self._predictions is not None and arguments["input"].requires_grad:
            said = self._predictions.pinned(f"loss call {len(self.calls)}", _prediction(name, arguments))
            arguments["target"] = said
        output = func(**arguments)
        if output.requires_grad:
            self.calls.append(LossCall(name, arguments, output))
        return output


def per_sample(values: Tensor, num_samples: int, name: str) -> Tensor:
    """Group a batch-major tensor by sample: (N * T, ...) or (N, T, ...) becomes (N, -1).

    Raises:
        LossError: the leading dimension is no multiple of N.
    """
    if values.ndim == 0 or num_samples == 0 or len(values) % num_samples:
        raise LossError(
            f"the {name} of training_step cannot be divided among the samples of the batch",
            expected=f"a leading dimension that is a multiple of {num_samples}, batch first",
            found=f"shape {tuple(values.shape)}",
            hint="define `per_sample_loss(batch) -> (N,)` on the module",
        )
    return values.reshape(num_samples, -1)


def _reduction(arguments: dict[str, Any]) -> str:
    """The reduction in force, the two deprecated flags included."""
    averaged, reduced = arguments.get("size_average"), arguments.get("reduce")
    if averaged is None and reduced is None:
        return str(arguments["reduction"])
    if reduced is False:
        return "none"
    return "sum" if averaged is False else "mean"


def _prediction(name: str, arguments: dict[str, Any]) -> Tensor:
    """The target that the model itself would give; padding among real targets stays padding."""
    z: Tensor = arguments["input"].detach()
    target: Tensor = arguments["target"]
    if name in _CLASSIFICATION and not target.is_floating_point():
        padding = target == arguments["ignore_index"]
        chosen = z.argmax(dim=1)
        return chosen if bool(padding.all()) else torch.where(padding, target, chosen)
    if name in _BINARY:
        threshold = 0.0 if name == "binary_cross_entropy_with_logits" else 0.5
        return (z > threshold).to(target.dtype).reshape(target.shape)
    raise LossError(
        'measurement="predicted_class" needs a classifier',
        expected="cross_entropy, nll_loss or binary_cross_entropy with hard labels",
        found=name,
        hint="define `measurement(batch) -> (N,)` on the module or pass a callable as `measurement`",
    )


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
