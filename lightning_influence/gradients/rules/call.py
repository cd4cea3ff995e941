"""What a rule is given, the call of a layer with the gradients at its outputs, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import GradientBlock, accumulation_dtype

BATCH_FIRST_HINT = (
    "every selected layer needs the samples in the first dimension: use batch_first=True, keep (B, T, D) instead of "
    "flattening it, look positions up per sample, or leave the layer out of the selection"
)


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer and the gradients of the total loss at its outputs.

    Attributes:
        layer: the module; for a functional use (F.linear with a selected weight) a stand-in of the same type.
        args, kwargs: what it was called with, detached.
        output_grads: d(total)/d(output) of its floating-point outputs, in the order of the flattened output.
        num_samples: B; every output must have it as leading dimension.
        names: the wanted local names to full names.
        outputs: the outputs themselves, for rules that run the layer again; else empty.
        autocast: the type that autocast computed in, where it was on.
        factored: the capture wants the factors of every product with a weight (curvatures need them): return
            ``Factored``. Otherwise a rule returns what it finds cheapest; the capture takes the smaller form of it.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_grads: tuple[Tensor, ...]
    num_samples: int
    names: Mapping[str, str]
    outputs: tuple[Tensor, ...] = ()
    autocast: torch.dtype | None = None
    factored: bool = False

    @property
    def wanted(self) -> frozenset[str]:
        """The layer's own names of the parameters that are asked for."""
        return frozenset(self.names)

    @property
    def input(self) -> Tensor:
        """The first argument, however it was passed."""
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        assert isinstance(value, Tensor)
        return value

    @property
    def output_grad(self) -> Tensor:
        """The gradient at the first output."""
        return self.output_grads[0]

    def widened(self) -> tuple[Tensor, Tensor]:
        """(input, output gradient), both in one type of at least single precision."""
        dtype = accumulation_dtype(self.input, self.output_grad)
        return self.input.to(dtype), self.output_grad.to(dtype)

    @property
    def title(self) -> str:
        """How error messages name the call: the full names of the wanted parameters and the layer's type."""
        return f"{', '.join(map(repr, sorted(self.names.values())))} ({type(self.layer).__name__})"

    def check_leading_dimension(self) -> None:
        """CaptureError unless every output has one entry per sample in its first dimension."""
        for grad in self.output_grads:
            if grad.dim() == 0 or grad.shape[0] != self.num_samples:
                raise CaptureError(
                    f"the output of the layer of {self.title} does not have the samples in its first dimension",
                    expected=f"{self.num_samples} samples first",
                    found=f"an output of shape {tuple(grad.shape)}",
                    hint=BATCH_FIRST_HINT,
                )


LayerGradients: TypeAlias = dict[str, GradientBlock]
Rule: TypeAlias = Callable[[LayerCall], LayerGradients]

_RULES: dict[str, Rule] = {}
_RUN_AGAIN: set[str] = set()


def _key(layer_type: type[nn.Module]) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def gradient_rule(*layer_types: type[nn.Module] | str, runs_again: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for exactly these layer types (not their subclasses).

    A type may be given by its import path, so that a rule for a package costs no import of it. The rule
    receives a ``LayerCall`` and returns a block for each wanted local name.

    Args:
        runs_again: the rule runs the layer a second time and wants to see the outputs of the first.
    """

    def register(rule: Rule) -> Rule:
        for layer_type in layer_types:
            key = layer_type if isinstance(layer_type, str) else _key(layer_type)
            _RULES[key] = rule
            (_RUN_AGAIN.add if runs_again else _RUN_AGAIN.discard)(key)
        return rule

    return register


def rule_for(layer_type: type[nn.Module]) -> Rule | None:
    """The rule registered for exactly this type, if any."""
    return _RULES.get(_key(layer_type))


def runs_again(layer_type: type[nn.Module]) -> bool:
    """True when a layer of this type is run a second time to find its gradients."""
    key = _key(layer_type)
    return key not in _RULES or key in _RUN_AGAIN
